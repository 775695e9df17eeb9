// A program that is open: its model, its arena, and how its streams are run.
#pragma once

#include <chrono>
#include <memory>

#include "../kernels/dispatch.hpp"
#include "../tinytl.h"
#include "model.hpp"

namespace tinytl {

// One zeroed allocation, whose pages cost nothing until they are touched.
class Arena {
public:
    explicit Arena(int64_t bytes);  // throws Failure
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    std::byte* data() const { return data_; }

private:
    std::byte* data_;
    size_t bytes_;
};

class Executor {
public:
    // Throws Failure or std::bad_alloc.
    Executor(const char* path, int threads, bool check);

    const Model& model() const { return model_; }
    const File& file() const { return file_; }
    Threads& threads() { return threads_; }
    int thread_count() const { return threads_.count(); }
    const Kernels& kernels() const { return kernels_; }
    std::byte* arena() const { return arena_.data(); }
    std::byte* scratch() const { return arena_.data() + model_.scratch_offset; }
    std::byte* at(int64_t tensor) const { return model_.tensors[static_cast<size_t>(tensor)].data; }
    int64_t& steps() const { return *reinterpret_cast<int64_t*>(at(model_.step_count)); }
    int64_t arena_used() const { return arena_used_; }
    int64_t bad_tensor() const { return bad_tensor_; }

    // As in tinytl.h. None of these allocates.
    tinytl_status step(int64_t count, double lr, int64_t seed, double* loss, int64_t* correct);
    void evaluate(int64_t count, float* logits);
    // `begin` and `end` cut no tile.
    tinytl_status run(int stream, size_t begin, size_t end, int64_t first, int64_t images, const StepScalars& scalars);
    // The first label of `count` that is no class; -1: none.
    int64_t bad_label(int64_t count) const;
    void time(bool on);
    void take_seconds(int stream, double* seconds);

private:
    // Images: the first one's number in the batch and in the micro-batch, and how many.
    struct Part {
        int64_t first, inner, images;
    };
    tinytl_status run_range(int stream, Range range, Part part, const StepScalars& scalars);
    tinytl_status check_loss();
    tinytl_status check_gradient(const Instruction& instruction);

    File file_;
    Model model_;
    const Kernels& kernels_;
    Threads threads_;
    Arena arena_;
    std::vector<Kernel> functions_[streams];  // of each instruction
    std::vector<double> seconds_[streams];
    bool timing_ = false;
    int64_t arena_used_ = 0, bad_tensor_ = -1;
};

}  // namespace tinytl
