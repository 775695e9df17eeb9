// A program in memory, as it is read from a file: everything but the arena.
#pragma once

#include <vector>

#include "file.hpp"
#include "program.hpp"

namespace tinytl {

enum Stream { stream_begin = 0, stream_micro = 1, stream_finish = 2, stream_evaluate = 3, streams = 4 };

struct Range {
    size_t begin, end;
};

struct Model {
    int64_t batch, micro_batch, evaluate_images, threads, height, width, classes;
    int64_t arena_bytes, state_bytes, scratch_offset;
    int64_t images, labels, logits, metrics, step_count;  // numbers of tensors
    std::vector<Tensor> tensors;
    std::vector<int64_t> offset;   // of each tensor, in the arena (of a constant: in DATA); -1: nowhere
    std::vector<int64_t> initial;  // in DATA; -1: begins as 0
    std::vector<Instruction> code[streams];
    int64_t tile_images;
    std::vector<Range> tiles;  // of `micro`, in order and apart: each runs as a whole for `tile_images` images, then the next

    // Images of one run of a stream.
    int64_t images_of(int stream) const { return stream == stream_evaluate ? evaluate_images : micro_batch; }
    // All bytes of a tensor as a stream sees it.
    int64_t bytes(const Tensor& tensor, int stream) const {
        return tensor.image_bytes * count(tensor.scope, stream);
    }
    int64_t count(Scope scope, int stream) const {
        switch (scope) {
            case Scope::fixed: return 1;
            case Scope::batch: return batch;
            case Scope::micro: return images_of(stream);
            case Scope::tile: return tile_images;
        }
        return 0;
    }
    // The tile that has this instruction inside of it, behind its first; nullptr: none.
    const Range* cut_by(int stream, size_t at) const {
        if (stream != stream_micro) return nullptr;
        for (const Range& tile : tiles)
            if (tile.begin < at && at < tile.end) return &tile;
        return nullptr;
    }
};

// From a file's CODE, every number checked: tensors lie inside the arena or DATA, operands are as the op wants them and
// fit each other, so that no kernel can leave its memory. Throws Failure.
Model read_code(Section code, int64_t data_bytes);

// The part of that which looks at how the operands of one instruction fit each other. Throws Failure.
void verify(const Model& model, int stream, size_t number);

}  // namespace tinytl
