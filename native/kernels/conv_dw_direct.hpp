// Gradient of a convolution by its weight without gathering: for each tap of the kernel a product over those pixels of
// the gradient whose pixel of the image exists, so that nothing is multiplied by the zeros around the image.
//
// A tile is some output channels by some input channels of one tap: rows of B are the image's channels where they lie.
#pragma once

#include "../runtime/call.hpp"
#include "conv_gather.hpp"
#include "last_vector.hpp"

namespace tinytl {
namespace TINYTL_ISA {

// Where the gradient's and the image's pixels of one tap lie: `lines` runs of `n` pixels.
struct TapLines {
    const float *grad, *x;                    // first channel of the tile, first pixel
    int64_t n, lines, lines_of_image;         // lines: of all images
    int64_t grad_pixel, grad_line, grad_gap;  // floats from one to the next; gap: from an image's last line on
    int64_t x_pixel, x_line, x_gap;
};

inline constexpr int64_t pixels_of_sum = 256;  // added up in registers at a time, which keeps rounding errors small

// to[r stride + c] += sum over pixels of grad[pixel][r] x[pixel][c] for MR x width, width <= NV W.
template <int MR, int NV, class Last>
__attribute__((noinline)) void tap_tile(const TapLines t, int64_t width, float* to, int64_t stride) {
    typedef typename Last::type last;
    const int64_t tail = width - (NV - 1) * W, lines_of_sum = most(1, pixels_of_sum / t.n);
    const float *grad_line = t.grad, *x_line = t.x;
    int64_t in_image = t.lines_of_image;
    // What the sums are added to is needed soon; in small images they take less time than to fetch that.
    for (int r = 0; r < MR; ++r)
        for (int v = 0; v < NV; ++v) __builtin_prefetch(to + r * stride + v * W, 1);
    for (int64_t done = 0; done < t.lines;) {
        vf acc[MR][NV > 1 ? NV - 1 : 1];
        last end_acc[MR];
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < NV - 1; ++v) acc[r][v] = vf{};
            end_acc[r] = last{};
        }
        for (const int64_t end = least(t.lines, done + lines_of_sum); done < end; ++done) {
            const float *grad = grad_line, *x = x_line;
            for (int64_t p = 0; p < t.n; ++p, grad += t.grad_pixel, x += t.x_pixel) {
                vf row[NV > 1 ? NV - 1 : 1];
#pragma GCC unroll 4
                for (int v = 0; v < NV - 1; ++v) row[v] = load(x + v * W);
                const last row_end = Last::load(x + (NV - 1) * W, tail);
#pragma GCC unroll 16
                for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
                    for (int v = 0; v < NV - 1; ++v) acc[r][v] += grad[r] * row[v];
                    end_acc[r] += grad[r] * row_end;
                }
            }
            grad_line += t.grad_line, x_line += t.x_line;
            if (--in_image == 0) in_image = t.lines_of_image, grad_line += t.grad_gap, x_line += t.x_gap;
        }
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) {
            float* row = to + r * stride;
#pragma GCC unroll 4
            for (int v = 0; v < NV - 1; ++v) store(row + v * W, load(row + v * W) + acc[r][v]);
            row += (NV - 1) * W;
            Last::store(row, Last::load(row, tail) + end_acc[r], tail);
        }
    }
}

template <int NV, class Last, int MR = tile_rows<NV>>
TINYTL_INLINE void tap_tile_of(int64_t rows, const TapLines& t, int64_t width, float* to, int64_t stride) {
    if constexpr (MR > 1) {
        if (rows < MR) return tap_tile_of<NV, Last, MR - 1>(rows, t, width, to, stride);
    }
    tap_tile<MR, NV, Last>(t, width, to, stride);
}

template <class Last>
static inline void any_tap_tile(int64_t rows, const TapLines& t, int64_t width, float* to, int64_t stride) {
    const int64_t vectors = pieces(width, W);
    if constexpr (max_vectors == 4) {
        if (vectors == 4) return tap_tile_of<4, Last>(rows, t, width, to, stride);
        if (vectors == 3) return tap_tile_of<3, Last>(rows, t, width, to, stride);
    }
    if (vectors == 2) return tap_tile_of<2, Last>(rows, t, width, to, stride);
    tap_tile_of<1, Last>(rows, t, width, to, stride);
}

