// Group normalization and its gradient.
//
// The sums run in float64: one pass over the image then gives mean and variance that are good to float32, whatever the
// mean. Images come one after the other, each in two passes; channels are summed `sums_channels` at a time.
#include "doubles.hpp"
#include "elementwise.hpp"
#include "kernels.hpp"

namespace tinytl {
namespace TINYTL_ISA {
namespace {

// Vectors of channels whose sums fill the processor's registers: a row is then read in runs, not a vector at a time.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int vectors_at_once = 4;
#else
constexpr int vectors_at_once = 2;
#endif

// Sums of a and of a b over rows that lie `channels` apart, for N vectors of channels.
template <int N, class Lanes>
__attribute__((noinline)) void sums_of(const float* a, const float* b, int64_t channels, int64_t rows, Lanes lanes,
                                       double* first, double* second) {
    Doubles sum[N], product[N];
    for (int64_t r = 0; r < rows; ++r, a += channels, b += channels) {
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) {
            const Doubles x = wide(get(a + v * W, lanes)), y = a == b ? x : wide(get(b + v * W, lanes));
            accumulate(sum[v], x);
            accumulate(product[v], x, y);
        }
    }
    for (int v = 0; v < N; ++v) {
        double both[2][W];
        sum[v].store_to(both[0]);
        product[v].store_to(both[1]);
        for (int64_t i = 0; i < lanes.n; ++i) first[v * W + i] = both[0][i], second[v * W + i] = both[1][i];
    }
}

// The same for n channels, as `sum_rows` wants them: n sums of a, then n of a b.
inline void two_sums(const float* a, const float* b, int64_t channels, int64_t rows, int64_t n, double* sums) {
    constexpr int N = vectors_at_once;
    int64_t c = 0;
    for (; c + N * W <= n; c += N * W) sums_of<N>(a + c, b + c, channels, rows, All{}, sums + c, sums + n + c);
    for (; c + W <= n; c += W) sums_of<1>(a + c, b + c, channels, rows, All{}, sums + c, sums + n + c);
    if (c < n) sums_of<1>(a + c, b + c, channels, rows, Some{n - c}, sums + c, sums + n + c);
}

// body(channel, group) for the channels [begin, end): a division for each would cost as much as its sums.
template <class Body>
inline void with_groups(int64_t begin, int64_t end, int64_t each, Body&& body) {
    int64_t c = begin;
    for (int64_t g = begin / each; c < end; ++g)
        for (const int64_t last = least(end, (g + 1) * each); c < last; ++c) body(c, g);
}

// The groups whose totals are held at once, behind the sums in thread 0's scratch memory. A multiple of 8, so that the
// bits of their channels begin at a byte.
constexpr int64_t groups_at_once = 2048;
double* totals_of(const Call& call) { return reinterpret_cast<double*>(call.scratch_of(0) + sums_bytes); }

// Per-channel factors for `columns` channels at a time, at the start of a thread's scratch memory.
constexpr int64_t columns = 4096;
float* factors_of(const Call& call, int thread, int64_t number) {
    return reinterpret_cast<float*>(call.scratch_of(thread)) + number * columns;
}

constexpr int64_t ahead = 16 * 16;  // floats from what is written to what is fetched: 16 lines of a cache

// Some channels of rows of one image: where they begin, and the channels of a row. The loops over them are functions of
// their own, whose arguments no write to memory can change: the mask's bytes might be anything's.
struct Rows {
    int64_t rows, n, channels;
};

template <bool Masked>
__attribute__((noinline)) void normalize_rows(const Rows rows, const float* x, float* y, uint8_t* mask,
                                              const float* means, const float* factors, const float* terms,
                                              const Activation activation) {
    for (int64_t r = 0; r < rows.rows; ++r, x += rows.channels, y += rows.channels) {
        vectors(rows.n, [&](int64_t i, auto lanes) {
            const vf centred = get(x + i, lanes) - get(means + i, lanes);
            const vf z = centred * get(factors + i, lanes) + get(terms + i, lanes);
            if (Masked) put_bits(mask, i, lanes.n, activation.bits(z));
            put(y + i, activation(z), lanes);
            fetch_to_write(y + i + ahead);
        });
        if (Masked) mask += mask_bytes(rows.channels);
    }
}

// y = grad a + (x - mean) b + c
__attribute__((noinline)) void gradient_rows(const Rows rows, const float* grad, const float* x, float* y,
                                             const float* a, const float* b, const float* c, const float* mean) {
    for (int64_t r = 0; r < rows.rows; ++r, grad += rows.channels, x += rows.channels, y += rows.channels)
        vectors(rows.n, [&](int64_t i, auto lanes) {
            const vf straight = get(grad + i, lanes) * get(a + i, lanes);
            const vf rest = (get(x + i, lanes) - get(mean + i, lanes)) * get(b + i, lanes) + get(c + i, lanes);
            put(y + i, straight + rest, lanes);
            fetch_to_write(y + i + ahead);
        });
}

}  // namespace

void group_norm(const Call& call) {
    enum { in_x, in_gamma, in_beta, out_y, out_stats, out_mask };
    const float *gamma = call.at<const float>(in_gamma), *beta = call.at<const float>(in_beta);
    const int64_t channels = channels_of(call.tensor(out_y)), pixels = pixels_of(call.tensor(out_y));
    const int64_t groups = static_cast<int64_t>(call.attribute(0)), each = channels / groups;
    const double eps = call.attribute(1), count = static_cast<double>(pixels * each);
    const Activation activation(call, 2);
    for (int64_t image = 0; image < call.images; ++image)
        for (int64_t g0 = 0; g0 < groups; g0 += groups_at_once) {
            const int64_t some = least(groups_at_once, groups - g0), c0 = g0 * each, width = some * each;
            const float* x = call.at<const float>(in_x) + image * pixels * channels + c0;
            float* y = call.at<float>(out_y) + image * pixels * channels + c0;
            uint8_t* mask = call.at<uint8_t>(out_mask);
            if (mask) mask += image * pixels * mask_bytes(channels) + c0 / 8;

            double* totals = totals_of(call);  // sum and sum of squares, then mean and rstd, of each group
            for (int64_t i = 0; i < 2 * some; ++i) totals[i] = 0;
            sum_rows<double, 2>(
                call, pixels, width,
                [&](int64_t begin, int64_t end, int64_t c, int64_t n, double* sums) {
                    const float* first = x + begin * channels + c;
                    two_sums(first, first, channels, end - begin, n, sums);
                },
                [&](int64_t c, int64_t n, const double* sums) {
                    with_groups(c, c + n, each, [&](int64_t at, int64_t g) {
                        totals[2 * g] += sums[at - c];
                        totals[2 * g + 1] += sums[n + at - c];
                    });
                });
            for (int64_t g = 0; g < some; ++g) {
                const double mean = totals[2 * g] / count;
                double variance = totals[2 * g + 1] / count - mean * mean;
                if (variance < 0) variance = 0;  // NaN stays
                totals[2 * g] = mean;
                totals[2 * g + 1] = 1 / __builtin_sqrt(variance + eps);
                if (!call.has(out_stats)) continue;
                float* stats = call.at<float>(out_stats) + (image * groups + g0 + g) * 2;
                stats[0] = static_cast<float>(totals[2 * g]);
                stats[1] = static_cast<float>(totals[2 * g + 1]);
            }

            divide(call, pixels, width, [&](int64_t begin, int64_t end, int thread) {
                float *means = factors_of(call, thread, 0), *factors = factors_of(call, thread, 1);
                float* terms = factors_of(call, thread, 2);
                for (int64_t first = 0; first < width; first += columns) {
                    const int64_t n = least(columns, width - first);
                    with_groups(first, first + n, each, [&](int64_t c, int64_t g) {
                        means[c - first] = static_cast<float>(totals[2 * g]);
                        factors[c - first] = static_cast<float>(totals[2 * g + 1]) * (gamma ? gamma[c0 + c] : 1.0f);
                        terms[c - first] = beta ? beta[c0 + c] : 0.0f;
                    });
                    const int64_t at = begin * channels + first;
                    const Rows rows{end - begin, n, channels};
                    if (mask)
                        normalize_rows<true>(rows, x + at, y + at, mask + begin * mask_bytes(channels) + first / 8,
                                             means, factors, terms, activation);
                    else
                        normalize_rows<false>(rows, x + at, y + at, nullptr, means, factors, terms, activation);
                }
            });
        }
}

void group_norm_grad(const Call& call) {
    enum { in_grad, in_x, in_stats, in_gamma, out_y, add_gamma, add_beta };
    const float* gamma = call.at<const float>(in_gamma);
    float *gamma_grad = call.at<float>(add_gamma), *beta_grad = call.at<float>(add_beta);
    const int64_t channels = channels_of(call.tensor(out_y)), pixels = pixels_of(call.tensor(out_y));
    const int64_t groups = static_cast<int64_t>(call.attribute(0)), each = channels / groups;
    const double count = static_cast<double>(pixels * each);
    for (int64_t image = 0; image < call.images; ++image)
        for (int64_t g0 = 0; g0 < groups; g0 += groups_at_once) {
            const int64_t some = least(groups_at_once, groups - g0), c0 = g0 * each, width = some * each;
            const int64_t start = image * pixels * channels + c0;
            const float *grad = call.at<const float>(in_grad) + start, *x = call.at<const float>(in_x) + start;
            float* y = call.at<float>(out_y) + start;
            const float* stats = call.at<const float>(in_stats) + (image * groups + g0) * 2;

            double* totals = totals_of(call);  // of gamma grad and of gamma grad (x - mean) rstd, each group
            for (int64_t i = 0; i < 2 * some; ++i) totals[i] = 0;
            sum_rows<double, 2>(
                call, pixels, width,
                [&](int64_t begin, int64_t end, int64_t c, int64_t n, double* sums) {
                    const int64_t first = begin * channels + c;
                    two_sums(grad + first, x + first, channels, end - begin, n, sums);
                },
                [&](int64_t c, int64_t n, const double* sums) {
                    with_groups(c, c + n, each, [&](int64_t at, int64_t g) {
                        const int64_t i = at - c;
                        const double mean = static_cast<double>(stats[2 * g]);
                        const double rstd = static_cast<double>(stats[2 * g + 1]);
                        const double dot = (sums[n + i] - mean * sums[i]) * rstd;  // sum of grad (x - mean) rstd
                        const double scale = gamma ? static_cast<double>(gamma[c0 + at]) : 1.0;
                        totals[2 * g] += scale * sums[i];
                        totals[2 * g + 1] += scale * dot;
                        if (gamma_grad) gamma_grad[c0 + at] += static_cast<float>(dot);
                        if (beta_grad) beta_grad[c0 + at] += static_cast<float>(sums[i]);
                    });
                });

            // y = rstd (gamma grad - mean(gamma grad) - (x - mean) rstd mean(...)) = grad a + (x - mean) b + c
            divide(call, pixels, width, [&](int64_t begin, int64_t end, int thread) {
                float* part[4];
                for (int i = 0; i < 4; ++i) part[i] = factors_of(call, thread, i);
                for (int64_t first = 0; first < width; first += columns) {
                    const int64_t n = least(columns, width - first);
                    with_groups(first, first + n, each, [&](int64_t c, int64_t g) {
                        const float rstd = stats[2 * g + 1];
                        const int64_t i = c - first;
                        part[0][i] = rstd * (gamma ? gamma[c0 + c] : 1.0f);
                        part[1][i] = -rstd * rstd * static_cast<float>(totals[2 * g + 1] / count);
                        part[2][i] = -rstd * static_cast<float>(totals[2 * g] / count);
                        part[3][i] = stats[2 * g];
                    });
                    const int64_t at = begin * channels + first;
                    gradient_rows({end - begin, n, channels}, grad + at, x + at, y + at, part[0], part[1], part[2],
                                  part[3]);
                }
            });
        }
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
