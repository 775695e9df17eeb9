// Max pooling: the number of the winner in its window is what the gradient needs. The padding never wins; of equal
// pixels the first wins, row by row; NaN wins over everything, the last one over those before it.
#include "elementwise.hpp"
#include "kernels.hpp"

namespace tinytl {
namespace TINYTL_ISA {
namespace {

typedef uint8_t vb __attribute__((vector_size(W)));

}  // namespace

void max_pool(const Call& call) {
    const Image in(call.tensor(0)), out(call.tensor(1));
    const Window w = call.instruction.window();
    const float* x = call.at<const float>(0);
    float* y = call.at<float>(1);
    uint8_t* which = call.at<uint8_t>(2);
    const int64_t channels = out.channels, height = out.height, width = out.width;
    divide(call, call.images * height * width, channels * w.kh * w.kw, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r) {
            const int64_t i = r / width % height, j = r % width;
            const float* image = x + r / width / height * in.elements;
            vectors(channels, [&](int64_t c, auto lanes) {
                vf best = set1(-__builtin_inff());
                vi winner = vi{} - 1;  // none yet
                for (int64_t ky = 0; ky < w.kh; ++ky) {
                    const int64_t row = i * w.sh - w.top + ky * w.dh;
                    if (row < 0 || row >= in.height) continue;
                    for (int64_t kx = 0; kx < w.kw; ++kx) {
                        const int64_t column = j * w.sw - w.left + kx * w.dw;
                        if (column < 0 || column >= in.width) continue;
                        const vf v = get(image + (row * in.width + column) * channels + c, lanes);
                        const vi better = (v > best) | (v != v) | (winner < 0);
                        best = better ? v : best;
                        winner = better ? vi{} + static_cast<int32_t>(ky * w.kw + kx) : winner;
                    }
                }
                put(y + r * channels + c, best, lanes);
                if (!which) return;
                const vb bytes = __builtin_convertvector(winner, vb);
                std::memcpy(which + r * channels + c, &bytes, static_cast<size_t>(lanes.n));
            });
        }
    });
}

void max_pool_grad(const Call& call) {
    const Image from(call.tensor(0)), to(call.tensor(2));
    const Window w = call.instruction.window();
    const float* grad = call.at<const float>(0);
    const uint8_t* which = call.at<const uint8_t>(1);
    float* y = call.at<float>(2);
    const int64_t channels = to.channels, height = to.height, width = to.width;
    divide(call, call.images * height * width, channels * w.kh * w.kw, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r) {
            const int64_t i = r / width % height, j = r % width, image = r / width / height * from.elements;
            vectors(channels, [&](int64_t c, auto lanes) {
                vf sum = {};
                for (int64_t ky = 0; ky < w.kh; ++ky) {
                    const int64_t down = i + w.top - ky * w.dh;
                    if (down < 0 || down % w.sh || down / w.sh >= from.height) continue;
                    for (int64_t kx = 0; kx < w.kw; ++kx) {
                        const int64_t across = j + w.left - kx * w.dw;
                        if (across < 0 || across % w.sw || across / w.sw >= from.width) continue;
                        const int64_t at = image + (down / w.sh * from.width + across / w.sw) * channels + c;
                        vb bytes = {};
                        std::memcpy(&bytes, which + at, static_cast<size_t>(lanes.n));
                        const vi won = __builtin_convertvector(bytes, vi) == static_cast<int32_t>(ky * w.kw + kx);
                        sum += won ? get(grad + at, lanes) : vf{};
                    }
                }
                put(y + r * channels + c, sum, lanes);
            });
        }
    });
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
