// Depthwise convolution, forward: y = act(w * x + bias + residual), with its mask.
#include "depthwise.hpp"

#include "depthwise_rows.hpp"

namespace tinytl {
namespace TINYTL_ISA {
namespace {

enum { in_x, in_w, in_table, in_bias, in_residual, out_y, out_mask };

// Everything that one vector of channels needs.
struct Forward {
    Depthwise d;
    Activation activation;
    const float* residual;
    float* y;
    uint8_t* mask;
    int64_t row_bits;  // bytes of one pixel's bits
    int64_t c;         // first channel
    vf bias;
    const Taps* taps;

    const float* image(int64_t n) const { return d.source + n * d.source_height * d.source_width * d.channels + c; }

    // What comes after the sum, for one pixel; `pixel` counts over all images.
    template <class Lanes>
    inline __attribute__((always_inline)) void finish(vf z, int64_t pixel, Lanes lanes) const {
        const int64_t at = pixel * d.channels + c;
        z += bias;
        if (residual) z += get(residual + at, lanes);
        if (mask) put_bits(mask + pixel * row_bits, c, lanes.n, activation.bits(z));
        put(y + at, activation(z), lanes);
    }
};

template <int K, int S, int N, class Lanes>
__attribute__((noinline)) int64_t segment(const Forward& f, const float* image, int64_t y, int64_t x, int64_t pixel,
                                          Lanes lanes) {
    vf acc[N] = {};
    const int64_t left = x * S - f.d.window.left;
    constexpr bool often = N >= 7 && whole<Lanes>;  // worth code of its own without the checks
    if (often && left >= 0 && left + (N - 1) * S + K <= f.d.source_width)
        gather<K, S, N, !often>(acc, f.d, image, f.taps->expanded, y, x, lanes);
    else
        gather<K, S, N, true>(acc, f.d, image, f.taps->expanded, y, x, lanes);
    if (f.residual || f.mask || f.activation.slope != 0) {
        vf sums[N];  // apart from those that the loops above hold in registers
        TINYTL_UNROLL for (int j = 0; j < N; ++j) sums[j] = acc[j];
        for (int j = 0; j < N; ++j) {
            f.finish(sums[j], pixel + j, lanes);
            fetch_to_write(f.y + (pixel + N + j) * f.d.channels + f.c);
        }
        return N;
    }
    float* at = f.y + pixel * f.d.channels + f.c;
    TINYTL_UNROLL for (int j = 0; j < N; ++j) {
        put(at + j * f.d.channels, f.activation(acc[j] + f.bias), lanes);
        fetch_to_write(at + (N + j) * f.d.channels);
    }
    return N;
}

// Rows [begin, end) of all images together.
template <int K, int S, class Lanes>
void rows(const Forward& f, int64_t begin, int64_t end, Lanes lanes) {
    const int64_t height = f.d.target_height, width = f.d.target_width;
    for (int64_t r = begin; r < end; ++r) {
        const float* image = f.image(r / height);
        const int64_t y = r % height, pixel = r * width;
        int64_t x = 0;
        if (W == 16)  // 32 registers
            while (x + 14 <= width) x += segment<K, S, 14>(f, image, y, x, pixel + x, lanes);
        while (x + 7 <= width) x += segment<K, S, 7>(f, image, y, x, pixel + x, lanes);
        if (x + 4 <= width) x += segment<K, S, 4>(f, image, y, x, pixel + x, lanes);
        while (x < width) x += segment<K, S, 1>(f, image, y, x, pixel + x, lanes);
    }
}

template <class Lanes>
void rows_any(const Forward& f, int64_t begin, int64_t end, Lanes lanes) {
    const int64_t height = f.d.target_height, width = f.d.target_width;
    for (int64_t r = begin; r < end; ++r)
        for (int64_t x = 0; x < width; ++x)
            f.finish(gather_any(f.d, f.image(r / height), *f.taps, r % height, x, lanes), r * width + x, lanes);
}

template <class Lanes>
void choose(const Forward& f, int64_t begin, int64_t end, Lanes lanes) {
    const Window& w = f.d.window;
    const bool known = w.dw == 1 && f.taps->expanded;
#define TINYTL_CASE(K, S) \
    if (known && w.kw == K && w.sw == S) return rows<K, S>(f, begin, end, lanes)
    TINYTL_CASE(3, 1);
    TINYTL_CASE(3, 2);
    TINYTL_CASE(5, 1);
    TINYTL_CASE(5, 2);
    TINYTL_CASE(7, 1);
    TINYTL_CASE(7, 2);
#undef TINYTL_CASE
    rows_any(f, begin, end, lanes);
}

}  // namespace

void depthwise_conv(const Call& call) {
    const Image x(call.tensor(in_x)), y(call.tensor(out_y));
    const int64_t channels = y.channels, height = y.height;
    const Depthwise d{call.instruction.window(), channels,  x.height, x.width, height, y.width,
                      call.at<const float>(in_x)};
    const Forward all{d,
                      Activation(call, 12),
                      call.at<const float>(in_residual),
                      call.at<float>(out_y),
                      call.at<uint8_t>(out_mask),
                      mask_bytes(channels),
                      0,
                      vf{},
                      nullptr};
    const Values values = values_of(call, in_w, in_table);
    const float* bias = call.at<const float>(in_bias);

    // Some rows of all channels at a time, so that what one vector of channels leaves in the second-level cache serves
    // the next; of them one vector of channels after the other, whose filters stay in the first-level cache.
    const int64_t total = call.images * height;
    const int64_t row_bytes = d.window.sh * d.source_width * channels * int64_t(sizeof(float));
    constexpr int64_t block = W < 8 ? 8 : W;  // no two threads write to one byte of the mask
    const int64_t blocks = (channels + block - 1) / block, threads = call.threads.count();
    // As many for each thread: its rows are then those that it wrote before, and lie in its own cache.
    int64_t chunks = most(1, total * row_bytes / (256 * 1024));
    chunks = least((chunks + threads - 1) / threads * threads, total);
    call.threads.ranges(chunks * blocks, 1, [&](int64_t begin, int64_t end, int thread) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t chunk = item / blocks, first = total * chunk / chunks, last = total * (chunk + 1) / chunks;
            const int64_t c0 = item % blocks * block;
            for (int64_t c = c0; c < least(c0 + block, channels); c += W) {
                const int64_t n = least(W, channels - c);
                const Taps taps(values, d.window, channels, c, taps_memory(call, thread));
                Forward f = all;
                f.c = c;
                f.taps = &taps;
                if (bias) f.bias = n == W ? load(bias + c) : load_part(bias + c, n);
                if (n == W)
                    choose(f, first, last, All{});
                else
                    choose(f, first, last, Some{n});
            }
        }
    });
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
