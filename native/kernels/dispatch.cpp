#include "dispatch.hpp"

#include <cstdlib>
#include <cstring>

// CMake defines TINYTL_HAVE_... for each instruction set that the kernels were compiled for.
#define TINYTL_DECLARE(isa)                              \
    namespace isa {                                      \
    Kernel kernel_of(Op op);                             \
    double gemm_peak(Threads& threads, std::byte* scratch); \
    }

namespace tinytl {

#if TINYTL_HAVE_AVX512
TINYTL_DECLARE(avx512)
#endif
#if TINYTL_HAVE_AVX2
TINYTL_DECLARE(avx2)
#endif
#if TINYTL_HAVE_NEON
TINYTL_DECLARE(neon)
#endif
#if TINYTL_HAVE_PLAIN
TINYTL_DECLARE(plain)
#endif

namespace {

struct Choice {
    Kernels kernels;
    bool possible;
};

// Best first. The conditions name what CMakeLists.txt compiles the kernels for.
const Choice* choices(int* count) {
    static const Choice table[] = {
#if TINYTL_HAVE_AVX512
        {{"avx512", avx512::kernel_of, avx512::gemm_peak},
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
#if TINYTL_HAVE_AVX2
        {{"avx2", avx2::kernel_of, avx2::gemm_peak}, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
#if TINYTL_HAVE_NEON
        {{"neon", neon::kernel_of, neon::gemm_peak}, true},
#endif
#if TINYTL_HAVE_PLAIN
        {{"plain", plain::kernel_of, plain::gemm_peak}, true},
#endif
    };
    *count = static_cast<int>(sizeof table / sizeof *table);
    return table;
}

}  // namespace

const Kernels* choose_kernels() {
    const char* wanted = std::getenv("TINYTL_ISA");
    if (wanted && !*wanted) wanted = nullptr;
    int count;
    const Choice* all = choices(&count);
    for (int i = 0; i < count; ++i)
        if (all[i].possible && (!wanted || !std::strcmp(wanted, all[i].kernels.isa))) return &all[i].kernels;
    return nullptr;
}

const char* possible_isas() {
    static char names[64];  // the same whoever writes it
    int count;
    const Choice* all = choices(&count);
    char text[64] = "";
    for (int i = 0; i < count; ++i) {
        if (!all[i].possible) continue;
        if (*text) std::strcat(text, ", ");
        std::strcat(text, all[i].kernels.isa);
    }
    std::memcpy(names, text, sizeof names);
    return names;
}

}  // namespace tinytl
