// Group normalization and its gradient.
//
// The sums run in float64: one pass over the image then gives mean and variance that are good to float32, whatever the
// mean. Images come one after the other, each in two passes; channels are summed `sums_channels` at a time.
#include "elementwise.hpp"
#include "kernels.hpp"

namespace tinytl {
namespace TINYTL_ISA {
namespace {

typedef double vd __attribute__((vector_size(W * sizeof(double))));

static inline vd wide(vf v) { return __builtin_convertvector(v, vd); }

// Two sums over rows [begin, end), for the n channels from c on: pair(row, channel, lanes, a, b) gives what is summed.
template <class Pair>
inline void two_sums(int64_t begin, int64_t end, int64_t c, int64_t n, double* sums, Pair&& pair) {
    vectors(n, [&](int64_t i, auto lanes) {
        vd first = {}, second = {};
        for (int64_t r = begin; r < end; ++r) {
            vf a, b;
            pair(r, c + i, lanes, &a, &b);
            const vd x = wide(a);
            first += x;
            second += x * wide(b);
        }
        for (int64_t k = 0; k < lanes.n; ++k) sums[i + k] = first[k], sums[n + i + k] = second[k];
    });
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
                    two_sums(begin, end, c, n, sums, [&](int64_t r, int64_t at, auto lanes, vf* a, vf* b) {
                        *a = *b = get(x + r * channels + at, lanes);
                    });
                },
                [&](int64_t c, int64_t n, const double* sums) {
                    for (int64_t i = 0; i < n; ++i) {
                        totals[(c + i) / each * 2] += sums[i];
                        totals[(c + i) / each * 2 + 1] += sums[n + i];
                    }
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
                    for (int64_t i = 0; i < n; ++i) {
                        const int64_t c = first + i, g = c / each;
                        means[i] = static_cast<float>(totals[2 * g]);
                        factors[i] = static_cast<float>(totals[2 * g + 1]) * (gamma ? gamma[c0 + c] : 1.0f);
                        terms[i] = beta ? beta[c0 + c] : 0.0f;
                    }
                    for (int64_t r = begin; r < end; ++r)
                        vectors(n, [&](int64_t i, auto lanes) {
                            const int64_t at = r * channels + first + i;
                            const vf centred = get(x + at, lanes) - get(means + i, lanes);
                            const vf z = centred * get(factors + i, lanes) + get(terms + i, lanes);
                            if (mask)
                                put_bits(mask + r * mask_bytes(channels), first + i, lanes.n, activation.bits(z));
                            put(y + at, activation(z), lanes);
                        });
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
                    two_sums(begin, end, c, n, sums, [&](int64_t r, int64_t at, auto lanes, vf* a, vf* b) {
                        *a = get(grad + r * channels + at, lanes);
                        *b = get(x + r * channels + at, lanes);
                    });
                },
                [&](int64_t c, int64_t n, const double* sums) {
                    for (int64_t i = 0; i < n; ++i) {
                        const int64_t at = c + i, g = at / each;
                        const double mean = static_cast<double>(stats[2 * g]);
                        const double rstd = static_cast<double>(stats[2 * g + 1]);
                        const double dot = (sums[n + i] - mean * sums[i]) * rstd;  // sum of grad (x - mean) rstd
                        const double scale = gamma ? static_cast<double>(gamma[c0 + at]) : 1.0;
                        totals[2 * g] += scale * sums[i];
                        totals[2 * g + 1] += scale * dot;
                        if (gamma_grad) gamma_grad[c0 + at] += static_cast<float>(dot);
                        if (beta_grad) beta_grad[c0 + at] += static_cast<float>(sums[i]);
                    }
                });

            // y = rstd (gamma grad - mean(gamma grad) - (x - mean) rstd mean(...)) = grad a + (x - mean) b + c
            divide(call, pixels, width, [&](int64_t begin, int64_t end, int thread) {
                float* part[4];
                for (int i = 0; i < 4; ++i) part[i] = factors_of(call, thread, i);
                for (int64_t first = 0; first < width; first += columns) {
                    const int64_t n = least(columns, width - first);
                    for (int64_t i = 0; i < n; ++i) {
                        const int64_t c = first + i, g = c / each;
                        const float rstd = stats[2 * g + 1];
                        part[0][i] = rstd * (gamma ? gamma[c0 + c] : 1.0f);
                        part[1][i] = -rstd * rstd * static_cast<float>(totals[2 * g + 1] / count);
                        part[2][i] = -rstd * static_cast<float>(totals[2 * g] / count);
                        part[3][i] = stats[2 * g];
                    }
                    for (int64_t r = begin; r < end; ++r)
                        vectors(n, [&](int64_t i, auto lanes) {
                            const int64_t at = r * channels + first + i;
                            const vf centred = get(x + at, lanes) - get(part[3] + i, lanes);
                            const vf straight = get(grad + at, lanes) * get(part[0] + i, lanes);
                            const vf rest = centred * get(part[1] + i, lanes) + get(part[2] + i, lanes);
                            put(y + at, straight + rest, lanes);
                        });
                }
            });
        }
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
