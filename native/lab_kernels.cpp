// The memory passes that the lab needs and PyTorch has no single operator for:
//
//   activation     y <- clamp-like activation of y, in place, and one bit an element for backward   (1 read, 1 write)
//   masked_grad    g <- g where the bit is set, slope * g elsewhere, and its sum over rows          (1 read, 1 write)
//   max_pool       y <- max over each window of x, and one byte an output element: which pixel won
//   max_pool_grad  dx <- dy at the pixels that won
//   group_norm, group_norm_grad     y and dx in the place of x and dy
//   depthwise_weight_grad           dw <- sum over the pixels of dy x, a tap at a time, without partial sums of dw
//   gather_windows, scatter_windows the pixels that each window reads as rows of a matrix, and such rows added up
//
// In stock operators the first two cost three to five passes, the winners eight bytes an element, group norm's gradient
// a tensor beside its argument, and a depthwise weight's gradient 257 times the weight. A plain C interface, no Python
// headers: loaded with ctypes, so one build serves every Python and every PyTorch. Scratch memory comes from the
// caller, so that the allocator that the ledger watches sees every byte. OpenMP resolves to the runtime that PyTorch
// has already loaded: one thread pool.
//
// Images are channels-last. Bit j of byte i belongs to element 8 i + j in memory order. Sums are taken over a fixed
// number of row chunks and added in order, so that the result does not depend on the number of threads.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#define TINYTL_AVX2 1
#endif

namespace {

constexpr int64_t kParallelFrom = 1 << 15;  // elements; below this a parallel region costs more than it saves

template <typename T>
inline bool activate_one(T& v, T lo, T hi, T slope) {
  const bool below = v <= lo;
  const bool above = v >= hi && hi < std::numeric_limits<T>::infinity();
  if (below) v = slope == T(0) ? lo : lo + slope * (v - lo);  // 0 * -inf is a NaN
  else if (above) v = hi;
  return !below && !above;  // a NaN is neither: it stays, and its gradient passes, as in PyTorch
}

// Elements [begin, end), begin a multiple of 8. `mask` may be null: inference keeps nothing.
template <typename T>
void activate_range(T* y, int64_t begin, int64_t end, uint8_t* mask, T lo, T hi, T slope) {
  for (int64_t i = begin; i < end; i += 8) {
    const int64_t stop = i + 8 < end ? i + 8 : end;
    unsigned bits = 0;
    for (int64_t j = i; j < stop; ++j) bits |= unsigned(activate_one(y[j], lo, hi, slope)) << (j - i);
    if (mask) mask[i >> 3] = uint8_t(bits);
  }
}

template <typename T>
void masked_rows(const T* in, T* out, int64_t begin, int64_t end, int64_t channels, const uint8_t* mask, T slope,
                 T* sums) {
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = r * channels + c;
      const bool pass = (mask[i >> 3] >> (i & 7)) & 1;
      const T v = pass ? in[i] : (slope == T(0) ? T(0) : slope * in[i]);
      out[i] = v;
      if (sums) sums[c] += v;
    }
  }
}

#ifdef TINYTL_AVX2
bool has_avx2() {
  static const bool yes = __builtin_cpu_supports("avx2");
  return yes;
}

bool has_avx2_and_fma() {
  static const bool yes = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return yes;
}

__attribute__((target("avx2"))) void activate_blocks_avx2(float* y, int64_t blocks, uint8_t* mask, float lo, float hi,
                                                          float slope) {
  const __m256 low = _mm256_set1_ps(lo), high = _mm256_set1_ps(hi), factor = _mm256_set1_ps(slope);
  const bool bounded = hi < std::numeric_limits<float>::infinity();
  const __m256 unbounded = _mm256_castsi256_ps(_mm256_set1_epi32(bounded ? 0 : -1));
  for (int64_t i = 0; i < blocks; ++i) {
    const __m256 v = _mm256_loadu_ps(y + 8 * i);
    if (mask) {
      // "not at or below" and "not at or above": both hold for a NaN
      const __m256 under = _mm256_or_ps(_mm256_cmp_ps(v, high, _CMP_NGE_UQ), unbounded);
      const __m256 pass = _mm256_and_ps(_mm256_cmp_ps(v, low, _CMP_NLE_UQ), under);
      mask[i] = uint8_t(_mm256_movemask_ps(pass));
    }
    // max and min return their second operand when either is a NaN: v goes second, so a NaN stays a NaN.
    __m256 out = _mm256_min_ps(high, _mm256_max_ps(low, v));
    if (slope != 0.0f) {
      const __m256 below = _mm256_add_ps(low, _mm256_mul_ps(factor, _mm256_sub_ps(v, low)));
      out = _mm256_blendv_ps(out, below, _mm256_cmp_ps(v, low, _CMP_LE_OQ));
    }
    _mm256_storeu_ps(y + 8 * i, out);
  }
}

