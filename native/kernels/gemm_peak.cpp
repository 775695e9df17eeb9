// What the processor's multiply-add units reach at best: the measure by which the executor's own GEMM is judged.
#include <chrono>

#include "kernels.hpp"

namespace tinytl {
namespace TINYTL_ISA {
namespace {

// Register tile: ROWS x COLS vectors of sums, as many as the registers hold beside one row of B and one value of A.
#if defined(__AVX512F__)
constexpr int ROWS = 14, COLS = 2;  // of 32 registers
#elif defined(__aarch64__)
constexpr int ROWS = 8, COLS = 3;  // of 32
#elif defined(__AVX2__)
constexpr int ROWS = 6, COLS = 2;  // of 16
#else
constexpr int ROWS = 4, COLS = 2;
#endif
constexpr int DEPTH = 64;  // A and B together stay in the first cache

// c += a b, `times` times over; a: (DEPTH, ROWS), b: (DEPTH, COLS W), c: (ROWS, COLS W).
void multiply(const float* a, const float* b, float* c, int64_t times) {
    vf sum[ROWS][COLS] = {};
    for (int64_t t = 0; t < times; ++t) {
        for (int k = 0; k < DEPTH; ++k) {
            vf row[COLS];
            for (int j = 0; j < COLS; ++j) row[j] = load(b + (k * COLS + j) * W);
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; ++i)
                for (int j = 0; j < COLS; ++j) sum[i][j] += set1(a[k * ROWS + i]) * row[j];
        }
    }
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < COLS; ++j) store(c + (i * COLS + j) * W, load(c + (i * COLS + j) * W) + sum[i][j]);
}

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

double gemm_peak(Threads& threads, std::byte* scratch) {
    constexpr int64_t floats = DEPTH * ROWS + DEPTH * COLS * W + ROWS * COLS * W;
    static_assert(floats * 4 <= scratch_per_thread, "the operands lie in scratch memory");
    threads.run([&](int thread) {
        float* a = reinterpret_cast<float*>(scratch + thread * scratch_per_thread);
        for (int64_t i = 0; i < floats; ++i) a[i] = 1e-6f * static_cast<float>(i % 97);
    });
    constexpr int64_t times = 1000;  // about a millisecond
    double best = 1e30;
    for (int run = 0; run < 20; ++run) {
        const double begin = seconds();
        threads.run([&](int thread) {
            float* a = reinterpret_cast<float*>(scratch + thread * scratch_per_thread);
            float* b = a + DEPTH * ROWS;
            multiply(a, b, b + DEPTH * COLS * W, times);
        });
        const double spent = seconds() - begin;
        if (spent < best) best = spent;
    }
    return 1e-9 * static_cast<double>(times) * DEPTH * ROWS * COLS * W * threads.count() / best;
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
