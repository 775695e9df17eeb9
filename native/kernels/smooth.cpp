// The activations whose derivative bends with the input, and their gradients, with PyTorch's values at the kinks. What
// each of them is stands in src/tinytl/ops/smooth_activation.py.
#include "smooth_math.hpp"

#include "elementwise.hpp"
#include "kernels.hpp"

namespace tinytl {
namespace TINYTL_ISA {
namespace {

enum Kind { hard_swish, hard_sigmoid, silu, gelu, gelu_tanh, logistic, hyperbolic, mish, elu };

constexpr float root_half = 0.70710678f, root_two_over_pi = 0.79788456f, one_over_root_two_pi = 0.39894228f;

inline vf ramp(vf x) { return min(set1(1.0f), max(set1(0.0f), x * (1.0f / 6.0f) + 0.5f)); }
inline vf gelu_inner(vf x) { return root_two_over_pi * (x + 0.044715f * x * x * x); }

// tanh(log(1 + exp(x))) = n / (n + 2), n = exp(x) (exp(x) + 2); above 20 it is 1.
inline vf mish_n(vf x) {
    const vf e = exp(min(set1(20.0f), x));
    return e * (e + 2.0f);
}

struct HardSwish {
    vf f(vf x, float) const { return x * ramp(x); }
    vf back(vf g, vf x, float) const {
        const vf inside = g * (x * (1.0f / 3.0f) + 0.5f);
        return x <= -3.0f ? vf{} : x >= 3.0f ? g : inside;
    }
};
struct HardSigmoid {
    vf f(vf x, float) const { return ramp(x); }
    vf back(vf g, vf x, float) const { return (x > -3.0f) & (x < 3.0f) ? g * (1.0f / 6.0f) : vf{}; }
};
struct Silu {
    vf f(vf x, float) const { return x * sigmoid(x); }
    vf back(vf g, vf x, float) const {
        const vf s = sigmoid(x);
        return g * s * (1.0f + x * (1.0f - s));
    }
};
struct Gelu {
    vf f(vf x, float) const { return 0.5f * x * (1.0f + erf(x * root_half)); }
    vf back(vf g, vf x, float) const {
        return g * (0.5f * (1.0f + erf(x * root_half)) + x * one_over_root_two_pi * exp(-0.5f * x * x));
    }
};
struct GeluTanh {
    vf f(vf x, float) const { return 0.5f * x * (1.0f + tanh(gelu_inner(x))); }
    vf back(vf g, vf x, float) const {
        const vf t = tanh(gelu_inner(x)), inner = root_two_over_pi * (1.0f + 3.0f * 0.044715f * x * x);
        return g * (0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * inner);
    }
};
struct Sigmoid {
    vf f(vf x, float) const { return sigmoid(x); }
    vf back(vf g, vf x, float) const {
        const vf s = sigmoid(x);
        return g * (1.0f - s) * s;
    }
};
struct Tanh {
    vf f(vf x, float) const { return tanh(x); }
    vf back(vf g, vf x, float) const {
        const vf t = tanh(x);
        return g * (1.0f - t * t);
    }
};
struct Mish {
    vf f(vf x, float) const {
        const vf n = mish_n(x);
        return x * (n / (n + 2.0f));
    }
    vf back(vf g, vf x, float) const {
        const vf n = mish_n(x), d = n + 2.0f;
        return g * (n / d + x * sigmoid(x) * (4.0f * (n + 1.0f) / (d * d)));
    }
};
struct Elu {
    vf f(vf x, float alpha) const {
        const vf below = alpha * expm1_below_zero(min(set1(0.0f), x));
        return x > 0.0f ? x : below;
    }
    vf back(vf g, vf x, float alpha) const {
        const vf below = g * alpha * exp(min(set1(0.0f), x));
        return x > 0.0f ? g : below;
    }
};

// body(kind) with the functions of the instruction's kind.
template <class Body>
inline void with_kind(const Call& call, Body&& body) {
    switch (static_cast<Kind>(static_cast<int>(call.attribute(0)))) {
        case hard_swish: return body(HardSwish{});
        case hard_sigmoid: return body(HardSigmoid{});
        case silu: return body(Silu{});
        case gelu: return body(Gelu{});
        case gelu_tanh: return body(GeluTanh{});
        case logistic: return body(Sigmoid{});
        case hyperbolic: return body(Tanh{});
        case mish: return body(Mish{});
        case elu: return body(Elu{});
    }
}

}  // namespace

void smooth(const Call& call) {
    const float* x = call.at<const float>(0);
    float* y = call.at<float>(1);
    const float alpha = static_cast<float>(call.attribute(1));
    with_kind(call, [&](auto kind) {
        call.threads.ranges(call.images * call.tensor(1).elements, 4096, [&](int64_t begin, int64_t end, int) {
            vectors(end - begin, [&](int64_t i, auto lanes) {
                put(y + begin + i, kind.f(get(x + begin + i, lanes), alpha), lanes);
            });
        });
    });
}

void smooth_grad(const Call& call) {
    const float *grad = call.at<const float>(0), *x = call.at<const float>(1);
    float* y = call.at<float>(2);
    const float alpha = static_cast<float>(call.attribute(1));
    with_kind(call, [&](auto kind) {
        call.threads.ranges(call.images * call.tensor(2).elements, 4096, [&](int64_t begin, int64_t end, int) {
            vectors(end - begin, [&](int64_t i, auto lanes) {
                const int64_t at = begin + i;
                put(y + at, kind.back(get(grad + at, lanes), get(x + at, lanes), alpha), lanes);
            });
        });
    });
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
