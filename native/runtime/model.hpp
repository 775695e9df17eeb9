// A program in memory, as it is read from a file: everything but the arena.
#pragma once

#include <vector>

#include "file.hpp"
#include "program.hpp"

namespace tinytl {

enum Stream { stream_begin = 0, stream_micro = 1, stream_finish = 2, stream_evaluate = 3, streams = 4 };

struct Model {
    int64_t batch, micro_batch, evaluate_images, threads, height, width, classes;
    int64_t arena_bytes, state_bytes, scratch_offset;
    int64_t images, labels, logits, metrics, step_count;  // numbers of tensors
    std::vector<Tensor> tensors;
    std::vector<int64_t> offset;   // of each tensor, in the arena (of a constant: in DATA); -1: nowhere
    std::vector<int64_t> initial;  // in DATA; -1: begins as 0
    std::vector<Instruction> code[streams];

    // Images of one run of a stream.
    int64_t images_of(int stream) const { return stream == stream_evaluate ? evaluate_images : micro_batch; }
    // All bytes of a tensor as a stream sees it.
    int64_t bytes(const Tensor& tensor, int stream) const {
        return tensor.image_bytes * (tensor.scope == Scope::fixed ? 1 : tensor.scope == Scope::batch ? batch : images_of(stream));
    }
};

// From a file's CODE, every number checked: tensors lie inside the arena or DATA, operands are as the op wants them and
// fit each other, so that no kernel can leave its memory. Throws Failure.
Model read_code(Section code, int64_t data_bytes);

// The part of that which looks at how the operands of one instruction fit each other. Throws Failure.
void verify(const Model& model, int stream, size_t number);

}  // namespace tinytl
