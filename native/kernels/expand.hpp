// Weights as f32, whatever they are kept as, in vectors: never more of them than one panel at a time.
#pragma once

#include "gemm.hpp"
#include "weights.hpp"

namespace tinytl {
namespace TINYTL_ISA {

// Each reads `n` <= W weights from number `at` on, zeros behind them; `scale(o)` is what all weights of output channel
// o are still to be multiplied by; `prefetch` may point behind the last.
struct FloatWeights {
    const float* codes;
    vf read(int64_t at) const { return load(codes + at); }
    vf read(int64_t at, int64_t n) const { return load_part(codes + at, n); }
    void prefetch(int64_t at) const { __builtin_prefetch(codes + at); }
    static constexpr bool scaled = false;
    float scale(int64_t) const { return 1.0f; }
};

struct ScaledWeights : FloatWeights {  // one scale for each output channel
    const float* scales;
    static constexpr bool scaled = true;
    float scale(int64_t o) const { return scales[o]; }
};

struct ByteWeights {  // i8 codes, one scale for each output channel
    const int8_t* codes;
    const float* scales;
    vf read(int64_t at) const { return whole_bytes(codes + at); }
    __attribute__((noinline)) vf read(int64_t at, int64_t n) const {
        vf v = {};
        for (int64_t i = 0; i < n; ++i) v[i] = codes[at + i];
        return v;
    }
    void prefetch(int64_t at) const { __builtin_prefetch(codes + at); }
    static constexpr bool scaled = true;
    float scale(int64_t o) const { return scales[o]; }
};

struct TableWeights {  // u8 codes, the value of each
    const uint8_t* codes;
    const float* values;
    vf read(int64_t at) const {  // (gather instructions are slower than this where they were tried)
        float v[W];
        for (int i = 0; i < W; ++i) v[i] = values[codes[at + i]];
        return load(v);
    }
    __attribute__((noinline)) vf read(int64_t at, int64_t n) const {
        float v[W] = {};
        for (int64_t i = 0; i < n; ++i) v[i] = values[codes[at + i]];
        return load(v);
    }
    void prefetch(int64_t at) const { __builtin_prefetch(codes + at); }
    static constexpr bool scaled = false;
    float scale(int64_t) const { return 1.0f; }
};

struct HalfWeights {  // f16, one scale
    const uint16_t* codes;
    const float* factor;
    vf read(int64_t at) const {
#if defined(__AVX512F__)
        return reinterpret_cast<vf>(_mm512_maskz_cvtph_ps(
            0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + at))));
#elif defined(__F16C__) && defined(__AVX2__)
        return reinterpret_cast<vf>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + at))));
#else
        return read(at, W);
#endif
    }
    __attribute__((noinline)) vf read(int64_t at, int64_t n) const {
        float v[W] = {};
        for (int64_t i = 0; i < n; ++i) v[i] = half_to_float(codes[at + i]);
        return load(v);
    }
    void prefetch(int64_t at) const { __builtin_prefetch(codes + at); }
    static constexpr bool scaled = true;
    float scale(int64_t) const { return *factor; }
};

// Call `body` with the reader of that weight.
template <class Body>
void with_weights(const Tensor& weight, const float* table, Body&& body) {
    const void* data = weight.data;
    switch (weight.dtype) {
        case Dtype::i8: return body(ByteWeights{static_cast<const int8_t*>(data), table});
        case Dtype::u8: return body(TableWeights{static_cast<const uint8_t*>(data), table});
        case Dtype::f16: return body(HalfWeights{static_cast<const uint16_t*>(data), table});
        default: break;
    }
    const FloatWeights plain{static_cast<const float*>(data)};
    if (table) return body(ScaledWeights{plain, table});
    return body(plain);
}