// channels is a multiple of 8, so every row starts on a whole byte of the mask.
__attribute__((target("avx2"))) void masked_rows_avx2(const float* in, float* out, int64_t begin, int64_t end,
                                                      int64_t channels, const uint8_t* mask, float slope,
                                                      float* sums) {
  const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256 factor = _mm256_set1_ps(slope);
  for (int64_t r = begin; r < end; ++r) {
    const uint8_t* bits = mask + r * (channels / 8);
    const float* from = in + r * channels;
    float* to = out + r * channels;
    for (int64_t c = 0; c < channels; c += 8) {
      const __m256i on = _mm256_and_si256(_mm256_set1_epi32(bits[c / 8]), lanes);
      const __m256 pass = _mm256_castsi256_ps(_mm256_cmpeq_epi32(on, lanes));
      const __m256 g = _mm256_loadu_ps(from + c);
      const __m256 v = slope == 0.0f ? _mm256_and_ps(pass, g) : _mm256_blendv_ps(_mm256_mul_ps(factor, g), g, pass);
      _mm256_storeu_ps(to + c, v);
      if (sums) _mm256_storeu_ps(sums + c, _mm256_add_ps(_mm256_loadu_ps(sums + c), v));
    }
  }
}
#endif

void activate_part(float* y, int64_t begin, int64_t end, uint8_t* mask, float lo, float hi, float slope) {
#ifdef TINYTL_AVX2
  if (has_avx2()) {
    const int64_t blocks = (end - begin) / 8;
    activate_blocks_avx2(y + begin, blocks, mask ? mask + begin / 8 : nullptr, lo, hi, slope);
    begin += blocks * 8;
  }
#endif
  activate_range(y, begin, end, mask, lo, hi, slope);
}

void activate_part(double* y, int64_t begin, int64_t end, uint8_t* mask, double lo, double hi, double slope) {
  activate_range(y, begin, end, mask, lo, hi, slope);
}

void masked_part(const float* in, float* out, int64_t begin, int64_t end, int64_t channels, const uint8_t* mask,
                 float slope, float* sums) {
#ifdef TINYTL_AVX2
  if (channels % 8 == 0 && has_avx2()) return masked_rows_avx2(in, out, begin, end, channels, mask, slope, sums);
#endif
  masked_rows(in, out, begin, end, channels, mask, slope, sums);
}

void masked_part(const double* in, double* out, int64_t begin, int64_t end, int64_t channels, const uint8_t* mask,
                 double slope, double* sums) {
  masked_rows(in, out, begin, end, channels, mask, slope, sums);
}

template <typename T>
void activation(T* y, int64_t count, uint8_t* mask, T lo, T hi, T slope) {
  constexpr int64_t kPart = 1 << 14;  // elements; a multiple of 8
  const int64_t parts = (count + kPart - 1) / kPart;
#pragma omp parallel for schedule(static) if (count >= kParallelFrom)
  for (int64_t p = 0; p < parts; ++p) {
    const int64_t begin = p * kPart;
    activate_part(y, begin, begin + kPart < count ? begin + kPart : count, mask, lo, hi, slope);
  }
}

// `partial` holds chunks x channels elements of scratch when sums are wanted; `sums` holds channels.
template <typename T>
void masked_grad(const T* in, T* out, int64_t rows, int64_t channels, const uint8_t* mask, T slope, T* partial,
                 int64_t chunks, T* sums) {
  const int64_t each = (rows + chunks - 1) / chunks;
#pragma omp parallel for schedule(static) if (rows * channels >= kParallelFrom)
  for (int64_t k = 0; k < chunks; ++k) {
    T* own = sums ? partial + k * channels : nullptr;
    if (own) for (int64_t c = 0; c < channels; ++c) own[c] = T(0);
    const int64_t begin = k * each;
    const int64_t end = begin + each < rows ? begin + each : rows;
    if (begin < end) masked_part(in, out, begin, end, channels, mask, slope, own);
  }
  if (!sums) return;
  for (int64_t c = 0; c < channels; ++c) {
    double total = 0.0;
    for (int64_t k = 0; k < chunks; ++k) total += double(partial[k * channels + c]);
    sums[c] = T(total);
  }
}

