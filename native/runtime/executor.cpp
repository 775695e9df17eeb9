#include "executor.hpp"

#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstring>

#include "failure.hpp"
#include "residency.hpp"

namespace tinytl {
namespace {

const Kernels& kernels_here() {
    const Kernels* kernels = choose_kernels();
    if (!kernels)
        fail(TINYTL_BAD_INPUT, "TINYTL_ISA asks for kernels that do not run here: unset it or take one of: %s",
             possible_isas());
    return *kernels;
}

int threads_of(const Model& model, int wanted) {
    if (wanted < 0 || wanted > model.threads)
        fail(TINYTL_BAD_INPUT, "cannot run on %d threads: it was laid out for at most %lld: give fewer, or compile it for more",
             wanted, static_cast<long long>(model.threads));
    return wanted ? wanted : static_cast<int>(model.threads);
}

bool is_update(Op op) { return op == Op::sgd || op == Op::adam || op == Op::sgd8 || op == Op::adam8; }

// Whether one of them is NaN or infinite: all bits of its exponent are set.
bool any_not_finite(const float* values, int64_t count) {
    constexpr uint32_t exponent = 0x7f800000;
    uint32_t found = 0;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, values + i, sizeof bits);
        found |= (bits & exponent) == exponent;
    }
    return found;
}

double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Arena::Arena(int64_t bytes) : bytes_(static_cast<size_t>(bytes ? bytes : 1)) {
    void* map = ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED)
        fail(TINYTL_NO_MEMORY, "needs an arena of %lld bytes, which this system does not give (%s): compile it with a "
             "smaller --memory-budget", static_cast<long long>(bytes), std::strerror(errno));
#if defined(MADV_NOHUGEPAGE)
    ::madvise(map, bytes_, MADV_NOHUGEPAGE);  // a huge page would bring in memory that nobody touches
#endif
    data_ = static_cast<std::byte*>(map);
}

Arena::~Arena() { ::munmap(data_, bytes_); }

Executor::Executor(const char* path, int threads, bool check)
    : file_(path, check), model_(read_code(file_.code, file_.data.bytes)), kernels_(kernels_here()),
      threads_(threads_of(model_, threads)), arena_(model_.arena_bytes) {
    File::forget(file_.code);
    for (size_t i = 0; i < model_.tensors.size(); ++i) {
        Tensor& tensor = model_.tensors[i];
        if (model_.offset[i] < 0) continue;
        // Nothing writes to a constant: read_code() refuses such instructions, and the map is read-only.
        tensor.data = tensor.role == Role::constant ? const_cast<std::byte*>(file_.data.data) + model_.offset[i]
                                                    : arena_.data() + model_.offset[i];
        if (model_.initial[i] >= 0)
            std::memcpy(tensor.data, file_.data.data + model_.initial[i], static_cast<size_t>(tensor.image_bytes));
    }
    // The first values were read once; the weights come back page by page as the kernels read them.
    File::forget(file_.data);
    for (int stream = 0; stream < streams; ++stream) {
        functions_[stream].reserve(model_.code[stream].size());
        for (const Instruction& instruction : model_.code[stream])
            functions_[stream].push_back(kernels_.kernel_of(instruction.op));
        seconds_[stream].resize(model_.code[stream].size());
    }
    arena_used_ = model_.state_bytes;
    forget_own_code();
}

tinytl_status Executor::check_loss() {
    const double* metrics = reinterpret_cast<const double*>(at(model_.metrics));
    if (std::isfinite(metrics[0])) return TINYTL_OK;
    bad_tensor_ = -1;
    return TINYTL_NOT_FINITE;
}

tinytl_status Executor::check_gradient(const Instruction& instruction) {
    const Tensor& gradient = model_.tensors[static_cast<size_t>(instruction.operands[1])];
    std::atomic<bool> bad{false};
    threads_.ranges(gradient.elements, 16384, [&](int64_t begin, int64_t end, int) {
        if (any_not_finite(reinterpret_cast<const float*>(gradient.data) + begin, end - begin)) bad = true;
    });
    if (!bad) return TINYTL_OK;
    bad_tensor_ = instruction.operands[1];
    return TINYTL_NOT_FINITE;
}

