// Weights and biases made of trained ones by a normalization with frozen statistics folded into a convolution, and the
// gradients that go back to these. Filters are divided among threads; each is summed by one.
#include "weights.hpp"

#include "doubles.hpp"
#include "elementwise.hpp"
#include "kernels.hpp"

namespace tinytl {
namespace TINYTL_ISA {
namespace {

// So many filters of so many values each: side by side, or, of a depthwise weight, `count` apart.
struct Filters {
    int64_t count, size;

    Filters(const Tensor& w, bool depthwise)
        : count(depthwise ? w.shape[w.rank - 1] : w.shape[0]), size(w.elements / count) {}
};

float factor_of(const float* gamma, const float* rstd, int64_t o) { return gamma ? gamma[o] * rstd[o] : rstd[o]; }

}  // namespace

void scale_weight(const Call& call) {
    const bool depthwise = call.attribute(0) != 0;
    const Filters f(call.tensor(0), depthwise);
    const Values w = values_of(call, 0, 1);
    const float *gamma = call.at<const float>(2), *rstd = call.at<const float>(3);
    float* y = call.at<float>(4);
    if (depthwise) {  // rows of one value a channel
        divide(call, f.size, f.count, [&](int64_t begin, int64_t end, int) {
            for (int64_t r = begin; r < end; ++r)
                vectors(f.count, [&](int64_t c, auto lanes) {
                    vf factor = w.scales(c, lanes.n) * get(rstd + c, lanes);
                    if (gamma) factor *= get(gamma + c, lanes);
                    put(y + r * f.count + c, w.at(r * f.count + c, lanes.n) * factor, lanes);
                });
        });
        return;
    }
    divide(call, f.count, f.size, [&](int64_t begin, int64_t end, int) {
        for (int64_t o = begin; o < end; ++o) {
            const float factor = w.scale(o) * factor_of(gamma, rstd, o);
            vectors(f.size, [&](int64_t i, auto lanes) {
                put(y + o * f.size + i, w.at(o * f.size + i, lanes.n) * factor, lanes);
            });
        }
    });
}

// The sums run in float64, in one order: lane by lane, then over the lanes.
void scale_weight_grad(const Call& call) {
    const bool depthwise = call.attribute(0) != 0;
    const Filters f(call.tensor(0), depthwise);
    const Values w = values_of(call, 0, 1);
    const float *gamma = call.at<const float>(2), *rstd = call.at<const float>(3);
    float *grad = call.at<float>(4), *gamma_grad = call.at<float>(5);
    if (depthwise) {  // a filter a lane
        divide(call, (f.count + W - 1) / W, 4 * W * f.size, [&](int64_t begin, int64_t end, int) {
            vectors(least(end * W, f.count) - begin * W, [&](int64_t first, auto lanes) {
                const int64_t c = begin * W + first;
                const vf scales = w.scales(c, lanes.n);
                vf factor = get(rstd + c, lanes);
                if (gamma) factor *= get(gamma + c, lanes);
                Doubles inner;
                for (int64_t i = 0; i < f.size; ++i) {
                    const int64_t at = i * f.count + c;
                    const vf g = get(grad + at, lanes);
                    if (gamma_grad) accumulate(inner, wide(w.at(at, lanes.n) * scales), wide(g));
                    put(grad + at, g * factor, lanes);
                }
                double of[W];
                inner.store_to(of);
                for (int64_t i = 0; gamma_grad && i < lanes.n; ++i)
                    gamma_grad[c + i] += static_cast<float>(of[i] * static_cast<double>(rstd[c + i]));
            });
        });
        return;
    }
    divide(call, f.count, 4 * f.size, [&](int64_t begin, int64_t end, int) {
        for (int64_t o = begin; o < end; ++o) {
            const float factor = factor_of(gamma, rstd, o), scale = w.scale(o);
            Doubles inner;
            vectors(f.size, [&](int64_t i, auto lanes) {
                const int64_t at = o * f.size + i;
                const vf g = get(grad + at, lanes);
                if (gamma_grad) accumulate(inner, wide(w.at(at, lanes.n) * scale), wide(g));
                put(grad + at, g * factor, lanes);
            });
            if (gamma_grad) gamma_grad[o] += static_cast<float>(inner.sum() * static_cast<double>(rstd[o]));
        }
    });
}

void shift_bias(const Call& call) {
    const float *bias = call.at<const float>(0), *gamma = call.at<const float>(1), *beta = call.at<const float>(2);
    const float *mean = call.at<const float>(3), *rstd = call.at<const float>(4);
    float* y = call.at<float>(5);
    for (int64_t c = 0; c < call.tensor(5).elements; ++c)
        y[c] = ((bias ? bias[c] : 0.0f) - mean[c]) * factor_of(gamma, rstd, c) + (beta ? beta[c] : 0.0f);
}

void shift_bias_grad(const Call& call) {
    const float *grad = call.at<const float>(0), *bias = call.at<const float>(1), *gamma = call.at<const float>(2);
    const float *mean = call.at<const float>(3), *rstd = call.at<const float>(4);
    float *bias_grad = call.at<float>(5), *gamma_grad = call.at<float>(6), *beta_grad = call.at<float>(7);
    for (int64_t c = 0; c < call.tensor(0).elements; ++c) {
        if (bias_grad) bias_grad[c] += grad[c] * factor_of(gamma, rstd, c);
        if (gamma_grad) gamma_grad[c] += grad[c] * ((bias ? bias[c] : 0.0f) - mean[c]) * rstd[c];
        if (beta_grad) beta_grad[c] += grad[c];
    }
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