// Geometry of a pooling or a depthwise convolution, channels-last: x (n, h, w, c) -> y (n, oh, ow, c). Pixels beyond the border are never there.
struct Windows {
  int64_t n, c, h, w, oh, ow, kh, kw, sh, sw, ph, pw, dh, dw;
};

// One row of windows. The first pixel inside the image opens; a greater one, or a NaN, takes over.
template <typename T>
inline __attribute__((always_inline)) void pool_row(const T* x, T* y, uint8_t* won, const Windows& p, int64_t row) {
  const int64_t image = row / p.oh, top = (row % p.oh) * p.sh - p.ph;
  for (int64_t o = 0; o < p.ow; ++o) {
    T* best = y + (row * p.ow + o) * p.c;
    uint8_t* tap_of = won ? won + (row * p.ow + o) * p.c : nullptr;
    const int64_t left = o * p.sw - p.pw;
    bool open = false;
    for (int64_t a = 0; a < p.kh; ++a) {
      const int64_t i = top + a * p.dh;
      if (i < 0 || i >= p.h) continue;
      for (int64_t b = 0; b < p.kw; ++b) {
        const int64_t j = left + b * p.dw;
        if (j < 0 || j >= p.w) continue;
        const T* in = x + ((image * p.h + i) * p.w + j) * p.c;
        const uint8_t tap = uint8_t(a * p.kw + b);
        for (int64_t c = 0; c < p.c; ++c) {
          const bool takes = !open | (in[c] > best[c]) | (in[c] != in[c]);
          best[c] = takes ? in[c] : best[c];
          if (tap_of) tap_of[c] = takes ? tap : tap_of[c];
        }
        open = true;
      }
    }
  }
}

// One row of the image: what each pixel gets from the windows that it is in.
template <typename T>
inline __attribute__((always_inline)) void pool_grad_row(const T* grad, const uint8_t* won, T* out, const Windows& p,
                                                         int64_t row) {
  const int64_t image = row / p.h, i = row % p.h;
  for (int64_t j = 0; j < p.w; ++j) {
    T* to = out + (row * p.w + j) * p.c;
    for (int64_t c = 0; c < p.c; ++c) to[c] = T(0);
    for (int64_t a = 0; a < p.kh; ++a) {
      const int64_t down = i + p.ph - a * p.dh;
      if (down < 0 || down % p.sh || down / p.sh >= p.oh) continue;
      for (int64_t b = 0; b < p.kw; ++b) {
        const int64_t right = j + p.pw - b * p.dw;
        if (right < 0 || right % p.sw || right / p.sw >= p.ow) continue;
        const int64_t at = ((image * p.oh + down / p.sh) * p.ow + right / p.sw) * p.c;
        const uint8_t tap = uint8_t(a * p.kw + b);
        for (int64_t c = 0; c < p.c; ++c) to[c] += won[at + c] == tap ? grad[at + c] : T(0);
      }
    }
  }
}

#ifdef TINYTL_AVX2
template <typename T>
__attribute__((target("avx2"))) void pool_row_avx2(const T* x, T* y, uint8_t* won, const Windows& p, int64_t row) {
  pool_row(x, y, won, p, row);
}
template <typename T>
__attribute__((target("avx2"))) void pool_grad_row_avx2(const T* grad, const uint8_t* won, T* out, const Windows& p,
                                                        int64_t row) {
  pool_grad_row(grad, won, out, p, row);
}
#endif

template <typename T>
void max_pool(const T* x, T* y, uint8_t* won, const Windows& p) {
  const int64_t rows = p.n * p.oh;
#pragma omp parallel for schedule(static) if (rows * p.ow * p.c * p.kh * p.kw >= kParallelFrom)
  for (int64_t row = 0; row < rows; ++row) {
#ifdef TINYTL_AVX2
    if (has_avx2()) {
      pool_row_avx2(x, y, won, p, row);
      continue;
    }
#endif
    pool_row(x, y, won, p, row);
  }
}

template <typename T>
void max_pool_grad(const T* grad, const uint8_t* won, T* out, const Windows& p) {
  const int64_t rows = p.n * p.h;
#pragma omp parallel for schedule(static) if (rows * p.w * p.c >= kParallelFrom)
  for (int64_t row = 0; row < rows; ++row) {
#ifdef TINYTL_AVX2
    if (has_avx2()) {
      pool_grad_row_avx2(grad, won, out, p, row);
      continue;
    }
#endif
    pool_grad_row(grad, won, out, p, row);
  }
}

