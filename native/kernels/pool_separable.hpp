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

// A side of the image: `most(out)` says how many taps a pixel has at the utmost, fill(i, taps) writes those of output
// pixel i, all inside the image, and returns how many they are.
//
// y = that product, + other. Each sum is taken in the order of its taps.
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
                for (int64_t j = first; j < last; ++j) {
                    const Tap* taps = horizontal + (j - first) * each;
                    const int64_t taps_count = counts[j - first], at = (r * width + j) * channels + c0;
                    vectors(n, [&](int64_t c, auto lanes) {
                        vf sum = {};
                        for (int64_t v = 0; v < count; ++v) {
                            const float* row = image + vertical[v].at * wide * channels + c;
                            vf part = {};
                            for (int64_t h = 0; h < taps_count; ++h)
                                part += taps[h].weight * get(row + taps[h].at * channels, lanes);
                            sum += vertical[v].weight * part;
                        }
                        put(y + at + c, other ? sum + get(other + at + c, lanes) : sum, lanes);
                    });
                }
            }
        }
    });
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
