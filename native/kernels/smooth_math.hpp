// exp, tanh and erf of vectors of floats, to within two units in the last place (erf's complement: 1e-7 absolute).
//
// The polynomials are weighted Chebyshev fits, iterated towards the smallest greatest error, made for these intervals.
#pragma once

#include "simd.hpp"

namespace tinytl {
namespace TINYTL_ISA {

static inline vf absolute(vf x) {
    return reinterpret_cast<vf>(reinterpret_cast<vi>(x) & (vi{} + 0x7FFFFFFF));
}
static inline vf with_sign_of(vf magnitude, vf x) {
    const vi sign = vi{} + static_cast<int32_t>(0x80000000u);
    return reinterpret_cast<vf>((reinterpret_cast<vi>(magnitude) & ~sign) | (reinterpret_cast<vi>(x) & sign));
}

// exp(x) = 2^n (1 + p): n and p, |x - n log 2| <= log(2) / 2. NaN stays in p.
static inline vf reduced_exp(vf x, vi* n) {
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, in the lowest bits
    const vf shifted = x * 1.44269504f + magic;
    *n = reinterpret_cast<vi>(shifted) - 0x4B400000;
    const vf whole = shifted - magic;
    const vf r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // log 2 in two parts
    vf q = 1.97902487e-4f * r + 1.39447592e-3f;
    q = q * r + 8.33349767e-3f;
    q = q * r + 4.16662936e-2f;
    q = q * r + 1.66666659e-1f;
    q = q * r + 0.5f;
    return q * r * r + r;
}

static inline vf exp(vf x) {
    vi n;
    const vf p = reduced_exp(min(set1(89.0f), max(set1(-104.0f), x)), &n);  // beyond: infinity and 0
    const vi half = n >> 1;  // 2^n in two factors, as n may be outside a float's exponents
    const vf first = reinterpret_cast<vf>((half + 127) << 23), second = reinterpret_cast<vf>((n - half + 127) << 23);
    return (p + 1.0f) * first * second;
}

// exp(x) - 1 for x <= 0.
static inline vf expm1_below_zero(vf x) {
    vi n;
    const vf p = reduced_exp(max(set1(-30.0f), x), &n);
    const vf power = reinterpret_cast<vf>((n + 127) << 23);
    return power * p + (power - 1.0f);
}

static inline vf tanh(vf x) {
    const vf a = absolute(x), z = x * x;
    vf p = -5.90586e-3f * z + 2.080538e-2f;
    p = p * z - 5.378668e-2f;
    p = p * z + 1.3331958e-1f;
    p = p * z - 3.3333299e-1f;
    const vf near = x + x * z * p;
    const vf far = with_sign_of(1.0f - 2.0f / (exp(2.0f * a) + 1.0f), x);
    return a < 0.6f ? near : far;
}

static inline vf erf(vf x) {
    const vf a = absolute(x), z = x * x;
    vf p = 7.85385770e-5f * z - 8.01019252e-4f;
    p = p * z + 5.18832756e-3f;
    p = p * z - 2.68538119e-2f;
    p = p * z + 1.12835851e-1f;
    p = p * z - 3.76126258e-1f;
    p = p * z + 1.12837917f;
    const vf near = x * p;
    const vf t = min(set1(4.05f), a);  // log(1 - erf(t)) from here on
    vf q = -2.16868139e-5f * t + 4.41335901e-4f;
    q = q * t - 4.20455923e-3f;
    q = q * t + 2.52082487e-2f;
    q = q * t - 1.08418563e-1f;
    q = q * t - 6.33219908e-1f;
    q = q * t - 1.12957842f;
    q = q * t + 1.88038176e-4f;
    const vf far = with_sign_of(1.0f - exp(q), x);
    return a < 0.99f ? near : far;
}

static inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

}  // namespace TINYTL_ISA
}  // namespace tinytl