#define TINYTL_INLINE inline __attribute__((always_inline))

// Group norm. No element depends on another one, also where the result takes its argument's place: hence ivdep.
// Scratch of one image: `chunks` (at least 2) times 2 c partial sums; for the gradient, c means before them.

template <typename T>
TINYTL_INLINE void moments_rows(const T* x, int64_t rows, int64_t c, double* sum, double* square) {
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC ivdep
    for (int64_t k = 0; k < c; ++k) {
      const double v = double(x[r * c + k]);
      sum[k] += v;
      square[k] += v * v;
    }
  }
}

template <typename T>
TINYTL_INLINE void affine_rows(const T* x, T* y, int64_t rows, int64_t c, const T* scale, const T* shift) {
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC ivdep
    for (int64_t k = 0; k < c; ++k) y[r * c + k] = scale[k] * x[r * c + k] + shift[k];
  }
}

// dy[k] += g, dot[k] += g (x - mean)
template <typename T>
TINYTL_INLINE void products_rows(const T* grad, const T* x, int64_t rows, int64_t c, const T* mean, T* sum, T* dot) {
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC ivdep
    for (int64_t k = 0; k < c; ++k) {
      const T g = grad[r * c + k];
      sum[k] += g;
      dot[k] += g * (x[r * c + k] - mean[k]);
    }
  }
}

template <typename T>
TINYTL_INLINE void mix_rows(const T* grad, const T* x, T* out, int64_t rows, int64_t c, const T* by_grad,
                            const T* by_x, const T* shift) {
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC ivdep
    for (int64_t k = 0; k < c; ++k) {
      out[r * c + k] = by_grad[k] * grad[r * c + k] + (by_x[k] * x[r * c + k] + shift[k]);
    }
  }
}

#ifdef TINYTL_AVX2
#define TINYTL_WITH_AVX2 __attribute__((target("avx2,fma")))
template <typename T>
TINYTL_WITH_AVX2 void moments_rows_avx2(const T* x, int64_t rows, int64_t c, double* sum, double* square) {
  moments_rows(x, rows, c, sum, square);
}
template <typename T>
TINYTL_WITH_AVX2 void affine_rows_avx2(const T* x, T* y, int64_t rows, int64_t c, const T* scale, const T* shift) {
  affine_rows(x, y, rows, c, scale, shift);
}
template <typename T>
TINYTL_WITH_AVX2 void products_rows_avx2(const T* grad, const T* x, int64_t rows, int64_t c, const T* mean, T* sum,
                                         T* dot) {
  products_rows(grad, x, rows, c, mean, sum, dot);
}
template <typename T>
TINYTL_WITH_AVX2 void mix_rows_avx2(const T* grad, const T* x, T* out, int64_t rows, int64_t c, const T* by_grad,
                                    const T* by_x, const T* shift) {
  mix_rows(grad, x, out, rows, c, by_grad, by_x, shift);
}
#define TINYTL_BEST(name, ...)                                  \
  do {                                                          \
    if (has_avx2_and_fma()) name##_avx2(__VA_ARGS__);           \
    else name(__VA_ARGS__);                                     \
  } while (false)
#else
#define TINYTL_BEST(name, ...) name(__VA_ARGS__)
#endif

// x, y (n, sides, c), one memory or two; without y the statistics alone. mean, rstd (n, groups); scratch n * chunks * 2 c doubles.
template <typename T>
void group_norm(const T* x, T* y, const T* gamma, const T* beta, T* mean, T* rstd, int64_t n, int64_t sides, int64_t c,
                int64_t groups, double eps, double* scratch, int64_t chunks) {
  const int64_t each = (sides + chunks - 1) / chunks, wide = c / groups;
  const bool parallel = n * sides * c >= kParallelFrom;
#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t part = 0; part < n * chunks; ++part) {
    const int64_t begin = (part % chunks) * each, end = begin + each < sides ? begin + each : sides;
    double* own = scratch + part * 2 * c;
    for (int64_t k = 0; k < 2 * c; ++k) own[k] = 0.0;
    if (begin >= end) continue;
    TINYTL_BEST(moments_rows, x + (part / chunks * sides + begin) * c, end - begin, c, own, own + c);
  }
  for (int64_t i = 0; i < n; ++i) {
    double* own = scratch + i * chunks * 2 * c;
    for (int64_t k = 1; k < chunks; ++k) {
      for (int64_t j = 0; j < 2 * c; ++j) own[j] += own[k * 2 * c + j];
    }
    T* scale = reinterpret_cast<T*>(own + 2 * c);  // the second chunk's sums are added: their place is free
    T* shift = scale + c;
    for (int64_t g = 0; g < groups; ++g) {
      double sum = 0.0, square = 0.0;
      for (int64_t k = g * wide; k < (g + 1) * wide; ++k) {
        sum += own[k];
        square += own[c + k];
      }
      const double count = double(wide * sides), m = sum / count;
      double variance = square / count - m * m;
      if (variance < 0.0) variance = 0.0;
      const double r = 1.0 / std::sqrt(variance + eps);
      mean[i * groups + g] = T(m);
      rstd[i * groups + g] = T(r);
      for (int64_t k = g * wide; k < (g + 1) * wide; ++k) {
        const double s = gamma ? double(gamma[k]) * r : r;
        scale[k] = T(s);
        shift[k] = T((beta ? double(beta[k]) : 0.0) - s * m);
      }
    }
  }
  if (!y) return;
