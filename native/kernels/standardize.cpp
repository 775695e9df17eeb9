// Weights standardized filter by filter, and the gradient back to what they were made of.
//
// Sums run in float64, over what values are above their filter's first one: with that taken off, one pass gives a
// variance that is good whatever the mean, and exactly 0 where all values are the same. Filters are divided among
// threads; each is summed by one.
#include "doubles.hpp"
#include "elementwise.hpp"
#include "kernels.hpp"

namespace tinytl {
namespace TINYTL_ISA {
namespace {

// A unit is one filter, whose values lie side by side; of a depthwise weight, whose filters lie side by side, it is W
// filters, a lane each.
struct Filters {
    bool depthwise;
    int64_t count, size;

    explicit Filters(const Call& call) : depthwise(call.attribute(1) != 0) {
        const Tensor& w = call.tensor(0);
        count = depthwise ? w.shape[w.rank - 1] : w.shape[0];
        size = w.elements / count;
    }
    // body(at, lanes) for each vector of the values of a unit: w[at] and on.
    template <class Body>
    inline __attribute__((always_inline)) void values(int64_t unit, Body&& body) const {
        if (!depthwise) return vectors(size, [&](int64_t i, auto lanes) { body(unit * size + i, lanes); });
        const int64_t c = unit * W;
        if (c + W <= count)
            for (int64_t i = 0; i < size; ++i) body(i * count + c, All{});
        else
            for (int64_t i = 0; i < size; ++i) body(i * count + c, Some{count - c});
    }
    // body(unit) for all, divided among threads.
    template <class Body>
    void divided(const Call& call, Body&& body) const {
        const int64_t units = depthwise ? (count + W - 1) / W : count, width = depthwise ? W * size : size;
        divide(call, units, 4 * width, [&](int64_t begin, int64_t end, int) {
            for (int64_t unit = begin; unit < end; ++unit) body(unit);
        });
    }
    // The first value of each lane's filter.
    vf first(const float* w, int64_t unit) const {
        return depthwise ? load_part(w + unit * W, least(W, count - unit * W)) : set1(w[unit * size]);
    }
    int lanes() const { return depthwise ? W : 1; }
    // A sum over the vectors of a unit, as one for each of its filters.
    void finish(const Doubles& sum, double (&of)[W]) const {
        if (depthwise) sum.store_to(of);
        else of[0] = sum.sum();
    }
    // A number of each filter in its lanes.
    vf spread(const double (&x)[W]) const {
        if (!depthwise) return set1(static_cast<float>(x[0]));
        vf v;
        for (int i = 0; i < W; ++i) v[i] = static_cast<float>(x[i]);
        return v;
    }
};

// v, with `other` in the lanes that stand for nothing.
inline vf filled(vf v, vf, All) { return v; }
inline vf filled(vf v, vf other, Some some) { return lanes_of((1u << some.n) - 1) ? v : other; }

inline Doubles minus(const Doubles& a, const Doubles& b) { return {a.low - b.low, a.high - b.high}; }

// A number of each filter, of twice the digits of a float: what is taken off a float keeps that one's digits.
struct Precise {
    vf high, low;

    Precise(const Filters& f, const double (&x)[W]) : high(f.spread(x)) {
        double rest[W];
        for (int i = 0; i < f.lanes(); ++i) rest[i] = x[i] - static_cast<double>(high[i]);
        low = f.spread(rest);
    }
    vf below(vf x) const { return x - high - low; }
};

// Of each filter of a unit: the mean, how much it is above the filter's first value, and the standard deviation.
struct Moments {
    double mean[W], above[W], deviation[W];

    Moments(const Filters& f, const float* w, int64_t unit) {
        const vf first = f.first(w, unit);
        const Doubles pivot = wide(first);
        Doubles sum, squares;
        f.values(unit, [&](int64_t at, auto lanes) {
            const Doubles u = minus(wide(filled(get(w + at, lanes), first, lanes)), pivot);
            accumulate(sum, u);
            accumulate(squares, u, u);
        });
        const double size = static_cast<double>(f.size);
        double square[W];
        f.finish(sum, above);
        f.finish(squares, square);
        for (int i = 0; i < f.lanes(); ++i) {
            above[i] /= size;
            mean[i] = static_cast<double>(first[i]) + above[i];
            const double left = square[i] - above[i] * above[i] * size;
            deviation[i] = __builtin_sqrt((left < 0 ? 0 : left) / (size - 1));  // NaN stays
        }
    }
};

}  // namespace

void standardize(const Call& call) {
    const Filters f(call);
    const float* w = call.at<const float>(0);
    float* y = call.at<float>(1);
    const double eps = call.attribute(0);
    f.divided(call, [&](int64_t unit) {
        const Moments moments(f, w, unit);
        double factors[W];
        for (int i = 0; i < f.lanes(); ++i) factors[i] = 1 / (moments.deviation[i] + eps);
        const Precise mean(f, moments.mean);
        const vf factor = f.spread(factors);
        f.values(unit, [&](int64_t at, auto lanes) { put(y + at, mean.below(get(w + at, lanes)) * factor, lanes); });
    });
}

// With u = w - mean: grad <- (grad - mean grad) / (sigma + eps) - u <grad, u> / ((sigma + eps)^2 sigma (size - 1)).
void standardize_grad(const Call& call) {
    const Filters f(call);
    const float* w = call.at<const float>(0);
    float* grad = call.at<float>(1);
    const double eps = call.attribute(0), size = static_cast<double>(f.size);
    f.divided(call, [&](int64_t unit) {
        const Moments moments(f, w, unit);
        const Doubles pivot = wide(f.first(w, unit));
        Doubles sum, product;
        f.values(unit, [&](int64_t at, auto lanes) {  // behind the last lane grad is 0
            const Doubles g = wide(get(grad + at, lanes));
            accumulate(sum, g);
            accumulate(product, g, minus(wide(get(w + at, lanes)), pivot));
        });
        double means[W], inner[W], factors[W];
        f.finish(sum, means);
        f.finish(product, inner);
        for (int i = 0; i < f.lanes(); ++i) {
            const double sigma = moments.deviation[i];
            factors[i] = 1 / (sigma + eps);
            inner[i] -= means[i] * moments.above[i];
            inner[i] = sigma == 0 ? 0 : inner[i] * factors[i] * factors[i] / (sigma * (size - 1));
            means[i] /= size;
        }
        const Precise mean(f, moments.mean), grad_mean(f, means);
        const vf factor = f.spread(factors), along = f.spread(inner);
        f.values(unit, [&](int64_t at, auto lanes) {
            const vf straight = grad_mean.below(get(grad + at, lanes)) * factor;
            put(grad + at, straight - mean.below(get(w + at, lanes)) * along, lanes);
        });
    });
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
