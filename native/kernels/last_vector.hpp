// The last vector of a tile's columns, of which `n` lanes stand for something. Half as wide a one costs half as much on
// processors that run AVX-512 in two halves, and as much on others.
#pragma once

#include "gemm.hpp"

namespace tinytl {
namespace TINYTL_ISA {

struct Full {
    typedef vf type;
    static vf whole(const float* p) { return tinytl::TINYTL_ISA::load(p); }
    static vf widen(vf v) { return v; }
    static vf load(const float* p, int64_t n) {
        return W == 4 ? tinytl::TINYTL_ISA::load(p) : load_part(p, n);  // of 4: always whole, see `fits_direct`
    }
    static void store(float* p, vf v, int64_t n) {  // AMD's masked stores of AVX2 are slow
        if (n == W) tinytl::TINYTL_ISA::store(p, v);
        else store_part(p, v, n);
    }
};
#if defined(__AVX512F__) && defined(__AVX512BW__)
inline constexpr bool halves = true;
struct Half {
    typedef float type __attribute__((vector_size(W / 2 * sizeof(float))));
    static __mmask8 lanes(int64_t n) { return static_cast<__mmask8>((1u << n) - 1); }
    static type whole(const float* p) { return reinterpret_cast<type>(_mm256_loadu_ps(p)); }
    static vf widen(type v) {  // zeros behind it
        const __m256d low = reinterpret_cast<__m256d>(v);
        return reinterpret_cast<vf>(_mm512_maskz_insertf64x4(0xff, _mm512_setzero_pd(), low, 0));
    }
    static type load(const float* p, int64_t n) { return reinterpret_cast<type>(_mm256_maskz_loadu_ps(lanes(n), p)); }
    static void store(float* p, type v, int64_t n) { _mm256_mask_storeu_ps(p, lanes(n), reinterpret_cast<__m256>(v)); }
};
#else
inline constexpr bool halves = false;
typedef Full Half;
#endif

// Whether half a vector is enough for the last of `width` columns.
static inline bool half_is_enough(int64_t width) { return halves && (width - 1) % W < W / 2; }

}  // namespace TINYTL_ISA
}  // namespace tinytl
