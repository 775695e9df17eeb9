// Bytes as lanes and back, and tables that are looked up lane by lane.
#pragma once

#include "elementwise.hpp"

namespace tinytl {
namespace TINYTL_ISA {

// W bytes as numbers from 0 to 255.
static inline vi load_bytes(const uint8_t* p) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return reinterpret_cast<vi>(_mm512_maskz_cvtepu8_epi32(0xFFFF, bytes));
#elif defined(__AVX2__)
    return reinterpret_cast<vi>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    vi v;
    for (int i = 0; i < W; ++i) v[i] = p[i];
    return v;
#endif
}
// The reverse.
static inline void store_bytes(uint8_t* p, vi v) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    const __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xFFFF, reinterpret_cast<__m512i>(v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
#elif defined(__AVX2__)
    const __m256i words = reinterpret_cast<__m256i>(v);
    const __m128i pairs = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(pairs, pairs));
#else
    for (int i = 0; i < W; ++i) p[i] = static_cast<uint8_t>(v[i]);
#endif
}

// As many of them as there are lanes; 0 behind them.
static inline vi get_bytes(const uint8_t* p, All) { return load_bytes(p); }
static inline vi get_bytes(const uint8_t* p, Some some) {
    uint8_t bytes[W] = {};
    for (int64_t i = 0; i < some.n; ++i) bytes[i] = p[i];
    return load_bytes(bytes);
}
static inline void put_bytes(uint8_t* p, vi v, All) { store_bytes(p, v); }
static inline void put_bytes(uint8_t* p, vi v, Some some) {
    uint8_t bytes[W];
    store_bytes(bytes, v);
    for (int64_t i = 0; i < some.n; ++i) p[i] = bytes[i];
}

// table[index] for each lane; N is a power of two from 8 on, 0 <= index < N. With AVX-512 from registers, 32 entries an
// instruction and a choice among their results by each further bit of the index, since gathers are slow on many
// processors.
template <int N>
static inline __attribute__((always_inline)) vf lookup(const float* table, vi index) {
    static_assert(N >= 8 && (N & (N - 1)) == 0, "a power of two");
#if defined(__AVX512F__) && defined(__AVX512BW__)
    const __m512i at = reinterpret_cast<__m512i>(index);
    if constexpr (N == 8) {
        const __m512 all = _mm512_castps256_ps512(_mm256_loadu_ps(table));
        return reinterpret_cast<vf>(_mm512_maskz_permutexvar_ps(0xFFFF, at, all));
    } else if constexpr (N == 16) {
        return reinterpret_cast<vf>(_mm512_maskz_permutexvar_ps(0xFFFF, at, reinterpret_cast<__m512>(load(table))));
    } else if constexpr (N == 32) {
        const __m512 low = reinterpret_cast<__m512>(load(table)), high = reinterpret_cast<__m512>(load(table + 16));
        return reinterpret_cast<vf>(_mm512_permutex2var_ps(low, at, high));
    } else {
        const __m512 low = reinterpret_cast<__m512>(lookup<N / 2>(table, index));
        const __m512 high = reinterpret_cast<__m512>(lookup<N / 2>(table + N / 2, index));
        const __mmask16 upper = _mm512_test_epi32_mask(at, _mm512_set1_epi32(N / 2));
        return reinterpret_cast<vf>(_mm512_mask_blend_ps(upper, low, high));
    }
#elif defined(__AVX2__)
    const __m256i at = reinterpret_cast<__m256i>(index);
    if constexpr (N == 8) return reinterpret_cast<vf>(_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), at));
    return reinterpret_cast<vf>(_mm256_i32gather_ps(table, at, 4));
#else
    vf v;
    for (int i = 0; i < W; ++i) v[i] = table[index[i]];
    return v;
#endif
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