#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t part = 0; part < n * chunks; ++part) {
    const int64_t begin = (part % chunks) * each, end = begin + each < sides ? begin + each : sides;
    const int64_t from = (part / chunks * sides + begin) * c;
    const T* scale = reinterpret_cast<const T*>(scratch + part / chunks * chunks * 2 * c + 2 * c);
    if (begin < end) TINYTL_BEST(affine_rows, x + from, y + from, end - begin, c, scale, scale + c);
  }
}

// grad, x, out (n, sides, c); `out` may be `grad`, or null. scratch n * (1 + 2 chunks) * c; grad_gamma, grad_beta (c).
template <typename T>
void group_norm_grad(const T* grad, const T* x, T* out, const T* gamma, const T* mean, const T* rstd, T* grad_gamma,
                     T* grad_beta, int64_t n, int64_t sides, int64_t c, int64_t groups, T* scratch, int64_t chunks) {
  const int64_t each = (sides + chunks - 1) / chunks, wide = c / groups, room = (1 + 2 * chunks) * c;
  const bool parallel = n * sides * c >= kParallelFrom;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < c; ++k) scratch[i * room + k] = mean[i * groups + k / wide];
  }
#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t part = 0; part < n * chunks; ++part) {
    const int64_t i = part / chunks, chunk = part % chunks;
    const int64_t begin = chunk * each, end = begin + each < sides ? begin + each : sides;
    T* own = scratch + i * room + (1 + 2 * chunk) * c;
    for (int64_t k = 0; k < 2 * c; ++k) own[k] = T(0);
    const int64_t from = (i * sides + begin) * c;
    if (begin >= end) continue;
    TINYTL_BEST(products_rows, grad + from, x + from, end - begin, c, scratch + i * room, own, own + c);
  }
  for (int64_t k = 0; k < c; ++k) {  // of each image: the sums of its chunks, in the first chunk's place
    double sums = 0.0, dots = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      T* own = scratch + i * room + c;
      double sum = 0.0, dot = 0.0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        sum += double(own[2 * chunk * c + k]);
        dot += double(own[(2 * chunk + 1) * c + k]);
      }
      own[k] = T(sum);
      own[c + k] = T(dot);
      sums += sum;
      dots += dot * double(rstd[i * groups + k / wide]);
    }
    if (grad_gamma) grad_gamma[k] = T(dots);
    if (grad_beta) grad_beta[k] = T(sums);
  }
  if (!out) return;
  for (int64_t i = 0; i < n; ++i) {
    T* shift = scratch + i * room;  // where the means were, and then what grad and x are multiplied by
    T* by_grad = shift + c;
    T* by_x = by_grad + c;
    for (int64_t g = 0; g < groups; ++g) {
      const double m = double(mean[i * groups + g]), r = double(rstd[i * groups + g]), count = double(wide * sides);
      double sum = 0.0, dot = 0.0;
      for (int64_t k = g * wide; k < (g + 1) * wide; ++k) {
        const double s = gamma ? double(gamma[k]) : 1.0;
        sum += s * double(by_grad[k]);
        dot += s * double(by_x[k]);
      }
      const double along = -dot * r * r * r / count;
      for (int64_t k = g * wide; k < (g + 1) * wide; ++k) {
        shift[k] = T(-along * m - sum * r / count);
        by_grad[k] = T(gamma ? double(gamma[k]) * r : r);
        by_x[k] = T(along);
      }
    }
  }
