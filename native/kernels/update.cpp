// SGD and Adam as torch.optim has them, and their forms with 8-bit state as src/tinytl/engine/block_update.py.
#include "block_code.hpp"
#include "elementwise.hpp"
#include "kernels.hpp"

namespace tinytl {
namespace TINYTL_ISA {
namespace {

inline vf root(vf x) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return reinterpret_cast<vf>(_mm512_maskz_sqrt_ps(0xFFFF, reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
    return reinterpret_cast<vf>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#else
    vf y;
    for (int i = 0; i < W; ++i) y[i] = __builtin_sqrtf(x[i]);
    return y;
#endif
}

// What is the same for every value of one step of Adam.
struct AdamStep {
    float weight_decay, beta1, beta2, rest1, rest2, eps, factor, root_bias2;

    explicit AdamStep(const Call& call) {
        const double b1 = call.attribute(1), b2 = call.attribute(2), step = static_cast<double>(call.step.step);
        weight_decay = static_cast<float>(call.attribute(0));
        beta1 = static_cast<float>(b1), beta2 = static_cast<float>(b2);
        rest1 = static_cast<float>(1 - b1), rest2 = static_cast<float>(1 - b2);
        eps = static_cast<float>(call.attribute(3));
        factor = static_cast<float>(call.step.lr / (1 - __builtin_pow(b1, step)));
        root_bias2 = static_cast<float>(1 / __builtin_sqrt(1 - __builtin_pow(b2, step)));
    }
    // The new parameter; m and v change.
    vf operator()(vf p, vf g, vf& m, vf& v) const {
        if (weight_decay != 0) g += weight_decay * p;
        m = beta1 * m + rest1 * g;
        v = beta2 * v + rest2 * (g * g);
        return p - factor * (m / (root(v) * root_bias2 + eps));
    }
};

// n values of a block as numbers, 0 behind them.
inline void decode(const uint8_t* codes, float scale, int64_t n, const BlockCode& code, float* values) {
    for (int64_t i = 0; i < n; ++i) values[i] = code.values[codes[i]] * scale;
    for (int64_t i = n; i < code_block; ++i) values[i] = 0;
}

// The reverse. A block that holds NaN or infinity is decoded to such.
inline void encode(const float* values, uint8_t* codes, float* scale, int64_t n, const BlockCode& code) {
    float largest = 0;
    for (int64_t i = 0; i < n; ++i) {
        const float a = __builtin_fabsf(values[i]);
        if (a > largest || a != a) largest = a;
        if (a != a) break;
    }
    *scale = largest;
    const float by = largest > 0 ? largest : 1.0f;
    for (int64_t i = 0; i < n; ++i) codes[i] = code.nearest(values[i] / by);
}

// body(first, n, block, thread) for each block of values.
template <class Body>
inline void blocks(const Call& call, int64_t values, Body&& body) {
    const int64_t count = (values + code_block - 1) / code_block;
    call.threads.ranges(count, 16, [&](int64_t begin, int64_t end, int) {
        for (int64_t b = begin; b < end; ++b) body(b * code_block, least(code_block, values - b * code_block), b);
    });
}

}  // namespace

void sgd(const Call& call) {
    float* p = call.at<float>(0);
    const float* grad = call.at<const float>(1);
    float* momentum = call.at<float>(2);
    const float decay = static_cast<float>(call.attribute(0)), keep_part = static_cast<float>(call.attribute(1));
    const float lr = static_cast<float>(call.step.lr);
    call.threads.ranges(call.tensor(0).elements, 16384, [&](int64_t begin, int64_t end, int) {
        vectors(end - begin, [&](int64_t i, auto lanes) {
            i += begin;
            const vf was = get(p + i, lanes);
            vf step = get(grad + i, lanes);
            if (decay != 0) step += decay * was;
            if (momentum) {
                step = keep_part * get(momentum + i, lanes) + step;
                put(momentum + i, step, lanes);
            }
            put(p + i, was - lr * step, lanes);
        });
    });
}

void adam(const Call& call) {
    float *p = call.at<float>(0), *m = call.at<float>(2), *v = call.at<float>(3);
    const float* grad = call.at<const float>(1);
    const AdamStep step(call);
    call.threads.ranges(call.tensor(0).elements, 16384, [&](int64_t begin, int64_t end, int) {
        vectors(end - begin, [&](int64_t i, auto lanes) {
            i += begin;
            vf first = get(m + i, lanes), second = get(v + i, lanes);
            put(p + i, step(get(p + i, lanes), get(grad + i, lanes), first, second), lanes);
            put(m + i, first, lanes);
            put(v + i, second, lanes);
        });
    });
}

void sgd8(const Call& call) {
    float *p = call.at<float>(0), *scales = call.at<float>(3);
    const float* grad = call.at<const float>(1);
    uint8_t* codes = call.at<uint8_t>(2);
    const float decay = static_cast<float>(call.attribute(0)), keep_part = static_cast<float>(call.attribute(1));
    const float lr = static_cast<float>(call.step.lr);
    blocks(call, call.tensor(0).elements, [&](int64_t first, int64_t n, int64_t block) {
        float momentum[code_block];
        decode(codes + first, scales[block], n, signed_code, momentum);
        vectors(n, [&](int64_t i, auto lanes) {
            const vf was = get(p + first + i, lanes);
            vf step = get(grad + first + i, lanes);
            if (decay != 0) step += decay * was;
            step = keep_part * get(momentum + i, lanes) + step;
            put(momentum + i, step, lanes);
            put(p + first + i, was - lr * step, lanes);
        });
        encode(momentum, codes + first, scales + block, n, signed_code);
    });
}

void adam8(const Call& call) {
    float *p = call.at<float>(0), *m_scales = call.at<float>(3), *v_scales = call.at<float>(5);
    const float* grad = call.at<const float>(1);
    uint8_t *m_codes = call.at<uint8_t>(2), *v_codes = call.at<uint8_t>(4);
    const AdamStep step(call);
    blocks(call, call.tensor(0).elements, [&](int64_t first, int64_t n, int64_t block) {
        float m[code_block], v[code_block];
        decode(m_codes + first, m_scales[block], n, signed_code, m);
        decode(v_codes + first, v_scales[block], n, unsigned_code, v);
        vectors(n, [&](int64_t i, auto lanes) {
            vf mean = get(m + i, lanes), square = get(v + i, lanes);
            put(p + first + i, step(get(p + first + i, lanes), get(grad + first + i, lanes), mean, square), lanes);
            put(m + i, mean, lanes);
            put(v + i, square, lanes);
        });
        encode(m, m_codes + first, m_scales + block, n, signed_code);
        encode(v, v_codes + first, v_scales + block, n, unsigned_code);
    });
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
