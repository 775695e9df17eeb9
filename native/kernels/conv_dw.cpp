// Gradient of a convolution by its weight: w += x transposed * grad, over all pixels of all images.
//
// Rows of the product are output channels, columns the taps' input channels, and k the pixels. Where the channels of
// one tap fill vectors, see conv_dw_direct.hpp. Elsewhere (the three channels of a photograph) a piece of the pixels is
// gathered into panels of columns of all taps, and every tile of output channels goes past it.
#include "conv_dw_direct.hpp"
#include "conv_window.hpp"
#include "depthwise.hpp"
#include "kernels.hpp"

namespace tinytl {
namespace TINYTL_ISA {
namespace {

constexpr int64_t pixels_at_once = 128;
constexpr int64_t panel_floats = scratch_per_thread / 4;

struct Where {
    float* to;       // the tile's first element
    int64_t stride;  // from row to row
    int64_t width;
};

struct Accumulate {
    template <int MR, int NV>
    inline __attribute__((always_inline)) void operator()(vf (&acc)[MR][NV], const Where& where) const {
        const int64_t tail = where.width - (NV - 1) * W;
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                float* to = where.to + r * where.stride + v * W;
                if (v == NV - 1 && tail < W) store_part(to, load_part(to, tail) + acc[r][v], tail);
                else store(to, load(to) + acc[r][v]);
            }
        }
    }
};

}  // namespace

void conv_dw(const Call& call) {
    if (call.attribute(11) != 0) return depthwise_conv_dw(call);
    const Tensor &x = call.tensor(0), &grad = call.tensor(1), &w = call.tensor(2);
    const Window window = window_of(call);
    const int64_t groups = static_cast<int64_t>(call.attribute(10));
    const int64_t out = w.shape[0], rows = out / groups;
    float* result = call.at<float>(2);
    const float* gradient = call.at<float>(1);

    Gather g{};
    g.images = call.images;
    g.gh = grad.shape[0];
    g.gw = grad.shape[1];
    g.source = call.at<float>(0);
    g.sh = x.shape[0];
    g.sw = x.shape[1];
    g.channels = x.shape[2];
    g.depth = w.shape[3];
    g.si = window.sh;
    g.sj = window.sw;
    g.oh = -window.top;
    g.ow = -window.left;
    g.na = window.kh;
    g.nb = window.kw;
    g.da = window.dh;
    g.db = window.dw;

    const int64_t pixels = g.rows(), columns = g.k(), threads = call.threads.count();
    if (pixels == 0) return;
    if (fits_direct(g.depth)) return direct_conv_dw(call, g, gradient, out, groups, result);
    const Panels panels(columns);
    const int64_t units = groups * panels.count, piece = pieces(pixels, pieces(pixels, pixels_at_once));
    // Threads share the panels; where these are too few, the output channels, each gathering all columns.
    const bool share_rows = units < 2 * threads && units % threads != 0 && rows >= 8 * threads;

    call.threads.run([&](int thread) {
        const int64_t unit_begin = share_rows ? 0 : units * thread / threads;
        const int64_t unit_end = share_rows ? units : units * (thread + 1) / threads;
        const int64_t r_begin = share_rows ? rows * thread / threads : 0;
        const int64_t r_end = share_rows ? rows * (thread + 1) / threads : rows;
        float* gathered = reinterpret_cast<float*>(call.scratch_of(thread));
        for (int64_t unit = unit_begin; unit < unit_end;) {
            const int64_t group = unit / panels.count, p0 = unit % panels.count;
            int64_t p1 = p0, wide = 0;
            while (p1 < panels.count && unit + p1 - p0 < unit_end &&
                   (p1 == p0 || (wide + panels.vectors(p1)) * W * piece <= panel_floats))
                wide += panels.vectors(p1++);
            unit += p1 - p0;
            for (int64_t first = 0; first < pixels; first += piece) {
                const int64_t n = least(piece, pixels - first);
                int64_t at = 0;
                for (int64_t p = p0; p < p1; ++p) {
                    const int64_t begin = panels.begin(p), wide_floats = panels.vectors(p) * W;
                    const int64_t width = panels.width(p);
                    float* to = gathered + at;
                    gather_rows(g, group * g.depth, first, n, begin, begin + width, to, wide_floats);
                    if (width < wide_floats)
                        for (int64_t i = 0; i < n; ++i)
                            clear_floats(to + i * wide_floats + width, wide_floats - width);
                    at += n * wide_floats;
                }
                at = 0;
                for (int64_t p = p0; p < p1; ++p) {
                    const int64_t vectors = panels.vectors(p), tiles = pieces(r_end - r_begin, rows_of_tile(vectors));
                    for (int64_t t = 0; t < tiles; ++t) {
                        const int64_t r0 = r_begin + (r_end - r_begin) * t / tiles;
                        const int64_t r1 = r_begin + (r_end - r_begin) * (t + 1) / tiles;
                        const float* a = gradient + first * out + group * rows + r0;
                        float* to = result + (group * rows + r0) * columns + panels.begin(p);
                        any_tile<true>(vectors, r1 - r0, {a, out, gathered + at, n}, Accumulate{},
                                       Where{to, columns, panels.width(p)});
                    }
                    at += n * vectors * W;
                }
            }
        }
    });
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