tinytl_status Executor::run(int stream, size_t begin, size_t end, int64_t first, int64_t images,
                            const StepScalars& scalars) {
    auto tile = model_.tiles.begin();
    const auto none = stream == stream_micro ? model_.tiles.end() : tile;
    for (size_t at = begin; at < end;) {
        while (tile != none && tile->begin < at) ++tile;
        const bool tiled = tile != none && tile->begin == at;
        const size_t stop = tiled ? tile->end : tile != none && tile->begin < end ? tile->begin : end;
        const int64_t most = tiled ? model_.tile_images : images;
        for (int64_t inner = 0; inner < images; inner += most) {
            const int64_t count = images - inner < most ? images - inner : most;
            if (const tinytl_status status = run_range(stream, {at, stop}, {first + inner, inner, count}, scalars)) return status;
        }
        at = stop;
    }
    // Each thread has its own part of the scratch memory; which instructions make use of it is theirs to know.
    const int64_t reached = model_.scratch_offset + threads_.count() * scratch_per_thread;
    if (begin < end && reached > arena_used_) arena_used_ = reached;
    return TINYTL_OK;
}

tinytl_status Executor::run_range(int stream, Range range, Part part, const StepScalars& scalars) {
    for (size_t at = range.begin; at < range.end; ++at) {
        const Instruction& instruction = model_.code[stream][at];
        const double started = timing_ ? seconds_now() : 0;
        if (scalars.train && is_update(instruction.op))
            if (const tinytl_status status = check_gradient(instruction)) return status;
        const Call call{instruction, model_.tensors.data(), part.images, part.first, part.inner, threads_, scratch(),
                        scalars};
        functions_[stream][at](call);
        if (timing_) seconds_[stream][at] += seconds_now() - started;
        for (const int32_t number : instruction.operands) {
            if (number < 0) continue;
            const Tensor& tensor = model_.tensors[static_cast<size_t>(number)];
            if (tensor.role == Role::constant) continue;
            const int64_t count = tensor.scope == Scope::fixed ? 1 : call.before(tensor) + part.images;
            const int64_t reached = tensor.data - arena_.data() + count * tensor.image_bytes;
            if (reached > arena_used_) arena_used_ = reached;
        }
        if (scalars.train && instruction.op == Op::softmax_loss)
            if (const tinytl_status status = check_loss()) return status;
    }
    return TINYTL_OK;
}

tinytl_status Executor::step(int64_t count, double lr, int64_t seed, double* loss, int64_t* correct) {
    double* metrics = reinterpret_cast<double*>(at(model_.metrics));
    metrics[0] = metrics[1] = 0;
    const StepScalars scalars = {lr, ++steps(), seed, count, true};
    auto whole = [&](int stream, int64_t first, int64_t images) {
        return run(stream, 0, model_.code[stream].size(), first, images, scalars);
    };
    const int64_t micro = model_.micro_batch;
    tinytl_status status = whole(stream_begin, 0, count < micro ? count : micro);
    for (int64_t first = 0; !status && first < count; first += micro)
        status = whole(stream_micro, first, count - first < micro ? count - first : micro);
    if (!status) status = whole(stream_finish, 0, count < micro ? count : micro);
    if (status && bad_tensor_ < 0) --steps();  // nothing has been updated: as if it had not been taken
    *loss = metrics[0];
    *correct = static_cast<int64_t>(metrics[1]);
    return status;
}

void Executor::evaluate(int64_t count, float* logits) {
    const StepScalars scalars = {0, steps(), 0, count, false};
    const int64_t images = model_.evaluate_images;
    for (int64_t first = 0; first < count; first += images)
        run(stream_evaluate, 0, model_.code[stream_evaluate].size(), first, count - first < images ? count - first : images,
            scalars);
    std::memcpy(logits, at(model_.logits), static_cast<size_t>(count * model_.classes) * sizeof(float));
}

int64_t Executor::bad_label(int64_t count) const {
    const int32_t* labels = reinterpret_cast<const int32_t*>(at(model_.labels));
    for (int64_t i = 0; i < count; ++i)
        if (labels[i] < 0 || labels[i] >= model_.classes) return i;
    return -1;
}

void Executor::time(bool on) {
    timing_ = on;
    for (int stream = 0; stream < streams; ++stream) seconds_[stream].assign(seconds_[stream].size(), 0.0);
}

void Executor::take_seconds(int stream, double* seconds) {
    for (double& spent : seconds_[stream]) {
        *seconds++ = spent;
        spent = 0;
    }
}

}  // namespace tinytl
