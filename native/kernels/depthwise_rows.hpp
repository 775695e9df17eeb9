// The inner loops of the depthwise convolutions: one vector of channels, some neighbouring pixels of one row.
//
// A column of the input is loaded once and multiplied into every output pixel of the segment that it reaches, so that
// for each row of the kernel N pixels cost (N - 1) S + K loads of the input and K of the weight for N K products.
// Where a segment reaches over the edge of the image, the columns that are not there are left out: nothing is
// multiplied by 0.
#pragma once

#include "elementwise.hpp"
#include "weights.hpp"

namespace tinytl {
namespace TINYTL_ISA {

#define TINYTL_UNROLL _Pragma("GCC unroll 64")

template <class Lanes>
inline constexpr bool whole = false;
template <>
inline constexpr bool whole<All> = true;

// What all rows of a depthwise instruction have in common. `source` is what is read beside the weight: the input, or
// for conv_dx the gradient; `target` what is made.
struct Depthwise {
    Window window;
    int64_t channels;
    int64_t source_height, source_width, target_height, target_width;
    const float* source;
};

inline constexpr int64_t taps_bytes = 64 * 1024;  // of scratch memory, at its end, for one vector's filters
// Filters larger than that (33 x 33 at W = 16) are read from where they are.
static inline bool taps_fit(const Window& w) { return w.kh * w.kw * W * int64_t(sizeof(float)) <= taps_bytes; }

// The filters of one vector of channels: (kh * kw, W), expanded, 0 behind the last channel.
struct Taps {
    const float* expanded;  // nullptr: they do not fit
    Values values;
    int64_t channel, n, channels;

    Taps(const Values& v, const Window& w, int64_t channels_, int64_t c, float* memory)
        : expanded(taps_fit(w) ? memory : nullptr),
          values(v),
          channel(c),
          n(least(W, channels_ - c)),
          channels(channels_) {
        if (!expanded) return;
        for (int64_t t = 0; t < w.kh * w.kw; ++t) store(memory + t * W, read(t));
    }
    vf operator[](int64_t tap) const { return expanded ? load(expanded + tap * W) : read(tap); }

private:
    vf read(int64_t tap) const { return values.at(tap * channels + channel, n) * values.scales(channel, n); }
};

static inline float* taps_memory(const Call& call, int thread) {
    return reinterpret_cast<float*>(call.scratch_of(thread) + scratch_per_thread - taps_bytes);
}

// acc[j] += what reaches output pixel x + j of output row y, for N pixels of a convolution with K columns at stride S.
// Edge: some of the columns may not exist.
template <int K, int S, int N, bool Edge, class Lanes>
static inline __attribute__((always_inline)) void gather(vf (&acc)[N], const Depthwise& d, const float* image,
                                                         const float* taps, int64_t y, int64_t x, Lanes lanes) {
    const Window& w = d.window;
    const int64_t top = y * w.sh - w.top, left = x * S - w.left;
    for (int64_t ky = 0; ky < w.kh; ++ky) {
        const int64_t row = top + ky * w.dh;
        if (static_cast<uint64_t>(row) >= static_cast<uint64_t>(d.source_height)) continue;
        const int64_t first = (row * d.source_width + left) * d.channels;
        vf weight[K];
        TINYTL_UNROLL for (int k = 0; k < K; ++k) weight[k] = load(taps + (ky * K + k) * W);
        TINYTL_UNROLL for (int i = 0; i < (N - 1) * S + K; ++i) {
            if (Edge && static_cast<uint64_t>(left + i) >= static_cast<uint64_t>(d.source_width)) continue;
            const vf v = get(image + first + i * d.channels, lanes);
            TINYTL_UNROLL for (int k = 0; k < K; ++k)
                if (i >= k && (i - k) % S == 0 && (i - k) / S < N) acc[(i - k) / S] += v * weight[k];
        }
    }
}

// The reverse, with a dilation of 1: acc[j] += what pixel x + j of one row of the input gives to the gradients that it
// reached. x + left is a multiple of S; pixels in front of the image may be among them. The row's first row of the
// kernel is `ky`, which reached row `gy` of the gradient; the next is sh further, and reached the one above.
template <int K, int S, int N, bool Edge, class Lanes>
static inline __attribute__((always_inline)) void scatter(vf (&acc)[N], const Depthwise& d, const float* image,
                                                          const float* taps, int64_t ky, int64_t gy, int64_t x,
                                                          Lanes lanes) {
    const Window& w = d.window;
    constexpr int before = (K - 1) / S;
    const int64_t left = (x + w.left) / S - before;  // first column of the gradient that reaches any of them
    for (; ky < w.kh; ky += w.sh, --gy) {
        if (static_cast<uint64_t>(gy) >= static_cast<uint64_t>(d.source_height)) continue;
        const int64_t first = (gy * d.source_width + left) * d.channels;
        vf weight[K];
        TINYTL_UNROLL for (int k = 0; k < K; ++k) weight[k] = load(taps + (ky * K + k) * W);
        TINYTL_UNROLL for (int i = 0; i <= before + (N - 1) / S; ++i) {
            if (Edge && static_cast<uint64_t>(left + i) >= static_cast<uint64_t>(d.source_width)) continue;
            const vf v = get(image + first + i * d.channels, lanes);
            TINYTL_UNROLL for (int k = 0; k < K; ++k) {
                const int j = (i - before) * S + k;
                if (j >= 0 && j < N) acc[j] += v * weight[k];
            }
        }
    }
}

// One pixel of a convolution of any geometry, and of its reverse.
template <class Lanes>
static inline vf gather_any(const Depthwise& d, const float* image, const Taps& taps, int64_t y, int64_t x,
                            Lanes lanes) {
    const Window& w = d.window;
    vf acc = {};
    for (int64_t ky = 0; ky < w.kh; ++ky) {
        const int64_t row = y * w.sh - w.top + ky * w.dh;
        if (row < 0 || row >= d.source_height) continue;
        for (int64_t kx = 0; kx < w.kw; ++kx) {
            const int64_t column = x * w.sw - w.left + kx * w.dw;
            if (column < 0 || column >= d.source_width) continue;
            acc += get(image + (row * d.source_width + column) * d.channels, lanes) * taps[ky * w.kw + kx];
        }
    }
    return acc;
}
template <class Lanes>
static inline vf scatter_any(const Depthwise& d, const float* image, const Taps& taps, int64_t y, int64_t x,
                             Lanes lanes) {
    const Window& w = d.window;
    vf acc = {};
    for (int64_t ky = 0; ky < w.kh; ++ky) {
        const int64_t down = y + w.top - ky * w.dh;
        if (down < 0 || down % w.sh || down / w.sh >= d.source_height) continue;
        for (int64_t kx = 0; kx < w.kw; ++kx) {
            const int64_t across = x + w.left - kx * w.dw;
            if (across < 0 || across % w.sw || across / w.sw >= d.source_width) continue;
            const int64_t pixel = down / w.sh * d.source_width + across / w.sw;
            acc += get(image + pixel * d.channels, lanes) * taps[ky * w.kw + kx];
        }
    }
    return acc;
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
