// Few rows (a classifier's, a gate's): each weight is used a handful of times, so it is read where it lies, along k.
#pragma once

#include "../runtime/call.hpp"
#include "conv_finish.hpp"
#include "expand.hpp"

namespace tinytl {
namespace TINYTL_ISA {

inline constexpr int64_t dot_rows = 8;  // up to that many rows this is faster than packing

// out[r 64 + c] = sum over k of x[r stride + k] w[(o + c) k_count + k], lane by lane and then over the lanes.
template <int R, int C, class Weights>
__attribute__((noinline)) void dots(const float* x, int64_t stride, const Weights& w, int64_t o, int64_t k_count,
                                    float* out) {
    vf acc[R][C];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[r][c] = vf{};
    const auto add = [&](auto value, auto weight) __attribute__((always_inline)) {
        vf row[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) row[c] = weight(c);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const vf v = value(r);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) acc[r][c] += v * row[c];
        }
    };
    int64_t k = 0;
    for (; k + W <= k_count; k += W)
        add([&](int r) { return load(x + r * stride + k); }, [&](int c) { return w.read((o + c) * k_count + k); });
    if (const int64_t n = k_count - k; n > 0)
        add([&](int r) { return load_part(x + r * stride + k, n); },
            [&](int c) { return w.read((o + c) * k_count + k, n); });
    for (int c = 0; c < C; ++c) {
        const float scale = w.scale(o + c);
        for (int r = 0; r < R; ++r) {
            float lanes[W];
            store(lanes, acc[r][c]);
            for (int half = W / 2; half > 0; half /= 2)
                for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
            out[r * 64 + c] = lanes[0] * scale;
        }
    }
}

template <int C, class Weights>
void dots_of_rows(int64_t rows, const float* x, int64_t k, const Weights& w, int64_t o, float* out) {
    switch (rows) {
        case 1: return dots<1, C>(x, k, w, o, k, out);
        case 2: return dots<2, C>(x, k, w, o, k, out);
        case 3: return dots<3, C>(x, k, w, o, k, out);
        default: return dots<4, C>(x, k, w, o, k, out);
    }
}

// y = finish(x w) for x: (rows, k), w: (columns, k).
template <class Weights>
void few_rows(const Call& call, const float* x, int64_t rows, int64_t k, int64_t columns, const Weights& w,
              const Forward& finish) {
    constexpr int C = max_vectors;
    call.threads.ranges(columns, 16, [&](int64_t begin, int64_t end, int thread) {
        float* out = reinterpret_cast<float*>(call.scratch_of(thread));  // (rows, 64)
        for (int64_t o = begin; o < end; o += 64) {
            const int64_t n = least(64, end - o);
            int64_t c = 0;
            for (; c + C <= n; c += C)
                for (int64_t r = 0; r < rows; r += 4)
                    dots_of_rows<C>(least(4, rows - r), x + r * k, k, w, o + c, out + r * 64 + c);
            for (; c < n; ++c)
                for (int64_t r = 0; r < rows; r += 4)
                    dots_of_rows<1>(least(4, rows - r), x + r * k, k, w, o + c, out + r * 64 + c);
            // Vectors that begin at multiples of 8 columns, so that each writes whole bytes of the mask.
            constexpr int V = W < 8 ? 8 / W : 1;
            for (int64_t r = 0; r < rows; ++r)
                for (c = 0; c < n; c += V * W) {
                    const int64_t width = least(V * W, n - c);
                    const Spot spot{nullptr, r, o + c, width, true, true, nullptr};
                    if (V == 1 || width <= W) {
                        vf acc[1][1] = {{load_part(out + r * 64 + c, width)}};
                        finish(acc, spot);
                    } else {
                        vf acc[1][V];
                        for (int v = 0; v < V; ++v)
                            acc[0][v] = load_part(out + r * 64 + c + v * W, least(W, width - v * W));
                        finish(acc, spot);
                    }
                }
        }
    });
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
