// Depthwise convolution, the gradient of its input: y = (w transposed * grad + other), gated by the mask; bias += sum
// y.
#include "depthwise.hpp"

#include "depthwise_rows.hpp"

namespace tinytl {
namespace TINYTL_ISA {
namespace {

enum { in_grad, in_w, in_table, in_other, in_mask, out_y, add_bias };

struct Backward {
    Depthwise d;
    const float* other;
    const uint8_t* mask;
    float slope;
    float* y;
    int64_t row_bits;
    int64_t c;
    const Taps* taps;

    const float* image(int64_t n) const { return d.source + n * d.source_height * d.source_width * d.channels + c; }

    // What comes after the sum, for one pixel of all images; returns what was stored.
    template <class Lanes>
    inline __attribute__((always_inline)) vf finish(vf v, int64_t pixel, Lanes lanes) const {
        const int64_t at = pixel * d.channels + c;
        if (other) v += get(other + at, lanes);
        if (mask) v = pass(v, get_bits(mask + pixel * row_bits, c, lanes.n), slope);
        put(y + at, v, lanes);
        return v;
    }
};

// One row of the input: its first row of the kernel and the row of the gradient that it reached, and the number of its
// first pixel among those of all images.
struct Row {
    const float* image;
    int64_t ky, gy, pixel;
};

// N pixels from x on; adds what was stored to `sum`.
template <int K, int S, int N, class Lanes>
__attribute__((noinline)) void segment(const Backward& b, const Row& row, int64_t x, vf& sum, Lanes lanes) {
    vf acc[N] = {};
    const int64_t width = b.d.target_width, reach = (x + b.d.window.left) / S;
    constexpr bool often = N >= 7 && whole<Lanes>;  // worth code of its own without the checks
    if (often && reach >= (K - 1) / S && reach + (N - 1) / S < b.d.source_width)
        scatter<K, S, N, !often>(acc, b.d, row.image, b.taps->expanded, row.ky, row.gy, x, lanes);
    else
        scatter<K, S, N, true>(acc, b.d, row.image, b.taps->expanded, row.ky, row.gy, x, lanes);

    const int64_t first = row.pixel + x;
    if (often && x >= 0 && x + N <= width && !b.other && (!b.mask || b.slope == 0)) {
        const uint8_t* bits = b.mask ? b.mask + first * b.row_bits : nullptr;
        if (bits) TINYTL_UNROLL for (int j = 0; j < N; ++j)
            acc[j] = keep(acc[j], get_bits(bits + j * b.row_bits, b.c, lanes.n));
        float* y = b.y + first * b.d.channels + b.c;
        TINYTL_UNROLL for (int j = 0; j < N; ++j) {
            put(y + j * b.d.channels, acc[j], lanes);
            fetch_to_write(y + (N + j) * b.d.channels);
            sum += acc[j];
        }
        return;
    }
    vf sums[N];  // apart from those that the loops above hold in registers
    TINYTL_UNROLL for (int j = 0; j < N; ++j) sums[j] = acc[j];
    const int begin = x < 0 ? static_cast<int>(-x) : 0, end = static_cast<int>(least(N, width - x));
    for (int j = begin; j < end; ++j) sum += b.finish(sums[j], first + j, lanes);
}

// Rows [begin, end) of all images together; returns the sum of what was stored.
template <int K, int S, class Lanes>
vf rows(const Backward& b, int64_t begin, int64_t end, Lanes lanes) {
    const int64_t height = b.d.target_height, width = b.d.target_width;
    const Window& w = b.d.window;
    constexpr int large = W == 16 ? 14 : S == 2 ? 8 : 7, small = 4;  // 32 registers, or 16
    vf sum = {};
    for (int64_t r = begin; r < end; ++r) {
        const int64_t y = r % height + w.top;
        const Row row{b.image(r / height), y % w.sh, y / w.sh, r * width};
        vf part = {};
        int64_t x = -(w.left % S);
        for (; x + large <= width; x += large) segment<K, S, large>(b, row, x, part, lanes);
        if (large == 14 && S == 1 && x + 7 <= width) {
            segment<K, S, 7>(b, row, x, part, lanes);
            x += 7;
        }
        if (x + small < width) {
            segment<K, S, large>(b, row, x, part, lanes);
            x += large;
        }
        if (x < width) segment<K, S, small>(b, row, x, part, lanes);
        sum += part;
    }
    return sum;
}

template <class Lanes>
vf rows_any(const Backward& b, int64_t begin, int64_t end, Lanes lanes) {
    const int64_t height = b.d.target_height, width = b.d.target_width;
    vf sum = {};
    for (int64_t r = begin; r < end; ++r) {
        vf row = {};
        for (int64_t x = 0; x < width; ++x)
            row += b.finish(scatter_any(b.d, b.image(r / height), *b.taps, r % height, x, lanes), r * width + x, lanes);
        sum += row;
    }
    return sum;
}

template <class Lanes>
vf choose(const Backward& b, int64_t begin, int64_t end, Lanes lanes) {
    const Window& w = b.d.window;
    const bool known = w.dw == 1 && w.dh == 1 && w.left >= 0 && w.top >= 0 && b.taps->expanded;
#define TINYTL_CASE(K, S) \
    if (known && w.kw == K && w.sw == S) return rows<K, S>(b, begin, end, lanes)
    TINYTL_CASE(3, 1);
    TINYTL_CASE(3, 2);
    TINYTL_CASE(5, 1);
    TINYTL_CASE(5, 2);
    TINYTL_CASE(7, 1);
    TINYTL_CASE(7, 2);
#undef TINYTL_CASE
    return rows_any(b, begin, end, lanes);
}

}  // namespace

void depthwise_conv_dx(const Call& call) {
    const Image grad(call.tensor(in_grad)), y(call.tensor(out_y));
    const int64_t channels = y.channels, height = y.height;
    const Depthwise d{call.instruction.window(), channels,   grad.height, grad.width, height, y.width,
                      call.at<const float>(in_grad)};
    const Backward all{d,
                       call.at<const float>(in_other),
                       call.at<const uint8_t>(in_mask),
                       static_cast<float>(call.attribute(12)),
                       call.at<float>(out_y),
                       mask_bytes(channels),
                       0,
                       nullptr};
    const Values values = values_of(call, in_w, in_table);
    float* bias = call.at<float>(add_bias);

    // As in the convolution; but here the division into chunks depends on the shape alone, because each leaves its part
    // of the bias's gradient behind, and these are added up in order.
    constexpr int64_t at_once = 8192;  // channels
    const int64_t total = call.images * height;
    const int64_t row_bytes = d.target_width * channels * int64_t(sizeof(float));
    float* sums = reinterpret_cast<float*>(call.scratch_of(0));
    for (int64_t from = 0; from < channels; from += at_once) {
        const int64_t width = least(at_once, channels - from), blocks = (width + W - 1) / W;
        // Each chunk expands the filters anew: where there are many vectors of channels, two are enough.
        const int64_t room = (scratch_per_thread - taps_bytes) / (width * int64_t(sizeof(float)));
        const int64_t wanted = most(blocks < 16 ? 4 : 2, total * row_bytes / (256 * 1024));
        const int64_t chunks = even_parts(least(least(wanted, total), room));
        call.threads.ranges(chunks * blocks, 1, [&](int64_t begin, int64_t end, int thread) {
            for (int64_t item = begin; item < end; ++item) {
                const int64_t chunk = item / blocks, c = from + item % blocks * W, n = least(W, channels - c);
                const Taps taps(values, d.window, channels, c, taps_memory(call, thread));
                Backward b = all;
                b.c = c;
                b.taps = &taps;
                const int64_t first = total * chunk / chunks, last = total * (chunk + 1) / chunks;
                const vf sum = n == W ? choose(b, first, last, All{}) : choose(b, first, last, Some{n});
                if (bias) store_part(sums + chunk * width + c - from, sum, n);
            }
        });
        for (int64_t chunk = 0; bias && chunk < chunks; ++chunk)
            for (int64_t i = 0; i < width; ++i) bias[from + i] += sums[chunk * width + i];
    }
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
