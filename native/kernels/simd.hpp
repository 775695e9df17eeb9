// Vectors of floats as wide as the processor has them, by GCC's and Clang's vector extensions.
//
// Every file of kernels is compiled once for each instruction set, with TINYTL_ISA naming it (avx512, avx2, neon,
// plain): all of its code lives in namespace tinytl::TINYTL_ISA, and kernels/dispatch.cpp chooses among them when a
// program is opened. Such a file must not define anything outside that namespace, nor use library templates that could
// be emitted out of line: the linker would keep one copy for all.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef TINYTL_ISA
#define TINYTL_ISA plain
#endif

namespace tinytl {
namespace TINYTL_ISA {

#if defined(__AVX512F__) && defined(__AVX512BW__)
inline constexpr int W = 16;
#elif defined(__AVX2__)
inline constexpr int W = 8;
#else
inline constexpr int W = 4;  // NEON and SSE2; the compiler splits it where there is neither
#endif

typedef float vf __attribute__((vector_size(W * sizeof(float))));
typedef int32_t vi __attribute__((vector_size(W * sizeof(int32_t))));

static inline vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
static inline vf set1(float x) { return x - vf{}; }
#if defined(__AVX2__) && !defined(__AVX512F__)
static inline __m256i first_lanes(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif
// The first n of W values (0 <= n <= W); 0 behind them. Nothing behind them is touched.
static inline vf load_part(const float* p, int64_t n) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return reinterpret_cast<vf>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p));
#elif defined(__AVX2__)
    return reinterpret_cast<vf>(_mm256_maskload_ps(p, first_lanes(n)));
#else
    vf v = {};
    for (int64_t i = 0; i < n; ++i) v[i] = p[i];
    return v;
#endif
}
static inline void store_part(float* p, vf v, int64_t n) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), reinterpret_cast<__m512>(v));
#elif defined(__AVX2__)
    _mm256_maskstore_ps(p, first_lanes(n), reinterpret_cast<__m256>(v));
#else
    for (int64_t i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// A line that will be written to soon: another core may have written there last, and has to give it up.
static inline __attribute__((always_inline)) void fetch_to_write(const float* p) { __builtin_prefetch(p, 1); }

// So many parts of some rows, an even number where it is more than one: half of the parts are then half of the rows,
// whatever the instruction, and a thread's rows those that it wrote before.
static inline int64_t even_parts(int64_t parts) { return parts > 1 ? parts & ~int64_t{1} : parts; }

static inline vf max(vf a, vf b) { return a > b ? a : b; }  // b where either is NaN
static inline vf min(vf a, vf b) { return a < b ? a : b; }

// W bits, lowest first: 1 where the lane of `m` (the result of a comparison: 0 or -1) is set.
static inline uint32_t bits_of(vi m) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return _mm512_movepi32_mask(reinterpret_cast<__m512i>(m));
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(m)));
#else
    uint32_t bits = 0;
    for (int i = 0; i < W; ++i) bits |= (m[i] ? 1u : 0u) << i;
    return bits;
#endif
}
// The reverse.
static inline vi lanes_of(uint32_t bits) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return reinterpret_cast<vi>(_mm512_movm_epi32(static_cast<__mmask16>(bits)));
#else
    vi one;
    for (int i = 0; i < W; ++i) one[i] = 1 << i;
    return ((vi{} + static_cast<int32_t>(bits)) & one) != 0;
#endif
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
