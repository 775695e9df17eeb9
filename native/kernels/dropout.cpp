// Dropout. Each element's draw is counted, not streamed, so that threads and micro-batches do not change it: see
// src/tinytl/compiler/random.py, which makes the same.
#include "elementwise.hpp"
#include "kernels.hpp"

namespace tinytl {
namespace TINYTL_ISA {
namespace {

constexpr uint64_t golden = 0x9E3779B97F4A7C15u;

// splitmix64 (Steele, Lea and Flood 2014).
inline uint64_t mixed(uint64_t z) {
    z += golden;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

}  // namespace

void dropout(const Call& call) {
    const float* x = call.at<const float>(0);
    float* y = call.at<float>(1);
    uint8_t* mask = call.at<uint8_t>(2);
    const int64_t channels = channels_of(call.tensor(1)), pixels = pixels_of(call.tensor(1));
    const double p = call.attribute(0);
    const float scale = static_cast<float>(1.0 - p);
    const uint64_t number = static_cast<uint64_t>(static_cast<int64_t>(call.attribute(1)));
    const uint64_t of_step =
        mixed(mixed(static_cast<uint64_t>(call.step.seed) + number * golden) + static_cast<uint64_t>(call.step.step));
    const bool train = call.step.train;
    divide(call, call.images * pixels, channels, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r) {
            const uint64_t key = mixed(of_step + static_cast<uint64_t>(call.first + r / pixels));
            const uint64_t element = static_cast<uint64_t>(r % pixels * channels);
            uint32_t bits = 0;
            for (int64_t c = 0; c < channels; ++c) {
                const uint64_t draw = mixed(key + element + static_cast<uint64_t>(c)) >> 11;
                const bool kept = !train || static_cast<double>(draw) * 0x1p-53 >= p;
                const float v = x[r * channels + c];
                y[r * channels + c] = !train ? v : kept ? v / scale : 0.0f;
                bits |= (kept ? 1u : 0u) << (c & 7);
                if ((c & 7) != 7 && c + 1 != channels) continue;
                if (mask) mask[r * mask_bytes(channels) + (c >> 3)] = static_cast<uint8_t>(bits);
                bits = 0;
            }
        }
    });
}

void dropout_grad(const Call& call) {
    const float* grad = call.at<const float>(0);
    const uint8_t* mask = call.at<const uint8_t>(1);
    float* y = call.at<float>(2);
    const int64_t channels = channels_of(call.tensor(2)), row_bits = mask_bytes(channels);
    const float scale = static_cast<float>(1.0 - call.attribute(0));
    divide(call, call.images * pixels_of(call.tensor(2)), channels, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r)
            vectors(channels, [&](int64_t c, auto lanes) {
                const vf v = get(grad + r * channels + c, lanes) / scale;
                put(y + r * channels + c, keep(v, get_bits(mask + r * row_bits, c, lanes.n)), lanes);
            });
    });
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
