// Average pooling, with a window or to a given size, and their gradients.
#include "kernels.hpp"
#include "pool_separable.hpp"

namespace tinytl {
namespace TINYTL_ISA {
namespace {

// A window along one side of the image.
struct Side {
    int64_t size, out, kernel, stride, before, after, dilation;
    bool include_pad;
    int64_t divisor;  // 0: the pixels of the window

    // What each pixel of window i is multiplied by.
    float factor(int64_t i) const {
        if (divisor) return 1.0f / static_cast<float>(divisor);
        const int64_t low = include_pad ? -before : 0, high = include_pad ? size + after : size;
        int64_t pixels = 0;
        for (int64_t k = 0; k < kernel; ++k) {
            const int64_t at = i * stride - before + k * dilation;
            pixels += at >= low && at < high;
        }
        return pixels ? 1.0f / static_cast<float>(pixels) : 0.0f;
    }
};

struct Averaged : Side {
    int64_t most;
    explicit Averaged(const Side& side) : Side(side), most(side.kernel) {}
    int64_t fill(int64_t i, Tap* taps) const {
        const float weight = factor(i);
        int64_t count = 0;
        for (int64_t k = 0; k < kernel; ++k) {
            const int64_t at = i * stride - before + k * dilation;
            if (at >= 0 && at < size) taps[count++] = {static_cast<int32_t>(at), weight};
        }
        return count;
    }
};

// The windows that pixel i lies in.
struct AveragedBack : Side {
    int64_t most;
    explicit AveragedBack(const Side& side) : Side(side), most(side.kernel) {}
    int64_t fill(int64_t i, Tap* taps) const {
        int64_t count = 0;
        for (int64_t k = 0; k < kernel; ++k) {
            const int64_t at = i + before - k * dilation;
            if (at < 0 || at % stride || at / stride >= out) continue;
            taps[count++] = {static_cast<int32_t>(at / stride), factor(at / stride)};
        }
        return count;
    }
};

Side rows_of(const Call& call, const Image& image, const Image& pooled) {
    const Window w = call.instruction.window();
    const int64_t divisor = static_cast<int64_t>(call.attribute(11));
    return {image.height, pooled.height, w.kh, w.sh, w.top, w.bottom, w.dh, call.attribute(10) != 0, divisor};
}
Side columns_of(const Call& call, const Image& image, const Image& pooled) {
    const Window w = call.instruction.window();
    const int64_t divisor = call.attribute(11) != 0;  // rows have divided by all of it
    return {image.width, pooled.width, w.kw, w.sw, w.left, w.right, w.dw, call.attribute(10) != 0, divisor};
}

// The mean over [floor(i size / out), ceil((i + 1) size / out)).
struct Adaptive {
    int64_t size, out, most;
    Adaptive(int64_t size_, int64_t out_) : size(size_), out(out_), most(size_ / out_ + 2) {}
    int64_t begin(int64_t i) const { return i * size / out; }
    int64_t end(int64_t i) const { return ((i + 1) * size + out - 1) / out; }
    int64_t fill(int64_t i, Tap* taps) const {
        const int64_t first = begin(i), count = end(i) - first;
        for (int64_t k = 0; k < count; ++k)
            taps[k] = {static_cast<int32_t>(first + k), 1.0f / static_cast<float>(count)};
        return count;
    }
};

struct AdaptiveBack : Adaptive {
    AdaptiveBack(int64_t size_, int64_t out_) : Adaptive(size_, out_) { most = out_ / size_ + 3; }
    int64_t fill(int64_t i, Tap* taps) const {
        int64_t count = 0, window = i * out / size;
        if (window > 0) --window;
        for (; window < out && begin(window) <= i; ++window)
            if (i < end(window))
                taps[count++] = {static_cast<int32_t>(window), 1.0f / static_cast<float>(end(window) - begin(window))};
        return count;
    }
};

}  // namespace

void avg_pool(const Call& call) {
    const Image in(call.tensor(0)), out(call.tensor(1));
    separable(call, in, out, call.at<const float>(0), nullptr, call.at<float>(1), Averaged(rows_of(call, in, out)),
              Averaged(columns_of(call, in, out)));
}

void avg_pool_grad(const Call& call) {
    const Image from(call.tensor(0)), to(call.tensor(2));
    separable(call, from, to, call.at<const float>(0), call.at<const float>(1), call.at<float>(2),
              AveragedBack(rows_of(call, to, from)), AveragedBack(columns_of(call, to, from)));
}

void adaptive_pool(const Call& call) {
    const Image in(call.tensor(0)), out(call.tensor(1));
    separable(call, in, out, call.at<const float>(0), nullptr, call.at<float>(1), Adaptive(in.height, out.height),
              Adaptive(in.width, out.width));
}

void adaptive_pool_grad(const Call& call) {
    const Image from(call.tensor(0)), to(call.tensor(2));
    separable(call, from, to, call.at<const float>(0), call.at<const float>(1), call.at<float>(2),
              AdaptiveBack(to.height, from.height), AdaptiveBack(to.width, from.width));
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
