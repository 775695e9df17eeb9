// Convolution: y = act(w * x + bias + residual).
#include <cmath>

#include "conv_dot.hpp"
#include "conv_product.hpp"
#include "conv_window.hpp"
#include "depthwise.hpp"
#include "kernels.hpp"

namespace tinytl {
namespace TINYTL_ISA {

void conv(const Call& call) {
    if (call.attribute(11) != 0) return depthwise_conv(call);
    const Tensor &x = call.tensor(0), &w = call.tensor(1), &y = call.tensor(5);
    const Window window = window_of(call);
    const int64_t groups = static_cast<int64_t>(call.attribute(10));
    const int64_t out = w.shape[0], depth = w.shape[3], columns = out / groups;

    Forward finish{};
    finish.y = call.at<float>(5);
    finish.bias = call.at<float>(3);
    finish.residual = call.at<float>(4);
    finish.mask = call.at<uint8_t>(6);
    finish.channels = out;
    finish.mask_bytes = (out + 7) / 8;
    finish.lo = static_cast<float>(call.attribute(12));
    finish.hi = static_cast<float>(call.attribute(13));
    // At z = lo = -inf a slope would make a NaN of the difference.
    finish.slope = finish.lo > -HUGE_VALF ? static_cast<float>(call.attribute(14)) : 0.0f;
    finish.bounded = finish.mask || finish.lo > -HUGE_VALF || finish.hi < HUGE_VALF;

    Gather g{};
    g.images = call.images;
    g.gh = g.th = y.shape[0];
    g.gw = g.tw = y.shape[1];
    g.ti = g.tj = 1;
    g.source = call.at<float>(0);
    g.sh = x.shape[0];
    g.sw = x.shape[1];
    g.channels = x.shape[2];
    g.depth = depth;
    g.si = window.sh;
    g.sj = window.sw;
    g.oh = -window.top;
    g.ow = -window.left;
    g.na = window.kh;
    g.nb = window.kw;
    g.da = window.dh;
    g.db = window.dw;

    const bool aligned = !finish.mask || groups == 1 || columns % 8 == 0;
    with_weights(w, call.at<float>(2), [&](auto weights) {
        if (g.direct() && groups == 1 && g.rows() <= dot_rows)
            return few_rows(call, g.source, g.rows(), depth, out, weights, finish);
        const auto pack = [&](float* to, int64_t group, int64_t first, int64_t width, int64_t k0, int64_t k1) {
            pack_columns(to, weights, g.k(), group * columns + first, width, k0, k1);
        };
        multiply_rows(call, g, groups, columns, aligned, Pack(pack), finish, false);
    });
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
