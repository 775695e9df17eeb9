// Weights and biases made of trained ones, and the gradients that go back to these: standardization, and a
// normalization with frozen statistics folded into a convolution. Filters are divided among threads; each is summed by
// one.
#include "weights.hpp"

#include "elementwise.hpp"
#include "kernels.hpp"

namespace tinytl {
namespace TINYTL_ISA {
namespace {

// Where the values of filter o lie: `size` of them from o first on, `step` apart.
struct Filters {
    int64_t count, size, step, first;

    Filters(const Tensor& w, bool depthwise) {
        count = depthwise ? w.shape[w.rank - 1] : w.shape[0];
        size = w.elements / count;
        step = depthwise ? count : 1;
        first = depthwise ? 1 : size;
    }
    int64_t at(int64_t o, int64_t i) const { return o * first + i * step; }
};

typedef double vd __attribute__((vector_size(W * sizeof(double))));

// Sum over a filter of term(i, T{}), in doubles, for T = vd of W values from i on, and for T = double of one.
template <class Term>
double sum_of(const Filters& f, Term term) {
    double sum = 0;
    int64_t i = 0;
    if (f.step == 1) {
        vd lanes = {};
        for (; i + W <= f.size; i += W) lanes += term(i, vd{});
        for (int lane = 0; lane < W; ++lane) sum += lanes[lane];
    }
    for (; i < f.size; ++i) sum += term(i, 0.0);
    return sum;
}

// Values of filter o from value i on: W of them where its values lie side by side, or one.
inline vd values(const float* w, const Filters& f, int64_t o, int64_t i, vd) {
    return __builtin_convertvector(load(w + f.at(o, i)), vd);
}
inline double values(const float* w, const Filters& f, int64_t o, int64_t i, double) {
    return static_cast<double>(w[f.at(o, i)]);
}

// Mean of a filter, and the sum of squares around it.
struct Spread {
    double mean, squares;

    Spread(const float* w, const Filters& f, int64_t o) {
        mean = sum_of(f, [&](int64_t i, auto kind) { return values(w, f, o, i, kind); }) / static_cast<double>(f.size);
        squares = sum_of(f, [&](int64_t i, auto kind) {
            const auto u = values(w, f, o, i, kind) - mean;
            return u * u;
        });
    }
    double deviation(const Filters& f) const { return __builtin_sqrt(squares / static_cast<double>(f.size - 1)); }
};

float factor_of(const float* gamma, const float* rstd, int64_t o) { return gamma ? gamma[o] * rstd[o] : rstd[o]; }

// One value of a weight of any type.
double value_at(const Values& w, int64_t i, int64_t o) { return static_cast<double>(w.at(i, 1)[0] * w.scale(o)); }

}  // namespace

void standardize(const Call& call) {
    const Filters f(call.tensor(0), call.attribute(1) != 0);
    const float* w = call.at<const float>(0);
    float* y = call.at<float>(1);
    const double eps = call.attribute(0);
    divide(call, f.count, 4 * f.size, [&](int64_t begin, int64_t end, int) {
        for (int64_t o = begin; o < end; ++o) {
            const Spread spread(w, f, o);
            const double factor = 1 / (spread.deviation(f) + eps);
            int64_t i = 0;
            for (; f.step == 1 && i + W <= f.size; i += W)
                store(y + f.at(o, i), __builtin_convertvector((values(w, f, o, i, vd{}) - spread.mean) * factor, vf));
            for (; i < f.size; ++i)
                y[f.at(o, i)] = static_cast<float>((values(w, f, o, i, 0.0) - spread.mean) * factor);
        }
    });
}

// With u = w - mean: grad <- (grad - mean grad) / (sigma + eps) - u <grad, u> / ((sigma + eps)^2 sigma (size - 1)).
void standardize_grad(const Call& call) {
    const Filters f(call.tensor(0), call.attribute(1) != 0);
    const float* w = call.at<const float>(0);
    float* grad = call.at<float>(1);
    const double eps = call.attribute(0), size = static_cast<double>(f.size);
    divide(call, f.count, 4 * f.size, [&](int64_t begin, int64_t end, int) {
        for (int64_t o = begin; o < end; ++o) {
            const Spread spread(w, f, o);
            const double sigma = spread.deviation(f), factor = 1 / (sigma + eps);
            const double mean = sum_of(f, [&](int64_t i, auto kind) { return values(grad, f, o, i, kind); }) / size;
            const double inner = sum_of(f, [&](int64_t i, auto kind) {
                return values(grad, f, o, i, kind) * (values(w, f, o, i, kind) - spread.mean);
            });
            const double along = sigma == 0 ? 0 : inner * factor * factor / (sigma * (size - 1));
            for (int64_t i = 0; i < f.size; ++i) {
                const double u = static_cast<double>(w[f.at(o, i)]) - spread.mean;
                float& g = grad[f.at(o, i)];
                g = static_cast<float>((static_cast<double>(g) - mean) * factor - u * along);
            }
        }
    });
}

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

void scale_weight_grad(const Call& call) {
    const Filters f(call.tensor(0), call.attribute(0) != 0);
    const Values w = values_of(call, 0, 1);
    const float *gamma = call.at<const float>(2), *rstd = call.at<const float>(3);
    float *grad = call.at<float>(4), *gamma_grad = call.at<float>(5);
    divide(call, f.count, 4 * f.size, [&](int64_t begin, int64_t end, int) {
        for (int64_t o = begin; o < end; ++o) {
            if (gamma_grad) {
                double inner = 0;
                for (int64_t i = 0; i < f.size; ++i)
                    inner += value_at(w, f.at(o, i), o) * static_cast<double>(grad[f.at(o, i)]);
                gamma_grad[o] += static_cast<float>(inner * static_cast<double>(rstd[o]));
            }
            const float factor = factor_of(gamma, rstd, o);
            for (int64_t i = 0; i < f.size; ++i) grad[f.at(o, i)] *= factor;
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
