// One function for each kind of instruction, of one instruction set; what each computes is in
// src/tinytl/compiler/op_table.py. Included by every file of kernels, which defines some of these functions in
// namespace tinytl::TINYTL_ISA.
#pragma once

#include "../runtime/call.hpp"
#include "simd.hpp"

// Every op of runtime/program.hpp, in the order of its numbers.
#define TINYTL_OPS(X)                                                                                               \
    X(normalize) X(conv) X(group_norm) X(affine) X(activation) X(add) X(smooth) X(gate) X(avg_pool) X(adaptive_pool) \
    X(max_pool) X(upsample) X(dropout) X(softmax_loss) X(copy)                                                      \
    X(standardize) X(scale_weight) X(shift_bias)                                                                    \
    X(act_grad) X(bias_grad) X(conv_dx) X(conv_dw) X(group_norm_grad) X(affine_grad) X(channel_dot) X(smooth_grad)  \
    X(gate_grad) X(avg_pool_grad) X(adaptive_pool_grad) X(max_pool_grad) X(upsample_grad) X(dropout_grad)           \
    X(standardize_grad) X(scale_weight_grad) X(shift_bias_grad)                                                     \
    X(zero) X(sgd) X(adam) X(sgd8) X(adam8)

namespace tinytl {
namespace TINYTL_ISA {

#define X(name) void name(const Call&);
TINYTL_OPS(X)
#undef X

// Multiply-adds a second (in billions) of the widest multiply-add loop that this instruction set has, on operands that
// stay in each thread's cache: what a GEMM could reach at best. `scratch`: as Call::scratch.
double gemm_peak(Threads& threads, std::byte* scratch);

// The functions above by op; nullptr: no such op.
Kernel kernel_of(Op op);

}  // namespace TINYTL_ISA
}  // namespace tinytl
