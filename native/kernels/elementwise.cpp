// Ops that work pixel by pixel, and the sums over pixels that go with their gradients.
#include "elementwise.hpp"

#include "kernels.hpp"

namespace tinytl {
namespace TINYTL_ISA {
namespace {

// Rows and their length for a loop over elements whose bits, if there are any, follow one another without a gap: pixels
// and channels, or pieces of a length that is a multiple of 8 where each pixel's bits fill whole bytes.
struct Shape {
    int64_t rows, width;
};
Shape shape_of(const Call& call, const Tensor& y, bool by_channel) {
    const int64_t channels = channels_of(y), elements = (y.scope == Scope::fixed ? 1 : call.images) * y.elements;
    if (!by_channel && channels % 8 == 0 && elements % 512 == 0) return {elements / 512, 512};
    return {elements / channels, channels};
}

// y = act(z(at, c, lanes)) and its mask, for all elements; `at` counts over all images.
template <class Z>
inline void activated(const Call& call, const Shape& shape, float* y, uint8_t* mask, int act, Z&& z) {
    const Activation activation(call, act);
    const int64_t width = shape.width, bits = mask_bytes(width);
    divide(call, shape.rows, width, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r)
            vectors(width, [&](int64_t c, auto lanes) {
                const vf v = z(r * width + c, c, lanes);
                if (mask) put_bits(mask + r * bits, c, lanes.n, activation.bits(v));
                put(y + r * width + c, activation(v), lanes);
            });
    });
}

}  // namespace

void normalize(const Call& call) {
    const uint8_t* x = call.at<const uint8_t>(0);
    const float *scale = call.at<const float>(1), *shift = call.at<const float>(2);
    float* y = call.at<float>(3);
    const int64_t channels = channels_of(call.tensor(3)), pixels = call.images * pixels_of(call.tensor(3));
    typedef uint8_t vb __attribute__((vector_size(W)));
    // W pixels are `channels` whole vectors, which repeat their factors.
    const int64_t period = channels * W, half = scratch_per_thread / 2;
    const bool repeat = period * int64_t(sizeof(float)) <= half;
    divide(call, pixels, channels, [&](int64_t begin, int64_t end, int thread) {
        float* factors = reinterpret_cast<float*>(call.scratch_of(thread));
        float* terms = reinterpret_cast<float*>(call.scratch_of(thread) + half);
        int64_t i = begin * channels;
        const int64_t last = end * channels;
        if (repeat) {
            for (int64_t k = 0; k < period; ++k) factors[k] = scale[k % channels], terms[k] = shift[k % channels];
            for (; i + period <= last; i += period)
                for (int64_t k = 0; k < period; k += W) {
                    vb bytes;
                    std::memcpy(&bytes, x + i + k, sizeof bytes);
                    store(y + i + k, __builtin_convertvector(bytes, vf) * load(factors + k) + load(terms + k));
                }
        }
        for (; i < last; ++i) y[i] = static_cast<float>(x[i]) * scale[i % channels] + shift[i % channels];
    });
}

void affine(const Call& call) {
    const float *x = call.at<const float>(0), *scale = call.at<const float>(1), *shift = call.at<const float>(2);
    const Shape shape = shape_of(call, call.tensor(3), true);
    activated(call, shape, call.at<float>(3), call.at<uint8_t>(4), 0, [=](int64_t at, int64_t c, auto lanes) {
        const vf v = get(x + at, lanes) * get(scale + c, lanes);
        return shift ? v + get(shift + c, lanes) : v;
    });
}

void affine_grad(const Call& call) {
    const float *grad = call.at<const float>(0), *scale = call.at<const float>(1);
    float* y = call.at<float>(2);
    const Shape shape = shape_of(call, call.tensor(2), true);
    divide(call, shape.rows, shape.width, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r)
            vectors(shape.width, [&](int64_t c, auto lanes) {
                const int64_t at = r * shape.width + c;
                put(y + at, get(grad + at, lanes) * get(scale + c, lanes), lanes);
            });
    });
}

void activation(const Call& call) {
    const float* x = call.at<const float>(0);
    const Shape shape = shape_of(call, call.tensor(1), false);
    activated(call, shape, call.at<float>(1), call.at<uint8_t>(2), 0,
              [=](int64_t at, int64_t, auto lanes) { return get(x + at, lanes); });
}

