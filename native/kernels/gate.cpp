// Squeeze-and-excitation's product: one factor a channel of each image, y = x s.
#include "elementwise.hpp"
#include "kernels.hpp"

namespace tinytl {
namespace TINYTL_ISA {

void gate(const Call& call) {
    const float *x = call.at<const float>(0), *s = call.at<const float>(1);
    float* y = call.at<float>(2);
    const int64_t channels = channels_of(call.tensor(2)), pixels = pixels_of(call.tensor(2));
    divide(call, call.images * pixels, channels, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r)
            vectors(channels, [&](int64_t c, auto lanes) {
                const int64_t at = r * channels + c;
                put(y + at, get(x + at, lanes) * get(s + r / pixels * channels + c, lanes), lanes);
            });
    });
}

void gate_grad(const Call& call) {
    const float *grad = call.at<const float>(0), *x = call.at<const float>(1);
    float *y = call.at<float>(3), *s_grad = call.at<float>(4);
    const int64_t channels = channels_of(call.tensor(3)), pixels = pixels_of(call.tensor(3));
    for (int64_t image = 0; image < call.images; ++image) {
        const float* s = call.at<const float>(2) + image * channels;
        const int64_t start = image * pixels * channels;
        sum_rows<float, 1>(
            call, pixels, channels,
            [&](int64_t begin, int64_t end, int64_t first, int64_t n, float* sums) {
                sum_part(begin, end, first, n, sums, [&](int64_t r, int64_t c, auto lanes) {
                    const int64_t at = start + r * channels + c;
                    const vf g = get(grad + at, lanes), product = g * get(x + at, lanes);
                    put(y + at, g * get(s + c, lanes), lanes);  // may be where g was
                    return product;
                });
            },
            [&](int64_t c, int64_t n, const float* sums) {
                std::memcpy(s_grad + image * channels + c, sums, static_cast<size_t>(n) * sizeof(float));
            });
    }
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
