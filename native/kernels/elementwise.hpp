// What most kernels are made of: a loop over channels, an activation, one bit an element, a division among threads.
#pragma once

#include "../runtime/call.hpp"
#include "simd.hpp"

namespace tinytl {
namespace TINYTL_ISA {

// How many lanes of a vector stand for something: all, known when compiling, or the first n.
struct All {
    static constexpr int64_t n = W;
};
struct Some {
    int64_t n;
};
static inline vf get(const float* p, All) { return load(p); }
static inline vf get(const float* p, Some some) { return load_part(p, some.n); }
static inline void put(float* p, vf v, All) { store(p, v); }
static inline void put(float* p, vf v, Some some) { store_part(p, v, some.n); }

// body(c, All or Some) for each vector of n channels.
template <class Body>
static inline __attribute__((always_inline)) void vectors(int64_t n, Body&& body) {
    int64_t c = 0;
    for (; c + W <= n; c += W) body(c, All{});
    if (c < n) body(c, Some{n - c});
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Bits of the channels [c, c + n) of one pixel, whose bits begin at `row`; c is a multiple of W. Where a vector is
// half a byte the lower half must be written first. Bits behind the last channel become 0.
static inline __attribute__((always_inline)) void put_bits(uint8_t* row, int64_t c, int64_t n, uint32_t bits) {
    if (n < W) bits &= (1u << n) - 1;
    uint8_t* at = row + (c >> 3);
    if constexpr (W == 4) {
        *at = static_cast<uint8_t>(c & 4 ? *at | bits << 4 : bits);
    } else {
        *at = static_cast<uint8_t>(bits);
        if (W > 8 && n > 8) at[1] = static_cast<uint8_t>(bits >> 8);
    }
}
static inline __attribute__((always_inline)) uint32_t get_bits(const uint8_t* row, int64_t c, int64_t n) {
    const uint8_t* at = row + (c >> 3);
    if constexpr (W == 4) return static_cast<uint32_t>(*at >> (c & 4) & 15);
    uint32_t bits = *at;
    if (W > 8 && n > 8) bits |= static_cast<uint32_t>(at[1]) << 8;
    return bits;
}

// y = z between lo and hi; lo + slope (z - lo) from lo down; hi from hi up. NaN stays.
struct Activation {
    float lo, hi, slope;

    Activation(const Call& call, int first)
        : lo(static_cast<float>(call.attribute(first))),
          hi(static_cast<float>(call.attribute(first + 1))),
          slope(static_cast<float>(call.attribute(first + 2))) {
        if (lo == -__builtin_inff()) slope = 0;  // at z = lo = -inf the difference would be NaN
    }
    inline __attribute__((always_inline)) vf operator()(vf z) const {
        const vf y = min(set1(hi), max(set1(lo), z));  // in this order they hand NaN on
        if (slope == 0) return y;
        return z <= lo ? lo + slope * (z - lo) : y;
    }
    inline __attribute__((always_inline)) uint32_t bits(vf z) const {
#if defined(__AVX512F__) && defined(__AVX512BW__)
        const __m512 v = reinterpret_cast<__m512>(z);
        const __mmask16 above = _mm512_cmp_ps_mask(v, _mm512_set1_ps(lo), _CMP_NLE_UQ);
        return _mm512_mask_cmp_ps_mask(above, v, _mm512_set1_ps(hi), _CMP_NGE_UQ);
#else
        return bits_of(~((z <= lo) | (z >= hi)));
#endif
    }
};

// v where the bit is set, 0 elsewhere.
static inline __attribute__((always_inline)) vf keep(vf v, uint32_t bits) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return reinterpret_cast<vf>(_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), reinterpret_cast<__m512>(v)));
#else
    return lanes_of(bits) ? v : vf{};
#endif
}
// v where the bit is set, slope v elsewhere; where slope is 0 that is 0, whatever v.
static inline __attribute__((always_inline)) vf pass(vf v, uint32_t bits, float slope) {
    return slope == 0 ? keep(v, bits) : lanes_of(bits) ? v : slope * v;
}

static inline int64_t mask_bytes(int64_t channels) { return (channels + 7) / 8; }
static inline int64_t channels_of(const Tensor& t) { return t.rank ? t.shape[t.rank - 1] : 1; }
static inline int64_t pixels_of(const Tensor& t) { return t.elements / channels_of(t); }

// A tensor as an image; fewer axes than three are the innermost ones.
struct Image {
    int64_t height, width, channels, elements;

    explicit Image(const Tensor& t)
        : height(t.rank > 2 ? t.shape[t.rank - 3] : 1),
          width(t.rank > 1 ? t.shape[t.rank - 2] : 1),
          channels(channels_of(t)),
          elements(t.elements) {}
};

inline constexpr int64_t worth_a_thread = 16384;  // elements; fewer are done sooner by one thread

// body(begin, end, thread) over equal parts of `rows` rows of `width` elements each.
template <class Body>
static inline void divide(const Call& call, int64_t rows, int64_t width, Body&& body) {
    call.threads.ranges(rows, rows * width > worth_a_thread ? 1 : most(rows, 1), body);
}

// Sums over rows for each of `channels` channels, the same to the bit for any number of threads: the rows are cut into
// chunks that depend on the shape alone, each chunk is summed by part(begin, end, c, n, sums) into S rows of n
// numbers, and the chunks are added up in their order. finish(c, n, sums) takes the totals of the channels [c, c + n),
// c a multiple of 8. At most `sums_bytes` of thread 0's scratch memory are used, from its start.
inline constexpr int64_t sums_bytes = 192 * 1024, sums_channels = 2048;

template <class T, int S, class Part, class Finish>
static inline void sum_rows(const Call& call, int64_t rows, int64_t channels, Part&& part, Finish&& finish) {
    T* sums = reinterpret_cast<T*>(call.scratch_of(0));
    for (int64_t c = 0; c < channels; c += sums_channels) {
        const int64_t n = least(sums_channels, channels - c);
        const int64_t size = S * n;
        const int64_t wanted = least(least(16, 1 + rows * n / worth_a_thread), rows);
        const int64_t room = sums_bytes / (size * static_cast<int64_t>(sizeof(T)));
        const int64_t chunks = most(1, even_parts(least(wanted, room)));
        call.threads.ranges(chunks, 1, [&](int64_t begin, int64_t end, int) {
            for (int64_t k = begin; k < end; ++k)
                part(rows * k / chunks, rows * (k + 1) / chunks, c, n, sums + k * size);
        });
        for (int64_t k = 1; k < chunks; ++k)
            for (int64_t i = 0; i < size; ++i) sums[i] += sums[k * size + i];
        finish(c, n, sums);
    }
}

// The part of a float32 sum over rows [begin, end): row(r, c, lanes) is one vector of what is summed. Runs of 64 rows
// are summed apart, which keeps the rounding error of long sums small.
template <class Row>
static inline __attribute__((always_inline)) void sum_part(int64_t begin, int64_t end, int64_t c, int64_t n,
                                                           float* sums, Row&& row) {
    if (begin >= end) vectors(n, [&](int64_t i, auto lanes) { put(sums + i, vf{}, lanes); });
    for (int64_t first = begin; first < end; first += 64) {
        const int64_t last = least(first + 64, end);
        vectors(n, [&](int64_t i, auto lanes) {
            vf sum = {};
            for (int64_t r = first; r < last; ++r) sum += row(r, c + i, lanes);
            put(sums + i, first == begin ? sum : get(sums + i, lanes) + sum, lanes);
        });
    }
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
