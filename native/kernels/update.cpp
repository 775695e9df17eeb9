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

// The largest magnitude of a block, NaN where one is among them: as whole numbers, the bits of floats above 0 are in
// their order, and those of NaN behind them all.
struct Largest {
    vi bits = {};

    void operator()(vf values) {
        const vi size = reinterpret_cast<vi>(values) & 0x7FFFFFFF;
        bits = size > bits ? size : bits;
    }
    float value() const {
        int32_t most = 0;
        for (int i = 0; i < W; ++i) most = most < bits[i] ? bits[i] : most;
        float f;
        std::memcpy(&f, &most, sizeof f);
        return f;
    }
};

// n numbers as codes. A block that holds NaN or infinity is decoded to such.
template <bool Signed>
inline void encode(const float* values, const Largest& largest, const BlockCode<Signed>& code, int64_t n,
                   uint8_t* codes, float* scale) {
    *scale = largest.value();
    const float by = *scale > 0 ? *scale : 1.0f;
    vectors(n, [&](int64_t i, auto lanes) { put_bytes(codes + i, code.nearest(get(values + i, lanes) / by), lanes); });
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
        Largest largest;
        const float scale = scales[block];
        vectors(n, [&](int64_t i, auto lanes) {
            const vf was = get(p + first + i, lanes);
            vf step = get(grad + first + i, lanes);
            if (decay != 0) step += decay * was;
            step = keep_part * (signed_code.decode(get_bytes(codes + first + i, lanes)) * scale) + step;
            put(momentum + i, step, lanes);
            largest(get(momentum + i, lanes));
            put(p + first + i, was - lr * step, lanes);
        });
        encode(momentum, largest, signed_code, n, codes + first, scales + block);
    });
}

void adam8(const Call& call) {
    float *p = call.at<float>(0), *m_scales = call.at<float>(3), *v_scales = call.at<float>(5);
    const float* grad = call.at<const float>(1);
    uint8_t *m_codes = call.at<uint8_t>(2), *v_codes = call.at<uint8_t>(4);
    const AdamStep step(call);
    blocks(call, call.tensor(0).elements, [&](int64_t first, int64_t n, int64_t block) {
        float m[code_block], v[code_block];
        Largest m_largest, v_largest;
        const float m_scale = m_scales[block], v_scale = v_scales[block];
        vectors(n, [&](int64_t i, auto lanes) {
            vf mean = signed_code.decode(get_bytes(m_codes + first + i, lanes)) * m_scale;
            vf square = unsigned_code.decode(get_bytes(v_codes + first + i, lanes)) * v_scale;
            put(p + first + i, step(get(p + first + i, lanes), get(grad + first + i, lanes), mean, square), lanes);
            put(m + i, mean, lanes);
            put(v + i, square, lanes);
            m_largest(get(m + i, lanes));  // nothing from behind the last value
            v_largest(get(v + i, lanes));
        });
        encode(m, m_largest, signed_code, n, m_codes + first, m_scales + block);
        encode(v, v_largest, unsigned_code, n, v_codes + first, v_scales + block);
    });
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
