// Gradient of a convolution by its input: y = mask(w transposed * grad + other), bias += sums of y over pixels.
#include "conv_product.hpp"
#include "conv_window.hpp"
#include "expand.hpp"
#include "depthwise.hpp"
#include "kernels.hpp"

namespace tinytl {
namespace TINYTL_ISA {
namespace {

// The taps of one axis by which the input's positions of one remainder by the stride were read.
struct Taps {
    int64_t first, step, count;   // numbers of the taps: first, first + step, ...
    int64_t size, offset, apart;  // positions of that remainder; the gradient's position for the LAST tap at the first
                                  // of them; how far each tap before it lies behind
};

Taps taps_of(int64_t remainder, int64_t size, int64_t kernel, int64_t stride, int64_t before, int64_t dilation) {
    Taps taps{};
    taps.size = pieces(size - remainder, stride);
    taps.step = stride;
    for (int64_t t = 0; t < kernel; ++t) {
        if ((remainder + before - dilation * t) % stride) continue;
        if (taps.count == 0) taps.first = t;
        if (taps.count == 1) taps.step = t - taps.first;
        ++taps.count;
    }
    if (taps.count == 0) return taps;
    taps.offset = (remainder + before - dilation * (taps.first + (taps.count - 1) * taps.step)) / stride;
    taps.apart = dilation * taps.step / stride;
    return taps;
}

// bias += the sums of all parts, in their order; a part of a channel was summed by one thread, and is 0 in the others.
void add_sums(const Call& call, float* bias, int64_t parts, int64_t channels) {
    for (int64_t c = 0; c < channels; ++c) {
        float total = 0;
        for (int64_t part = 0; part < parts; ++part) {
            float sum = 0;
            for (int t = 0; t < call.threads.count(); ++t)
                sum += reinterpret_cast<const float*>(call.scratch_of(t))[part * channels + c];
            total += sum;
        }
        bias[c] += total;
    }
}

// The same of more channels than scratch memory has room for.
void sum_columns(const Call& call, float* bias, const float* y, int64_t rows, int64_t channels) {
    call.threads.ranges(channels, W, [&](int64_t begin, int64_t end, int) {
        for (int64_t c = begin; c < end; c += W) {
            const int64_t n = least(W, end - c);
            vf total = {};
            for (int64_t r = 0; r < rows; ++r) total += load_part(y + r * channels + c, n);
            store_part(bias + c, load_part(bias + c, n) + total, n);
        }
    });
}

}  // namespace

void conv_dx(const Call& call) {
    if (call.attribute(11) != 0) return depthwise_conv_dx(call);
    const Tensor &grad = call.tensor(0), &w = call.tensor(1), &y = call.tensor(5);
    const Window window = window_of(call);
    const int64_t groups = static_cast<int64_t>(call.attribute(10));
    const int64_t depth = w.shape[0] / groups, columns = w.shape[3], channels = groups * columns;

    Backward finish{};
    finish.y = call.at<float>(5);
    finish.other = call.at<float>(3);
    finish.mask = call.at<uint8_t>(4);
    finish.channels = channels;
    finish.mask_bytes = (channels + 7) / 8;
    finish.slope = static_cast<float>(call.attribute(12));
    float* bias = call.at<float>(6);
    const bool sums = bias && channels <= sum_floats;

    Gather g{};
    g.images = call.images;
    g.source = call.at<float>(0);
    g.sh = grad.shape[0];
    g.sw = grad.shape[1];
    g.channels = grad.shape[2];
    g.depth = depth;
    g.si = g.sj = 1;
    g.th = y.shape[0];
    g.tw = y.shape[1];
    g.ti = window.sh;
    g.tj = window.sw;
    with_weights(w, call.at<float>(2), [&](auto weights) {
        for (g.uh = 0; g.uh < window.sh; ++g.uh) {
            for (g.uw = 0; g.uw < window.sw; ++g.uw) {
                const Taps down = taps_of(g.uh, g.th, window.kh, window.sh, window.top, window.dh);
                const Taps right = taps_of(g.uw, g.tw, window.kw, window.sw, window.left, window.dw);
                g.gh = most(0, down.size);
                g.gw = most(0, right.size);
                if (g.rows() == 0) continue;
                g.na = down.count;
                g.nb = right.count;
                g.oh = down.offset;
                g.ow = right.offset;
                g.da = down.apart;
                g.db = right.apart;
                // Taps run from the last to the first, so that the gradient's pixels are read forwards.
                const auto pack = [&](float* to, int64_t group, int64_t first, int64_t width, int64_t k0,
                                      int64_t k1) {
                    for (int64_t k = k0; k < k1;) {
                        const int64_t tap = k / depth, o = k - tap * depth, n = least(depth - o, k1 - k);
                        const int64_t kh = down.first + (down.count - 1 - tap / right.count) * down.step;
                        const int64_t kw = right.first + (right.count - 1 - tap % right.count) * right.step;
                        const int64_t length = window.kh * window.kw * columns, channel = group * depth + o;
                        const int64_t at = channel * length + (kh * window.kw + kw) * columns + first;
                        pack_rows(to, weights, at, length, n, width, channel);
                        to += n * pieces(width, W) * W;
                        k += n;
                    }
                };
                multiply_rows(call, g, groups, columns, true, Pack(pack), finish, sums);
                if (sums) add_sums(call, bias, parts_of(g.rows(), channels), channels);
            }
        }
    });
    if (bias && !sums) sum_columns(call, bias, finish.y, call.images * g.th * g.tw, channels);
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