#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t part = 0; part < n * chunks; ++part) {
    const int64_t begin = (part % chunks) * each, end = begin + each < sides ? begin + each : sides;
    const int64_t from = (part / chunks * sides + begin) * c;
    const T* shift = scratch + part / chunks * room;
    if (begin >= end) continue;
    TINYTL_BEST(mix_rows, grad + from, x + from, out + from, end - begin, c, shift + c, shift + 2 * c, shift);
  }
}

// The gradient of `kLanes` channels' weights from `channel` on, at `kTaps` taps of kernel row `row` from `tap` on. A row
// of windows is summed in the type itself, in registers; the rows in double. out (c, kh, kw).
template <typename T, int kTaps, int kLanes>
TINYTL_INLINE void tap_sums(const T* grad, const T* x, T* out, const Windows& p, int64_t channel, int64_t row,
                            int64_t tap) {
  double total[kTaps][kLanes] = {};
  // the windows of which every tap of these lies inside the image
  const int64_t first = tap * p.dw - p.pw, last = (tap + kTaps - 1) * p.dw - p.pw;
  int64_t inner = first < 0 ? (-first + p.sw - 1) / p.sw : 0;
  int64_t outer = last < p.w ? (p.w - 1 - last) / p.sw + 1 : 0;
  if (outer > p.ow) outer = p.ow;
  if (inner > outer) inner = outer;
  for (int64_t image = 0; image < p.n; ++image) {
    for (int64_t o = 0; o < p.oh; ++o) {
      const int64_t i = o * p.sh - p.ph + row * p.dh;
      if (i < 0 || i >= p.h) continue;
      const T* from = grad + (image * p.oh + o) * p.ow * p.c + channel;
      const T* line = x + (image * p.h + i) * p.w * p.c + channel;
      T sums[kTaps][kLanes] = {};
      for (int64_t j = inner; j < outer; ++j) {
        const T* g = from + j * p.c;
        const T* at = line + (j * p.sw + first) * p.c;
#pragma GCC unroll 8
        for (int b = 0; b < kTaps; ++b) {
          for (int k = 0; k < kLanes; ++k) sums[b][k] += g[k] * at[b * p.dw * p.c + k];
        }
      }
      for (int side = 0; side < 2; ++side) {
        const int64_t stop = side ? p.ow : inner;
        for (int64_t j = side ? outer : 0; j < stop; ++j) {
          for (int b = 0; b < kTaps; ++b) {
            const int64_t pixel = j * p.sw + first + b * p.dw;
            if (pixel < 0 || pixel >= p.w) continue;
            for (int k = 0; k < kLanes; ++k) sums[b][k] += from[j * p.c + k] * line[pixel * p.c + k];
          }
        }
      }
      for (int b = 0; b < kTaps; ++b) {
        for (int k = 0; k < kLanes; ++k) total[b][k] += double(sums[b][k]);
      }
    }
  }
  for (int b = 0; b < kTaps; ++b) {
    for (int k = 0; k < kLanes; ++k) out[((channel + k) * p.kh + row) * p.kw + tap + b] = T(total[b][k]);
  }
}

template <typename T, int kTaps>
TINYTL_INLINE void tap_block(const T* grad, const T* x, T* out, const Windows& p, int64_t begin, int64_t end,
                             int64_t row, int64_t tap) {
  constexpr int kWide = 64 / sizeof(T);
  for (; begin + kWide <= end; begin += kWide) tap_sums<T, kTaps, kWide>(grad, x, out, p, begin, row, tap);
  for (; begin + kWide / 2 <= end; begin += kWide / 2) {
    tap_sums<T, kTaps, kWide / 2>(grad, x, out, p, begin, row, tap);
  }
  for (; begin < end; ++begin) tap_sums<T, kTaps, 1>(grad, x, out, p, begin, row, tap);
}

template <typename T>
TINYTL_INLINE void tap_row(const T* grad, const T* x, T* out, const Windows& p, int64_t begin, int64_t end,
                           int64_t row) {
  int64_t tap = 0;
  for (; p.kw - tap >= 7; tap += 7) tap_block<T, 7>(grad, x, out, p, begin, end, row, tap);
  for (; p.kw - tap >= 5; tap += 5) tap_block<T, 5>(grad, x, out, p, begin, end, row, tap);
  for (; p.kw - tap >= 3; tap += 3) tap_block<T, 3>(grad, x, out, p, begin, end, row, tap);
  for (; p.kw > tap; ++tap) tap_block<T, 1>(grad, x, out, p, begin, end, row, tap);
}