// One step of a transposition: lanes whose number has bit `S` change places between a and b, which lie S rows apart.
template <int S>
TINYTL_INLINE void exchange(vf& a, vf& b) {
    vi to_a, to_b;
    for (int i = 0; i < W; ++i) {
        to_a[i] = i & S ? W + i - S : i;
        to_b[i] = i & S ? W + i : i + S;
    }
#if defined(__clang__)
    vf x, y;
    for (int i = 0; i < W; ++i) x[i] = to_a[i] < W ? a[to_a[i]] : b[to_a[i] - W];
    for (int i = 0; i < W; ++i) y[i] = to_b[i] < W ? a[to_b[i]] : b[to_b[i] - W];
#else
    const vf x = __builtin_shuffle(a, b, to_a), y = __builtin_shuffle(a, b, to_b);
#endif
    a = x;
    b = y;
}

// rows[i][j] <-> rows[j][i]
template <int S = W / 2>
TINYTL_INLINE void transpose(vf (&rows)[W]) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
        if (!(i & S)) exchange<S>(rows[i], rows[i + S]);
    if constexpr (S > 1) transpose<S / 2>(rows);
}

// How far ahead of what is packed is fetched: trained weights are read once a pass, and are in no cache near by then.
inline constexpr int64_t vectors_ahead = 4;

// A panel of the product with x: out[k - k0][n - n0] = w[n][k] for k in [k0, k1) and `width` rows n from n0 on, zeros
// behind them up to whole vectors. w: (.., length), row-major.
template <class Weights>
void pack_columns(float* out, const Weights& w, int64_t length, int64_t n0, int64_t width, int64_t k0, int64_t k1) {
    constexpr int64_t line = 64 / sizeof(*w.codes);  // weights in a line of the cache
    const int64_t vectors = pieces(width, W);
    for (int64_t v = 0; v < vectors; ++v) {
        const int64_t lanes = least(W, width - v * W), first = n0 + v * W;
        vf scale = {};
        for (int64_t i = 0; i < lanes; ++i) scale[i] = w.scale(first + i);
        for (int64_t k = k0; k < k1; k += W) {
            const int64_t n = least(W, k1 - k), at = first * length + k;
            if ((k - k0) % line == 0) {
                const int64_t beyond = k + vectors_ahead * W - k1;  // from 0 on: in the rows after these
                const int64_t ahead = beyond < 0 ? at + vectors_ahead * W : (first + W) * length + k0 + beyond;
#pragma GCC unroll 16
                for (int i = 0; i < W; ++i) w.prefetch(ahead + i * length);
            }
            vf rows[W];
            if (n == W && lanes == W) {
#pragma GCC unroll 16
                for (int i = 0; i < W; ++i) rows[i] = w.read(at + i * length);
            } else {
                for (int i = 0; i < W; ++i) rows[i] = i < lanes ? w.read(at + i * length, n) : vf{};
            }
            transpose(rows);
            float* to = out + ((k - k0) * vectors + v) * W;
            if (n == W) {
#pragma GCC unroll 16
                for (int i = 0; i < W; ++i) store(to + i * vectors * W, Weights::scaled ? rows[i] * scale : rows[i]);
            } else {
                for (int i = 0; i < n; ++i) store(to + i * vectors * W, Weights::scaled ? rows[i] * scale : rows[i]);
            }
        }
    }
}

// Rows of a panel of the product with the gradient: `rows` output channels from o on, of each the `width` weights that
// begin at number `at`, `length` further on for each channel.
template <class Weights>
void pack_rows(float* out, const Weights& w, int64_t at, int64_t length, int64_t rows, int64_t width, int64_t o) {
    const int64_t whole = width / W, rest = width - whole * W;
    for (int64_t r = 0; r < rows; ++r, at += length) {
        w.prefetch(at + 8 * length);
        const vf scale = set1(w.scale(o + r));
        for (int64_t v = 0; v < whole; ++v, out += W) {
            const vf row = w.read(at + v * W);
            store(out, Weights::scaled ? row * scale : row);
        }
        if (rest) {
            const vf row = w.read(at + whole * W, rest);
            store(out, Weights::scaled ? row * scale : row);
            out += W;
        }
    }
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