void add(const Call& call) {
    const float *a = call.at<const float>(0), *b = call.at<const float>(1);
    const Shape shape = shape_of(call, call.tensor(2), false);
    activated(call, shape, call.at<float>(2), call.at<uint8_t>(3), 0,
              [=](int64_t at, int64_t, auto lanes) { return get(a + at, lanes) + get(b + at, lanes); });
}

void copy(const Call& call) {
    const char* x = call.at<const char>(0);
    char* y = call.at<char>(1);
    const int64_t bytes = call.tensor(1).image_bytes * (call.tensor(1).scope == Scope::fixed ? 1 : call.images);
    if (x == y) return;
    divide(call, bytes, 1, [&](int64_t begin, int64_t end, int) {
        std::memcpy(y + begin, x + begin, static_cast<size_t>(end - begin));
    });
}

void zero(const Call& call) {
    char* x = call.at<char>(0);
    const int64_t bytes = call.tensor(0).image_bytes * (call.tensor(0).scope == Scope::fixed ? 1 : call.images);
    divide(call, bytes, 1,
           [&](int64_t begin, int64_t end, int) { std::memset(x + begin, 0, static_cast<size_t>(end - begin)); });
}

void act_grad(const Call& call) {
    const float* grad = call.at<const float>(0);
    const uint8_t* mask = call.at<const uint8_t>(1);
    float *y = call.at<float>(2), *bias = call.at<float>(3);
    const float slope = static_cast<float>(call.attribute(0));
    const auto one = [=](int64_t row, int64_t width, int64_t bits, int64_t c, auto lanes) {
        const int64_t at = row * width + c;
        const vf v = pass(get(grad + at, lanes), get_bits(mask + row * bits, c, lanes.n), slope);
        put(y + at, v, lanes);
        return v;
    };
    const Shape shape = shape_of(call, call.tensor(2), bias != nullptr);
    const int64_t width = shape.width, bits = mask_bytes(width);
    if (!bias) {
        divide(call, shape.rows, width, [&](int64_t begin, int64_t end, int) {
            for (int64_t r = begin; r < end; ++r)
                vectors(width, [&](int64_t c, auto lanes) { one(r, width, bits, c, lanes); });
        });
        return;
    }
    sum_rows<float, 1>(
        call, shape.rows, width,
        [&](int64_t begin, int64_t end, int64_t c, int64_t n, float* sums) {
            sum_part(begin, end, c, n, sums,
                     [&](int64_t r, int64_t at, auto lanes) { return one(r, width, bits, at, lanes); });
        },
        [&](int64_t c, int64_t n, const float* sums) {
            for (int64_t i = 0; i < n; ++i) bias[c + i] += sums[i];
        });
}

void bias_grad(const Call& call) {
    const float* grad = call.at<const float>(0);
    float* bias = call.at<float>(1);
    const int64_t channels = channels_of(call.tensor(0));
    sum_rows<float, 1>(
        call, call.images * pixels_of(call.tensor(0)), channels,
        [&](int64_t begin, int64_t end, int64_t c, int64_t n, float* sums) {
            sum_part(begin, end, c, n, sums,
                     [&](int64_t r, int64_t at, auto lanes) { return get(grad + r * channels + at, lanes); });
        },
        [&](int64_t c, int64_t n, const float* sums) {
            for (int64_t i = 0; i < n; ++i) bias[c + i] += sums[i];
        });
}

void channel_dot(const Call& call) {
    const float *grad = call.at<const float>(0), *x = call.at<const float>(1);
    float* y = call.at<float>(2);
    const int64_t channels = channels_of(call.tensor(0));
    sum_rows<float, 1>(
        call, call.images * pixels_of(call.tensor(0)), channels,
        [&](int64_t begin, int64_t end, int64_t c, int64_t n, float* sums) {
            sum_part(begin, end, c, n, sums, [&](int64_t r, int64_t at, auto lanes) {
                return get(grad + r * channels + at, lanes) * get(x + r * channels + at, lanes);
            });
        },
        [&](int64_t c, int64_t n, const float* sums) {
            for (int64_t i = 0; i < n; ++i) y[c + i] += sums[i];
        });
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
