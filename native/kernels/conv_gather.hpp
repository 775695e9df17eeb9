// A convolution as a product of matrices: which pixels a row of A is made of, and which pixel of the result it is.
//
// Forward and backward by input are one form: a row is a point (i, j) of a grid over an image; its pixel of the source
// for tap (a, b) is (i si + oh + a da, j sj + ow + b db), zero outside; its result is pixel (i ti + uh, j tj + uw).
// Backward by input with a stride is one such grid for each remainder of the input's pixels by the stride.
#pragma once

#include "gemm.hpp"

namespace tinytl {
namespace TINYTL_ISA {

struct Gather {
    int64_t images, gh, gw;            // rows: images x gh x gw
    const float* source;               // (images, sh, sw, channels)
    int64_t sh, sw, channels, depth;   // depth: channels that a row takes of each pixel
    int64_t si, sj, oh, ow;
    int64_t na, nb, da, db;            // taps, and how far apart they are; da, db >= 0
    int64_t th, tw, ti, tj, uh, uw;    // size of the image that the result is written to, and where

    int64_t rows() const { return images * gh * gw; }
    int64_t k() const { return na * nb * depth; }
    // Row m's only tap is pixel m, all of it in memory.
    bool direct() const { return na == 1 && nb == 1 && si == 1 && sj == 1 && !oh && !ow && gh == sh && gw == sw; }
    // Row m's result is pixel m.
    bool in_order() const { return ti == 1 && tj == 1 && !uh && !uw && gh == th && gw == tw; }
};

TINYTL_INLINE void copy_floats(float* to, const float* from, int64_t n) {
    for (; n >= W; n -= W, to += W, from += W) store(to, load(from));
    if (n > 0) store_part(to, load_part(from, n), n);
}
TINYTL_INLINE void clear_floats(float* to, int64_t n) {
    for (; n >= W; n -= W, to += W) store(to, vf{});
    if (n > 0) store_part(to, vf{}, n);
}

// n floats from each of `rows` places, `apart` from one another, to rows of `stride` floats.
static inline void copy_rows(float* to, int64_t stride, const float* from, int64_t apart, int64_t rows, int64_t n) {
    if (n == W) {
        for (int64_t r = 0; r < rows; ++r) store(to + r * stride, load(from + r * apart));
    } else if (n < W && W == 16) {
        for (int64_t r = 0; r < rows; ++r) store_part(to + r * stride, load_part(from + r * apart, n), n);
    } else {
        for (int64_t r = 0; r < rows; ++r) copy_floats(to + r * stride, from + r * apart, n);
    }
}

// Call body(row - first, image, i, j, n) for each run of n rows of [first, first + rows) that lie side by side.
template <class Body>
TINYTL_INLINE void for_runs(const Gather& g, int64_t first, int64_t rows, Body&& body) {
    int64_t j = first % g.gw, i = first / g.gw % g.gh, image = first / (g.gw * g.gh);
    for (int64_t done = 0; done < rows;) {
        const int64_t n = least(g.gw - j, rows - done);
        body(done, image, i, j, n);
        done += n;
        j = 0;
        if (++i == g.gh) i = 0, ++image;
    }
}

// Where the results of [first, first + rows) go.
static inline void target_pixels(const Gather& g, int64_t first, int64_t rows, int64_t* pixels) {
    for_runs(g, first, rows, [&](int64_t at, int64_t image, int64_t i, int64_t j, int64_t n) {
        const int64_t pixel = (image * g.th + i * g.ti + g.uh) * g.tw + j * g.tj + g.uw;
        for (int64_t r = 0; r < n; ++r) pixels[at + r] = pixel + r * g.tj;
    });
}

// Columns [k0, k1) of the rows [first, first + rows) of A: to[row stride + k - k0]. `skip`: first channel taken.
static inline void gather_rows(const Gather& g, int64_t skip, int64_t first, int64_t rows, int64_t k0, int64_t k1,
                               float* to, int64_t stride) {
    // One row of taps lies side by side in memory where all channels are taken.
    const bool whole = g.db == 1 && g.depth == g.channels;
    const int64_t line = g.nb * g.depth;
    for_runs(g, first, rows, [&](int64_t at, int64_t image, int64_t i, int64_t j, int64_t n) {
        for (int64_t a = k0 / line; a * line < k1; ++a) {
            const int64_t begin = most(k0, a * line) - a * line, end = least(k1 - a * line, line);
            float* out = to + at * stride + a * line + begin - k0;
            const int64_t h = i * g.si + g.oh + a * g.da;
            if (h < 0 || h >= g.sh) {
                for (int64_t r = 0; r < n; ++r) clear_floats(out + r * stride, end - begin);
                continue;
            }
            const float* line_of_image = g.source + (image * g.sh + h) * g.sw * g.channels + skip;
            const int64_t w = j * g.sj + g.ow;  // of the first row and tap
            // Rows of the run whose whole line of taps is in the image.
            int64_t inside = 0, outside = 0;
            if (whole) {
                inside = least(n, w < 0 ? pieces(-w, g.sj) : 0);
                outside = most(inside, g.sw - g.nb - w < 0 ? 0 : least(n, (g.sw - g.nb - w) / g.sj + 1));
                const float* from = line_of_image + (w + inside * g.sj) * g.channels + begin;
                copy_rows(out + inside * stride, stride, from, g.sj * g.channels, outside - inside, end - begin);
                if (outside - inside == n) continue;
            }
            for (int64_t b = begin / g.depth; b * g.depth < end; ++b) {
                const int64_t first_channel = most(begin - b * g.depth, 0);
                const int64_t size = least(end - b * g.depth, g.depth) - first_channel;
                float* to_tap = out + b * g.depth + first_channel - begin;
                const auto edge = [&](int64_t r0, int64_t r1) {  // rows one by one
                    for (int64_t r = r0; r < r1; ++r) {
                        const int64_t x = w + r * g.sj + b * g.db;
                        if (x < 0 || x >= g.sw) clear_floats(to_tap + r * stride, size);
                        else copy_floats(to_tap + r * stride, line_of_image + x * g.channels + first_channel, size);
                    }
                };
                if (whole) {
                    edge(0, inside);
                    edge(outside, n);
                    continue;
                }
                const int64_t x = w + b * g.db;
                const int64_t r0 = x < 0 ? least(n, pieces(-x, g.sj)) : 0;
                const int64_t r1 = most(r0, g.sw - 1 - x < 0 ? 0 : least(n, (g.sw - 1 - x) / g.sj + 1));
                edge(0, r0);
                const float* from = line_of_image + (x + r0 * g.sj) * g.channels + first_channel;
                copy_rows(to_tap + r0 * stride, stride, from, g.sj * g.channels, r1 - r0, size);
                edge(r1, n);
            }
        }
    });
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
