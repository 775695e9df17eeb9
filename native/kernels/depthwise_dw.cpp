// Depthwise convolution, the gradient of its weight: w[ky, kx, c] += sum of grad[y, x, c] x[y sh - top + ky dh, ...,
// c].
//
// Each thread takes rows of the kernel for some vectors of channels, and goes over all images: every sum has one order.
#include "depthwise.hpp"

#include "depthwise_rows.hpp"

namespace tinytl {
namespace TINYTL_ISA {
namespace {

enum { in_x, in_grad, add_w };

// The sums for one row of the kernel over N output pixels from x on.
template <int K, int S, int N, class Lanes>
inline __attribute__((always_inline)) void segment(vf (&acc)[K], const Depthwise& d, const float* row,
                                                   const float* grad, int64_t x, Lanes lanes) {
    const int64_t left = x * S - d.window.left, step = d.channels;
    const bool edge = left < 0 || left + (N - 1) * S + K > d.source_width;
    vf g[N];
    TINYTL_UNROLL for (int j = 0; j < N; ++j) g[j] = get(grad + (x + j) * step, lanes);
    TINYTL_UNROLL for (int i = 0; i < (N - 1) * S + K; ++i) {
        if (edge && static_cast<uint64_t>(left + i) >= static_cast<uint64_t>(d.source_width)) continue;
        const vf v = get(row + (left + i) * step, lanes);
        TINYTL_UNROLL for (int k = 0; k < K; ++k)
            if (i >= k && (i - k) % S == 0 && (i - k) / S < N) acc[k] += v * g[(i - k) / S];
    }
}

// One row of the image and of the gradient, added to `sums` (K vectors).
template <int K, int S, class Lanes>
__attribute__((noinline)) void one_row(float* sums, const Depthwise& d, const float* row, const float* grad,
                                       Lanes lanes) {
    vf acc[K] = {};
    int64_t x = 0;
    for (; x + 7 <= d.target_width; x += 7) segment<K, S, 7>(acc, d, row, grad, x, lanes);
    if (x + 4 <= d.target_width) {
        segment<K, S, 4>(acc, d, row, grad, x, lanes);
        x += 4;
    }
    for (; x < d.target_width; ++x) segment<K, S, 1>(acc, d, row, grad, x, lanes);
    TINYTL_UNROLL for (int k = 0; k < K; ++k) store(sums + k * W, load(sums + k * W) + acc[k]);
}

template <class Lanes>
void any_row(float* sums, const Depthwise& d, const float* row, const float* grad, int64_t kx, Lanes lanes) {
    const Window& w = d.window;
    vf acc = {};
    for (int64_t x = 0; x < d.target_width; ++x) {
        const int64_t column = x * w.sw - w.left + kx * w.dw;
        if (column < 0 || column >= d.source_width) continue;
        acc += get(row + column * d.channels, lanes) * get(grad + x * d.channels, lanes);
    }
    store(sums, load(sums) + acc);
}

// Row ky of the kernel, columns [begin, end), over all rows of all images.
template <class Row>
inline void all_rows(const Depthwise& d, const float* grad, int64_t images, int64_t ky, Row&& one) {
    for (int64_t r = 0; r < images * d.target_height; ++r) {
        const int64_t y = r % d.target_height, at = y * d.window.sh - d.window.top + ky * d.window.dh;
        if (at < 0 || at >= d.source_height) continue;
        const int64_t row = r / d.target_height * d.source_height + at;
        one(d.source + row * d.source_width * d.channels, grad + r * d.target_width * d.channels);
    }
}

template <class Lanes>
void kernel_row(const Depthwise& d, const float* grad, float* w, int64_t images, int64_t ky, float* sums, Lanes lanes) {
    const Window& win = d.window;
    constexpr int64_t at_once = 64;  // columns of the kernel
    for (int64_t from = 0; from < win.kw; from += at_once) {
        const int64_t n = least(at_once, win.kw - from);
        for (int64_t k = 0; k < n; ++k) store(sums + k * W, vf{});
#define TINYTL_CASE(K, S)                                                                              \
    if (win.dw == 1 && win.kw == K && win.sw == S) {                                                     \
        all_rows(d, grad, images, ky,                                                                  \
                 [&](const float* row, const float* g) { one_row<K, S>(sums, d, row, g, lanes); });    \
    } else
        TINYTL_CASE(3, 1)
        TINYTL_CASE(3, 2)
        TINYTL_CASE(5, 1)
        TINYTL_CASE(5, 2)
        TINYTL_CASE(7, 1)
        TINYTL_CASE(7, 2) {
            for (int64_t k = 0; k < n; ++k)
                all_rows(d, grad, images, ky, [&](const float* row, const float* g) {
                    any_row(sums + k * W, d, row, g, from + k, lanes);
                });
        }
#undef TINYTL_CASE
        for (int64_t k = 0; k < n; ++k) {
            float* at = w + (ky * win.kw + from + k) * d.channels;
            put(at, get(at, lanes) + load(sums + k * W), lanes);
        }
    }
}

}  // namespace

void depthwise_conv_dw(const Call& call) {
    const Image x(call.tensor(in_x)), grad(call.tensor(in_grad));
    const int64_t channels = x.channels, blocks = (channels + W - 1) / W;
    const Depthwise all{call.instruction.window(), channels,      x.height, x.width, grad.height, grad.width,
                        call.at<const float>(in_x)};
    const int64_t rows = all.window.kh;
    call.threads.ranges(blocks * rows, 1, [&](int64_t begin, int64_t end, int thread) {
        float* sums = reinterpret_cast<float*>(call.scratch_of(thread));
        for (int64_t item = begin; item < end; ++item) {
            const int64_t c = item / rows * W, n = least(W, channels - c);
            Depthwise d = all;
            d.source += c;
            const float* g = call.at<const float>(in_grad) + c;
            float* w = call.at<float>(add_w) + c;
            if (n == W)
                kernel_row(d, g, w, call.images, item % rows, sums, All{});
            else
                kernel_row(d, g, w, call.images, item % rows, sums, Some{n});
        }
    });
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
