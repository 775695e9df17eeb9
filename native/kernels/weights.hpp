// Weights of any type with the table beside them, a vector at a time.
#pragma once

#include "../runtime/call.hpp"
#include "simd.hpp"

namespace tinytl {
namespace TINYTL_ISA {

static inline float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
    uint32_t bits = sign | (exponent + 112) << 23 | mantissa << 13;
    if (exponent == 31) bits = sign | 0x7F800000 | mantissa << 13;
    float f = 0;
    std::memcpy(&f, &bits, sizeof f);
    if (exponent == 0) f = (sign ? -1.0f : 1.0f) * static_cast<float>(mantissa) * 0x1p-24f;
    return f;
}

// W bytes with signs.
static inline vf whole_bytes(const int8_t* p) {
#if defined(__AVX512F__)
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return reinterpret_cast<vf>(_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, v)));
#elif defined(__AVX2__)
    const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return reinterpret_cast<vf>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)));
#else
    vf v;
    for (int i = 0; i < W; ++i) v[i] = p[i];
    return v;
#endif
}

// Values of a weight of any type, before the scale of its output channel.
struct Values {
    const void* data;
    const float* table;  // of 256 values (u8), of one scale (f16), of a scale for each output channel (i8, f32)
    Dtype dtype;

    // The n <= W values from number i on; 0 behind them.
    vf at(int64_t i, int64_t n) const {
        switch (dtype) {
            case Dtype::f32: {
                const float* p = static_cast<const float*>(data) + i;
                return n == W ? load(p) : load_part(p, n);
            }
            case Dtype::i8: {
                const int8_t* p = static_cast<const int8_t*>(data) + i;
                return n == W ? whole_bytes(p) : each(p, n, [](int8_t q) { return float(q); });
            }
            case Dtype::u8:
                return each(static_cast<const uint8_t*>(data) + i, n, [this](uint8_t q) { return table[q]; });
            default: {
                const float scale = table ? *table : 1.0f;
                const uint16_t* p = static_cast<const uint16_t*>(data) + i;
#if defined(__AVX512F__)
                if (n == W) {
                    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
                    return scale * reinterpret_cast<vf>(_mm512_maskz_cvtph_ps(0xFFFF, half));
                }
#elif defined(__F16C__)
                if (n == W) {
                    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
                    return scale * reinterpret_cast<vf>(_mm256_cvtph_ps(half));
                }
#endif
                return scale * each(p, n, half_to_float);
            }
        }
    }
    // The scale of output channel c.
    float scale(int64_t c) const { return by_channel() ? table[c] : 1.0f; }
    // Those of the n channels from c on.
    vf scales(int64_t c, int64_t n) const {
        if (!by_channel()) return set1(1.0f);
        return n == W ? load(table + c) : load_part(table + c, n);
    }

private:
    bool by_channel() const { return table && (dtype == Dtype::i8 || dtype == Dtype::f32); }

    template <class T, class F>
    static inline __attribute__((always_inline)) vf each(const T* p, int64_t n, F&& f) {
        vf v = {};
        for (int i = 0; i < W; ++i)
            if (i < n) v[i] = f(p[i]);
        return v;
    }
};

static inline Values values_of(const Call& call, int weight, int table) {
    return {call.at<const void>(weight), call.at<const float>(table), call.tensor(weight).dtype};
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