#ifdef TINYTL_AVX2
template <typename T>
TINYTL_WITH_AVX2 void tap_row_avx2(const T* grad, const T* x, T* out, const Windows& p, int64_t begin, int64_t end,
                                   int64_t row) {
  tap_row(grad, x, out, p, begin, end, row);
}
#endif

template <typename T>
void depthwise_weight_grad(const T* grad, const T* x, T* out, const Windows& p) {
  constexpr int64_t kWide = 64 / sizeof(T);
  const int64_t blocks = (p.c + kWide - 1) / kWide;
#pragma omp parallel for schedule(static) if (p.n * p.oh * p.ow * p.c * p.kh * p.kw >= kParallelFrom)
  for (int64_t task = 0; task < blocks * p.kh; ++task) {
    const int64_t begin = task / p.kh * kWide, end = begin + kWide < p.c ? begin + kWide : p.c;
    TINYTL_BEST(tap_row, grad, x, out, p, begin, end, task % p.kh);
  }
}

// Channels [first, first + count) of x (n, h, w, c) -> matrix (n * oh * ow, kh, kw, count): zeros beyond the border.
template <typename T>
void gather_windows(const T* x, T* matrix, const Windows& p, int64_t first, int64_t count) {
  const int64_t rows = p.n * p.oh, taps = p.kh * p.kw;
#pragma omp parallel for schedule(static) if (rows * p.ow * taps * count >= kParallelFrom)
  for (int64_t row = 0; row < rows; ++row) {
    T* to = matrix + row * p.ow * taps * count;
    const int64_t image = row / p.oh, top = (row % p.oh) * p.sh - p.ph;
    for (int64_t o = 0; o < p.ow; ++o) {
      for (int64_t a = 0; a < p.kh; ++a) {
        const int64_t i = top + a * p.dh;
        for (int64_t b = 0; b < p.kw; ++b, to += count) {
          const int64_t j = o * p.sw - p.pw + b * p.dw;
          if (i < 0 || i >= p.h || j < 0 || j >= p.w) std::memset(to, 0, count * sizeof(T));
          else std::memcpy(to, x + ((image * p.h + i) * p.w + j) * p.c + first, count * sizeof(T));
        }
      }
    }
  }
}

// One row of the image: what each pixel gets from the windows that read it.
template <typename T>
TINYTL_INLINE void scatter_row(const T* matrix, T* out, const Windows& p, int64_t first, int64_t count, int64_t row) {
  const int64_t image = row / p.h, i = row % p.h;
  for (int64_t j = 0; j < p.w; ++j) {
    T* to = out + (row * p.w + j) * p.c + first;
    for (int64_t k = 0; k < count; ++k) to[k] = T(0);
    for (int64_t a = 0; a < p.kh; ++a) {
      const int64_t down = i + p.ph - a * p.dh;
      if (down < 0 || down % p.sh || down / p.sh >= p.oh) continue;
      for (int64_t b = 0; b < p.kw; ++b) {
        const int64_t right = j + p.pw - b * p.dw;
        if (right < 0 || right % p.sw || right / p.sw >= p.ow) continue;
        const int64_t window = (image * p.oh + down / p.sh) * p.ow + right / p.sw;
        const T* from = matrix + ((window * p.kh + a) * p.kw + b) * count;
        for (int64_t k = 0; k < count; ++k) to[k] += from[k];
      }
    }
  }
}

#ifdef TINYTL_AVX2
template <typename T>
TINYTL_WITH_AVX2 void scatter_row_avx2(const T* matrix, T* out, const Windows& p, int64_t first, int64_t count,
                                       int64_t row) {
  scatter_row(matrix, out, p, first, count, row);
}
#endif

template <typename T>
void scatter_windows(const T* matrix, T* out, const Windows& p, int64_t first, int64_t count) {
#pragma omp parallel for schedule(static) if (p.n * p.oh * p.ow * p.kh * p.kw * count >= kParallelFrom)
  for (int64_t row = 0; row < p.n * p.h; ++row) TINYTL_BEST(scatter_row, matrix, out, p, first, count, row);
}

}  // namespace

