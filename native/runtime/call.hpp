// What a kernel is given: one instruction, the images that it is for, and where its operands lie.
#pragma once

#include "program.hpp"
#include "threads.hpp"

namespace tinytl {

// What changes from step to step.
struct StepScalars {
    double lr;        // of this step
    int64_t step;     // number of this step, from 1: what Adam's bias correction and dropout's draws depend on
    int64_t seed;     // of dropout
    int64_t count;    // images of the whole batch, by which the loss is divided
    bool train;
};

inline constexpr int64_t scratch_per_thread = 256 * 1024;  // bytes; SCRATCH_PER_THREAD of compiler/program.py

struct Call {
    const Instruction& instruction;
    const Tensor* tensors;  // all of the program
    int64_t images;         // that this call is for: those of the micro-batch, or of a tile; the last may have fewer
    int64_t first;          // number, in the batch, of the first of them
    int64_t inner;          // its number in the micro-batch
    Threads& threads;
    std::byte* scratch;     // scratch_per_thread bytes for each thread, one after the other, aligned to 64
    const StepScalars& step;

    bool has(int operand) const { return instruction.operands[operand] >= 0; }
    const Tensor& tensor(int operand) const { return tensors[instruction.operands[operand]]; }
    // Address of an operand, for the first image of this call; nullptr where it is absent.
    template <class T>
    T* at(int operand) const {
        if (!has(operand)) return nullptr;
        const Tensor& t = tensor(operand);
        return reinterpret_cast<T*>(t.data + before(t) * t.image_bytes);
    }
    // Images of a tensor that lie before the first of this call.
    int64_t before(const Tensor& t) const { return t.scope == Scope::batch ? first : t.scope == Scope::micro ? inner : 0; }
    double attribute(int number) const { return instruction.attributes[number]; }
    std::byte* scratch_of(int thread) const { return scratch + thread * scratch_per_thread; }
};

// One function for each kind of instruction, in kernels/*.cpp. Whatever the number of threads, the result is the same to
// the bit: work is divided by what is written, and each sum is taken in one fixed order.
using Kernel = void (*)(const Call&);
Kernel kernel_of(Op op);  // nullptr: not known

}  // namespace tinytl
