// Bilinear upsampling with corners not aligned, as torch.nn.functional.interpolate, and its gradient.
#include "kernels.hpp"
#include "pool_separable.hpp"

namespace tinytl {
namespace TINYTL_ISA {
namespace {

// One side: output pixel i lies at (i + 1/2) size / out - 1/2, not below 0, between two pixels.
struct Bilinear {
    int64_t size, out, most;

    Bilinear(int64_t size_, int64_t out_) : size(size_), out(out_), most(2) {}
    int64_t fill(int64_t i, Tap* taps) const {
        double place = (static_cast<double>(i) + 0.5) * static_cast<double>(size) / static_cast<double>(out) - 0.5;
        if (place < 0) place = 0;
        const int64_t low = least(static_cast<int64_t>(place), size - 1);
        const double part = place - static_cast<double>(low);
        if (low + 1 == size || part == 0) {
            taps[0] = {static_cast<int32_t>(low), 1.0f};
            return 1;
        }
        taps[0] = {static_cast<int32_t>(low), static_cast<float>(1.0 - part)};
        taps[1] = {static_cast<int32_t>(low + 1), static_cast<float>(part)};
        return 2;
    }
};

// The output pixels that lie beside pixel i.
struct BilinearBack : Bilinear {
    BilinearBack(int64_t size_, int64_t out_) : Bilinear(size_, out_) { most = 2 * out_ / size_ + 6; }
    int64_t fill(int64_t i, Tap* taps) const {
        const double steps = static_cast<double>(out) / static_cast<double>(size);
        int64_t first = static_cast<int64_t>((static_cast<double>(i) - 0.5) * steps - 1.5);
        int64_t last = static_cast<int64_t>((static_cast<double>(i) + 1.5) * steps + 1.5), count = 0;
        if (first < 0) first = 0;
        if (last > out) last = out;
        for (int64_t o = first; o < last; ++o) {
            Tap both[2];
            const int64_t n = Bilinear::fill(o, both);
            for (int64_t k = 0; k < n; ++k)
                if (both[k].at == i) taps[count++] = {static_cast<int32_t>(o), both[k].weight};
        }
        return count;
    }
};

}  // namespace

void upsample(const Call& call) {
    const Image in(call.tensor(0)), out(call.tensor(2));
    separable(call, in, out, call.at<const float>(0), call.at<const float>(1), call.at<float>(2),
              Bilinear(in.height, out.height), Bilinear(in.width, out.width));
}

void upsample_grad(const Call& call) {
    const Image from(call.tensor(0)), to(call.tensor(1));
    separable(call, from, to, call.at<const float>(0), nullptr, call.at<float>(1),
              BilinearBack(to.height, from.height), BilinearBack(to.width, from.width));
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