// Points of a side of the gradient whose pixel of the image exists for one tap: [begin, end).
struct Reach {
    int64_t begin, end;

    // Point i has pixel i step + offset of `size`.
    Reach(int64_t points, int64_t step, int64_t offset, int64_t size)
        : begin(offset < 0 ? pieces(-offset, step) : 0),
          end(offset < size ? least(points, (size - 1 - offset) / step + 1) : 0) {}
    int64_t count() const { return most(0, end - begin); }
};

// Whether a tap's channels fill vectors well enough to need no gathering. (Where vectors are of 4, the rest of one
// would be read value by value.)
static inline bool fits_direct(int64_t depth) {
    const int64_t lanes = halves ? W / 2 : W;
    return W == 4 ? depth % W == 0 : 5 * depth >= 3 * lanes * pieces(depth, lanes);
}

// g: as for gathering; `out` channels of the gradient in `groups`; weights (out, taps, g.depth) are added to.
static inline void direct_conv_dw(const Call& call, const Gather& g, const float* gradient, int64_t out, int64_t groups,
                                  float* result) {
    const Panels panels(g.depth);
    const int64_t rows = out / groups, taps = g.na * g.nb, columns = g.k(), count = call.threads.count();
    const int64_t vectors = pieces(pieces(g.depth, W), panels.count);
    int64_t tiles = pieces(rows, rows_of_tile(vectors));
    if (groups * tiles * taps < 8 * count) tiles = least(rows, pieces(tiles, count) * count);  // as much for each
    const int64_t units = groups * tiles * taps;
    // Below some microseconds of work, calling the other threads costs more than they save.
    const int64_t threads = g.rows() * out * columns < 65536 ? 1 : count;
    // Neighbouring tiles of weights are a constant step apart, which processors fetch ahead; but not over many pages.
    const bool by_panels = taps == 1 && columns <= 512;
    const auto tiles_of = [&](int64_t unit, int64_t p_begin, int64_t p_end) {
        const int64_t tap = unit % taps, tile = unit / taps % tiles, group = unit / taps / tiles;
        const int64_t r0 = rows * tile / tiles, r1 = rows * (tile + 1) / tiles;
        const int64_t down = g.oh + tap / g.nb * g.da, across = g.ow + tap % g.nb * g.db;
        const Reach i(g.gh, g.si, down, g.sh), j(g.gw, g.sj, across, g.sw);
        if (!i.count() || !j.count()) return;
        TapLines t;
        t.n = j.count();
        t.lines_of_image = i.count();
        t.lines = g.images * i.count();
        t.grad_pixel = out;
        t.grad_line = g.gw * out;
        t.grad_gap = (g.gh - i.count()) * t.grad_line;
        t.x_pixel = g.sj * g.channels;
        t.x_line = g.si * g.sw * g.channels;
        t.x_gap = g.sh * g.sw * g.channels - i.count() * t.x_line;
        t.grad = gradient + (i.begin * g.gw + j.begin) * out + group * rows + r0;
        const int64_t pixel = (i.begin * g.si + down) * g.sw + j.begin * g.sj + across;
        if (t.n == g.gw && t.n * t.x_pixel == t.x_line) {  // lines follow one another: fewer, longer ones
            const int64_t together = least(t.lines_of_image, most(1, pixels_of_sum / t.n));
            if (t.lines_of_image % together == 0) {
                t.n *= together, t.grad_line *= together, t.x_line *= together;
                t.lines_of_image /= together, t.lines /= together;
            }
        }
        for (int64_t p = p_begin; p < p_end; ++p) {
            t.x = g.source + pixel * g.channels + group * g.depth + panels.begin(p);
            float* to = result + (group * rows + r0) * columns + tap * g.depth + panels.begin(p);
            const int64_t width = panels.width(p);
            if (half_is_enough(width)) any_tap_tile<Half>(r1 - r0, t, width, to, columns);
            else any_tap_tile<Full>(r1 - r0, t, width, to, columns);
        }
    };
    auto part = [&](int thread) {
        for (int64_t p = 0; p < panels.count; p += by_panels ? 1 : panels.count)
            for (int64_t unit = units * thread / threads; unit < units * (thread + 1) / threads; ++unit)
                tiles_of(unit, p, by_panels ? p + 1 : panels.count);
    };
    if (threads == 1) part(0);
    else call.threads.run(part);
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
