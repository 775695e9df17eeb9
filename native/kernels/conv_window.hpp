// The window of a convolution's instruction.
#pragma once

#include "../runtime/call.hpp"

namespace tinytl {
namespace TINYTL_ISA {

// As Instruction::window, but compiled for this instruction set alone: see simd.hpp.
static inline Window window_of(const Call& call) {
    int64_t n[10];
    for (int i = 0; i < 10; ++i) n[i] = static_cast<int64_t>(call.attribute(i));
    return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9]};
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
