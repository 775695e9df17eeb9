// A vector of floats as doubles: two vectors of half as many lanes, each as wide as the processor's.
#pragma once

#include "simd.hpp"

namespace tinytl {
namespace TINYTL_ISA {

typedef double vd __attribute__((vector_size(W / 2 * sizeof(double))));

struct Doubles {
    vd low = {}, high = {};

    void store_to(double* p) const {
        std::memcpy(p, &low, sizeof low);
        std::memcpy(p + W / 2, &high, sizeof high);
    }
    // Of all lanes, in one order.
    double sum() const {
        const vd both = low + high;
        double total = 0;
        for (int i = 0; i < W / 2; ++i) total += both[i];
        return total;
    }
};

static inline __attribute__((always_inline)) Doubles wide(vf v) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    __m256 low;
    std::memcpy(&low, &v, sizeof low);
    const __m256 high = _mm512_maskz_extractf32x8_ps(0xFF, reinterpret_cast<__m512>(v), 1);
    return {reinterpret_cast<vd>(_mm512_maskz_cvtps_pd(0xFF, low)),
            reinterpret_cast<vd>(_mm512_maskz_cvtps_pd(0xFF, high))};
#elif defined(__AVX2__)
    const __m256 all = reinterpret_cast<__m256>(v);
    return {reinterpret_cast<vd>(_mm256_cvtps_pd(_mm256_castps256_ps128(all))),
            reinterpret_cast<vd>(_mm256_cvtps_pd(_mm256_extractf128_ps(all, 1)))};
#else
    typedef float half __attribute__((vector_size(W / 2 * sizeof(float))));
    half halves[2];
    std::memcpy(halves, &v, sizeof v);
    return {__builtin_convertvector(halves[0], vd), __builtin_convertvector(halves[1], vd)};
#endif
}

// sum += x, and sum += x y: a product of two floats is exact in double.
static inline __attribute__((always_inline)) void accumulate(Doubles& sum, const Doubles& x) {
    sum.low += x.low;
    sum.high += x.high;
}
static inline __attribute__((always_inline)) void accumulate(Doubles& sum, const Doubles& x, const Doubles& y) {
    sum.low += x.low * y.low;
    sum.high += x.high * y.high;
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