extern "C" {

int tinytl_lab_abi() { return 4; }

void tinytl_activation_f32(float* y, int64_t count, uint8_t* mask, double lo, double hi, double slope) {
  activation<float>(y, count, mask, float(lo), float(hi), float(slope));
}

void tinytl_activation_f64(double* y, int64_t count, uint8_t* mask, double lo, double hi, double slope) {
  activation<double>(y, count, mask, lo, hi, slope);
}

void tinytl_masked_grad_f32(const float* in, float* out, int64_t rows, int64_t channels, const uint8_t* mask,
                            double slope, float* partial, int64_t chunks, float* sums) {
  masked_grad<float>(in, out, rows, channels, mask, float(slope), partial, chunks, sums);
}

void tinytl_masked_grad_f64(const double* in, double* out, int64_t rows, int64_t channels, const uint8_t* mask,
                            double slope, double* partial, int64_t chunks, double* sums) {
  masked_grad<double>(in, out, rows, channels, mask, slope, partial, chunks, sums);
}

// `geometry` is a Windows: n, c, h, w, oh, ow, kernel, stride, padding, dilation, height first. `won` may be null.
void tinytl_max_pool_f32(const float* x, float* y, uint8_t* won, const int64_t* geometry) {
  max_pool(x, y, won, *reinterpret_cast<const Windows*>(geometry));
}

void tinytl_max_pool_f64(const double* x, double* y, uint8_t* won, const int64_t* geometry) {
  max_pool(x, y, won, *reinterpret_cast<const Windows*>(geometry));
}

void tinytl_max_pool_grad_f32(const float* grad, const uint8_t* won, float* out, const int64_t* geometry) {
  max_pool_grad(grad, won, out, *reinterpret_cast<const Windows*>(geometry));
}

void tinytl_max_pool_grad_f64(const double* grad, const uint8_t* won, double* out, const int64_t* geometry) {
  max_pool_grad(grad, won, out, *reinterpret_cast<const Windows*>(geometry));
}

void tinytl_group_norm_f32(const float* x, float* y, const float* gamma, const float* beta, float* mean, float* rstd,
                           int64_t n, int64_t sides, int64_t c, int64_t groups, double eps, double* scratch,
                           int64_t chunks) {
  group_norm(x, y, gamma, beta, mean, rstd, n, sides, c, groups, eps, scratch, chunks);
}

void tinytl_group_norm_f64(const double* x, double* y, const double* gamma, const double* beta, double* mean, double* rstd,
                           int64_t n, int64_t sides, int64_t c, int64_t groups, double eps, double* scratch,
                           int64_t chunks) {
  group_norm(x, y, gamma, beta, mean, rstd, n, sides, c, groups, eps, scratch, chunks);
}

void tinytl_group_norm_grad_f32(const float* grad, const float* x, float* out, const float* gamma, const float* mean,
                                const float* rstd, float* grad_gamma, float* grad_beta, int64_t n, int64_t sides,
                                int64_t c, int64_t groups, float* scratch, int64_t chunks) {
  group_norm_grad(grad, x, out, gamma, mean, rstd, grad_gamma, grad_beta, n, sides, c, groups, scratch, chunks);
}

void tinytl_group_norm_grad_f64(const double* grad, const double* x, double* out, const double* gamma, const double* mean,
                                const double* rstd, double* grad_gamma, double* grad_beta, int64_t n, int64_t sides,
                                int64_t c, int64_t groups, double* scratch, int64_t chunks) {
  group_norm_grad(grad, x, out, gamma, mean, rstd, grad_gamma, grad_beta, n, sides, c, groups, scratch, chunks);
}

void tinytl_depthwise_weight_grad_f32(const float* grad, const float* x, float* out, const int64_t* geometry) {
  depthwise_weight_grad(grad, x, out, *reinterpret_cast<const Windows*>(geometry));
}

void tinytl_depthwise_weight_grad_f64(const double* grad, const double* x, double* out, const int64_t* geometry) {
  depthwise_weight_grad(grad, x, out, *reinterpret_cast<const Windows*>(geometry));
}

void tinytl_gather_windows_f32(const float* from, float* to, const int64_t* geometry, int64_t first, int64_t count) {
  gather_windows(from, to, *reinterpret_cast<const Windows*>(geometry), first, count);
}

void tinytl_gather_windows_f64(const double* from, double* to, const int64_t* geometry, int64_t first, int64_t count) {
  gather_windows(from, to, *reinterpret_cast<const Windows*>(geometry), first, count);
}

void tinytl_scatter_windows_f32(const float* from, float* to, const int64_t* geometry, int64_t first, int64_t count) {
  scatter_windows(from, to, *reinterpret_cast<const Windows*>(geometry), first, count);
}

void tinytl_scatter_windows_f64(const double* from, double* to, const int64_t* geometry, int64_t first, int64_t count) {
  scatter_windows(from, to, *reinterpret_cast<const Windows*>(geometry), first, count);
}

}  // extern "C"
