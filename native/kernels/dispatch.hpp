// Which instruction set's kernels run here.
#pragma once

#include "../runtime/call.hpp"

namespace tinytl {

struct Kernels {
    const char* isa;  // "avx512", "avx2", "neon" or "plain"
    Kernel (*kernel_of)(Op op);
    double (*gemm_peak)(Threads& threads, std::byte* scratch);
};

// The best that this processor has; TINYTL_ISA in the environment asks for a lesser one. nullptr: it asks for one that
// is not built or not possible here.
const Kernels* choose_kernels();

// The names that TINYTL_ISA may have here, best first, joined by ", ".
const char* possible_isas();

}  // namespace tinytl
