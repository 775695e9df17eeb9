// Averages over windows, bilinear upsampling and the gradients of both are one thing: for each channel a product with a
// small sparse matrix on either side, y[i, j] = sum_v a[i, v] sum_h b[j, h] x[v, h].
#pragma once

#include "elementwise.hpp"

namespace tinytl {
namespace TINYTL_ISA {

// One pixel of a row or column, and what it is multiplied by.
struct Tap {
    int32_t at;
    float weight;
};

// One output pixel from V x H taps, for each of n channels. Weights and places are held in registers: in memory they
// might change with each write.
template <int V, int H>
static inline __attribute__((always_inline)) void one_pixel(const Tap* down, const Tap* across, const float* image,
                                                            int64_t line, int64_t channels, const float* other,
                                                            float* y, int64_t n) {
    const float* from[V][H];
    vf below[V], beside[H];
    for (int v = 0; v < V; ++v) below[v] = set1(down[v].weight);
    for (int h = 0; h < H; ++h) beside[h] = set1(across[h].weight);
    for (int v = 0; v < V; ++v)
        for (int h = 0; h < H; ++h) from[v][h] = image + down[v].at * line + across[h].at * channels;
    vectors(n, [&](int64_t c, auto lanes) {
        vf sum = other ? get(other + c, lanes) : vf{};
        for (int v = 0; v < V; ++v) {
            vf part = {};
            for (int h = 0; h < H; ++h) part += beside[h] * get(from[v][h] + c, lanes);
            sum += below[v] * part;
        }
        put(y + c, sum, lanes);
        fetch_to_write(y + c + 2 * channels);
    });
}

// A row of `width` output pixels: for each the sum over `count` taps down and counts[j] of the `each` across, + other.
static __attribute__((noinline)) void one_row(const Tap* down, int64_t count, const Tap* across, const int64_t* counts,
                                              int64_t each, int64_t width, const float* image, int64_t line,
                                              int64_t channels, const float* other, float* y, int64_t n) {
    for (int64_t j = 0; j < width; ++j, y += channels, across += each) {
        if (count == 1 && counts[j] == 1) {
            one_pixel<1, 1>(down, across, image, line, channels, other, y, n);
        } else if (count == 2 && counts[j] == 2) {
            one_pixel<2, 2>(down, across, image, line, channels, other, y, n);
        } else if (count == 4 && counts[j] == 4) {
            one_pixel<4, 4>(down, across, image, line, channels, other, y, n);
        } else {
            const int64_t columns = counts[j];
            vectors(n, [&](int64_t c, auto lanes) {
                vf sum = other ? get(other + c, lanes) : vf{};
                for (int64_t v = 0; v < count; ++v) {
                    const float* row = image + down[v].at * line + c;
                    vf part = {};
                    for (int64_t h = 0; h < columns; ++h)
                        part += across[h].weight * get(row + across[h].at * channels, lanes);
                    sum += down[v].weight * part;
                }
                put(y + c, sum, lanes);
            });
        }
        if (other) other += channels;
    }
}

// A side of the image: `most(out)` says how many taps a pixel has at the utmost, fill(i, taps) writes those of output
// pixel i, all inside the image, and returns how many they are.
//
// y = other + that product. Each sum is taken in the order of its taps.
template <class Down, class Across>
static inline void separable(const Call& call, const Image& from, const Image& to, const float* x, const float* other,
                             float* y, const Down& down, const Across& across) {
    const int64_t channels = to.channels, height = to.height, width = to.width, wide = from.width;
    const int64_t rows = call.images * height;
    // Where there are few rows, channels are divided too: a mean over the whole image has one row.
    const int64_t block = rows < 16 ? 64 : channels, blocks = (channels + block - 1) / block;
    const int64_t each = across.most, for_down = 64 * 1024;
    const int64_t columns = most(1, (scratch_per_thread - for_down) / (each * int64_t(sizeof(Tap)) + 8));
    const int64_t work = width * block * most(1, from.elements / to.elements);
    divide(call, rows * blocks, work, [&](int64_t begin, int64_t end, int thread) {
        Tap* vertical = reinterpret_cast<Tap*>(call.scratch_of(thread));
        int64_t* counts = reinterpret_cast<int64_t*>(call.scratch_of(thread) + for_down);
        Tap* horizontal = reinterpret_cast<Tap*>(counts + columns);
        for (int64_t first = 0; first < width; first += columns) {
            const int64_t last = least(first + columns, width);
            for (int64_t j = first; j < last; ++j)
                counts[j - first] = across.fill(j, horizontal + (j - first) * each);
            for (int64_t item = begin; item < end; ++item) {
                const int64_t r = item / blocks, c0 = item % blocks * block, n = least(block, channels - c0);
                const float* image = x + r / height * from.elements + c0;
                const int64_t count = down.fill(r % height, vertical);
                const int64_t at = (r * width + first) * channels + c0;
                one_row(vertical, count, horizontal, counts, each, last - first, image, wide * channels, channels,
                        other ? other + at : nullptr, y + at, n);
            }
        }
    });
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
