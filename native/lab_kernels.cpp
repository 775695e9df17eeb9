// The memory passes that the lab needs and PyTorch has no single operator for:
//
//   activation     y <- clamp-like activation of y, in place, and one bit an element for backward   (1 read, 1 write)
//   masked_grad    g <- g where the bit is set, slope * g elsewhere, and its sum over rows          (1 read, 1 write)
//   max_pool       y <- max over each window of x, and one byte an output element: which pixel won
//   max_pool_grad  dx <- dy at the pixels that won
//
// In stock operators the first two cost three to five passes, and the winners eight bytes an element. A plain C interface, no Python headers: loaded with ctypes, so
// one build serves every Python and every PyTorch. Scratch memory comes from the caller, so that the allocator that
// the ledger watches sees every byte. OpenMP resolves to the runtime that PyTorch has already loaded: one thread pool.
//
// Bit j of byte i belongs to element 8 i + j in memory order. Sums are taken over a fixed number of row chunks and
// added in order, so that the result does not depend on the number of threads.

#include <cstdint>
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

// Geometry of a pooling, channels-last: x (n, h, w, c) -> y (n, oh, ow, c). Pixels beyond the border are never there.
struct Pool {
  int64_t n, c, h, w, oh, ow, kh, kw, sh, sw, ph, pw, dh, dw;
};

// One row of windows. The first pixel inside the image opens; a greater one, or a NaN, takes over.
template <typename T>
inline __attribute__((always_inline)) void pool_row(const T* x, T* y, uint8_t* won, const Pool& p, int64_t row) {
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
inline __attribute__((always_inline)) void pool_grad_row(const T* grad, const uint8_t* won, T* out, const Pool& p,
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
__attribute__((target("avx2"))) void pool_row_avx2(const T* x, T* y, uint8_t* won, const Pool& p, int64_t row) {
  pool_row(x, y, won, p, row);
}
template <typename T>
__attribute__((target("avx2"))) void pool_grad_row_avx2(const T* grad, const uint8_t* won, T* out, const Pool& p,
                                                        int64_t row) {
  pool_grad_row(grad, won, out, p, row);
}
#endif

template <typename T>
void max_pool(const T* x, T* y, uint8_t* won, const Pool& p) {
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
void max_pool_grad(const T* grad, const uint8_t* won, T* out, const Pool& p) {
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

}  // namespace

extern "C" {

int tinytl_lab_abi() { return 2; }

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

// `geometry` holds n, c, h, w, oh, ow, kernel, stride, padding, dilation (height before width); `won` may be null.
void tinytl_max_pool_f32(const float* x, float* y, uint8_t* won, const int64_t* geometry) {
  max_pool(x, y, won, *reinterpret_cast<const Pool*>(geometry));
}

void tinytl_max_pool_f64(const double* x, double* y, uint8_t* won, const int64_t* geometry) {
  max_pool(x, y, won, *reinterpret_cast<const Pool*>(geometry));
}

void tinytl_max_pool_grad_f32(const float* grad, const uint8_t* won, float* out, const int64_t* geometry) {
  max_pool_grad(grad, won, out, *reinterpret_cast<const Pool*>(geometry));
}

void tinytl_max_pool_grad_f64(const double* grad, const uint8_t* won, double* out, const int64_t* geometry) {
  max_pool_grad(grad, won, out, *reinterpret_cast<const Pool*>(geometry));
}

}  // extern "C"
