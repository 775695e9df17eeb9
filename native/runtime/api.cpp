// The C interface (tinytl.h) over Executor: arguments checked, failures turned into a status and a line.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>

#include "../tinytl.h"
#include "executor.hpp"
#include "failure.hpp"
#include "op_table.hpp"

struct tinytl_program {
    tinytl::Executor executor;
};

namespace {

using tinytl::Executor;

thread_local char error_text[800] = "";

template <class... Arguments>
__attribute__((format(printf, 2, 0))) int refuse(int status, const char* format, Arguments... arguments) {
    std::snprintf(error_text, sizeof error_text, format, arguments...);
    return status;
}

// Whether `count` images can be taken from the batch.
int check_count(const Executor& executor, int64_t count) {
    const int64_t batch = executor.model().batch;
    if (count >= 1 && count <= batch) return TINYTL_OK;
    return refuse(TINYTL_BAD_INPUT, "%lld images: the program takes 1 to %lld at a time", static_cast<long long>(count),
                  static_cast<long long>(batch));
}

int check_rate(double lr) {
    if (std::isfinite(lr)) return TINYTL_OK;
    return refuse(TINYTL_BAD_INPUT, "a learning rate of %g: give a finite one", lr);
}

int check_labels(const Executor& executor, int64_t count) {
    const int64_t bad = executor.bad_label(count);
    if (bad < 0) return TINYTL_OK;
    const int32_t label = reinterpret_cast<const int32_t*>(executor.at(executor.model().labels))[bad];
    return refuse(TINYTL_BAD_INPUT, "label %d of image %lld: the program has the classes 0 to %lld", label,
                  static_cast<long long>(bad), static_cast<long long>(executor.model().classes - 1));
}

int refuse_not_finite(const Executor& executor) {
    const int64_t tensor = executor.bad_tensor();
    if (tensor < 0)
        return refuse(TINYTL_NOT_FINITE, "the loss is not finite: lower the learning rate or look at the images");
    return refuse(TINYTL_NOT_FINITE, "the gradient in tensor %lld is not finite: lower the learning rate",
                  static_cast<long long>(tensor));
}

}  // namespace

extern "C" {

int tinytl_abi(void) { return TINYTL_ABI; }

const char* tinytl_error(void) { return error_text; }

const char* tinytl_isa(void) {
    const tinytl::Kernels* kernels = tinytl::choose_kernels();
    return kernels ? kernels->isa : "";
}

int tinytl_open(const char* path, int threads, int check, tinytl_program** program) {
    *program = nullptr;
    try {
        *program = new tinytl_program{{path, threads, check != 0}};
        return TINYTL_OK;
    } catch (const tinytl::Failure& failure) {
        return refuse(failure.status, "%.350s: %s", path, failure.text);
    } catch (const std::bad_alloc&) {
        return refuse(TINYTL_NO_MEMORY, "%.350s: there is no memory to open it: free some", path);
    } catch (const std::exception& error) {  // no thread can be started
        return refuse(TINYTL_NO_MEMORY, "%.350s: cannot be opened (%s): free some memory or take fewer threads", path,
                      error.what());
    }
}

void tinytl_close(tinytl_program* program) { delete program; }

int64_t tinytl_number(const tinytl_program* program, int key) {
    const Executor& executor = program->executor;
    const tinytl::Model& model = executor.model();
    switch (key) {
        case TINYTL_BATCH: return model.batch;
        case TINYTL_MICRO_BATCH: return model.micro_batch;
        case TINYTL_CLASSES: return model.classes;
        case TINYTL_HEIGHT: return model.height;
        case TINYTL_WIDTH: return model.width;
        case TINYTL_ARENA_BYTES: return model.arena_bytes;
        case TINYTL_ARENA_USED: return executor.arena_used();
        case TINYTL_STATE_BYTES: return model.state_bytes;
        case TINYTL_THREADS: return executor.thread_count();
        case TINYTL_TENSORS: return static_cast<int64_t>(model.tensors.size());
        case TINYTL_STEPS: return executor.steps();
        case TINYTL_META_BYTES: return executor.file().meta.bytes;
        case TINYTL_EVALUATE_IMAGES: return model.evaluate_images;
        case TINYTL_DATA_BYTES: return executor.file().data.bytes;
        default: return -1;
    }
}

const char* tinytl_meta(const tinytl_program* program) {
    return reinterpret_cast<const char*>(program->executor.file().meta.data);
}

uint8_t* tinytl_images(tinytl_program* program) {
    return reinterpret_cast<uint8_t*>(program->executor.at(program->executor.model().images));
}

int32_t* tinytl_labels(tinytl_program* program) {
    return reinterpret_cast<int32_t*>(program->executor.at(program->executor.model().labels));
}

int tinytl_step(tinytl_program* program, int64_t count, double lr, int64_t seed, double* loss, int64_t* correct) {
    Executor& executor = program->executor;
    if (const int status = check_count(executor, count)) return status;
    if (const int status = check_rate(lr)) return status;
    if (const int status = check_labels(executor, count)) return status;
    const int status = executor.step(count, lr, seed, loss, correct);
    return status ? refuse_not_finite(executor) : status;
}

int64_t tinytl_bad_tensor(const tinytl_program* program) { return program->executor.bad_tensor(); }

int tinytl_evaluate(tinytl_program* program, int64_t count, float* logits) {
    if (const int status = check_count(program->executor, count)) return status;
    program->executor.evaluate(count, logits);
    return TINYTL_OK;
}

uint8_t* tinytl_state(tinytl_program* program) { return reinterpret_cast<uint8_t*>(program->executor.arena()); }

int tinytl_run(tinytl_program* program, int stream, int64_t begin, int64_t end, int64_t first, int64_t images,
               int64_t count, double lr, int64_t seed) {
    Executor& executor = program->executor;
    const tinytl::Model& model = executor.model();
    if (const int status = check_count(executor, count)) return status;
    if (const int status = check_rate(lr)) return status;
    const int64_t length = tinytl_instructions(program, stream);
    if (length < 0) return refuse(TINYTL_BAD_INPUT, "stream %d: there are 0 (begin) to 3 (evaluate)", stream);
    if (begin < 0 || begin > end || end > length)
        return refuse(TINYTL_BAD_INPUT, "instructions %lld to %lld: this stream has %lld", static_cast<long long>(begin),
                      static_cast<long long>(end), static_cast<long long>(length));
    for (const int64_t at : {begin, end})
        if (const tinytl::Range* tile = model.cut_by(stream, static_cast<size_t>(at)))
            return refuse(TINYTL_BAD_INPUT, "instructions %lld to %lld: those from %zu to %zu run together, in tiles: take all",
                          static_cast<long long>(begin), static_cast<long long>(end), tile->begin, tile->end);
    const int64_t most = model.images_of(stream);
    if (first < 0 || images < 1 || images > most || first > model.batch - images)
        return refuse(TINYTL_BAD_INPUT, "%lld images from number %lld: the batch has %lld, and this stream takes %lld at most",
                      static_cast<long long>(images), static_cast<long long>(first), static_cast<long long>(model.batch),
                      static_cast<long long>(most));
    if (const int status = check_labels(executor, std::max(count, first + images))) return status;
    const int64_t step = executor.steps() > 1 ? executor.steps() : 1;
    const int status = executor.run(stream, static_cast<size_t>(begin), static_cast<size_t>(end), first, images,
                                    {lr, step, seed, count, stream != tinytl::stream_evaluate});
    return status ? refuse_not_finite(executor) : status;
}

int64_t tinytl_instructions(const tinytl_program* program, int stream) {
    if (stream < 0 || stream >= tinytl::streams) return -1;
    return static_cast<int64_t>(program->executor.model().code[stream].size());
}

const char* tinytl_op(const tinytl_program* program, int stream, int64_t number) {
    if (number < 0 || number >= tinytl_instructions(program, stream)) return nullptr;
    const auto& code = program->executor.model().code[stream];
    return tinytl::kind_of(static_cast<int64_t>(code[static_cast<size_t>(number)].op)).name;
}

uint8_t* tinytl_tensor(tinytl_program* program, int64_t number, int64_t* bytes) {
    const tinytl::Model& model = program->executor.model();
    *bytes = 0;
    if (number < 0 || number >= static_cast<int64_t>(model.tensors.size())) return nullptr;
    const tinytl::Tensor& tensor = model.tensors[static_cast<size_t>(number)];
    if (tensor.data) {
        const int64_t micro = model.bytes(tensor, tinytl::stream_micro), pass = model.bytes(tensor, tinytl::stream_evaluate);
        *bytes = micro > pass ? micro : pass;
        // One that the other stream alone uses has room for no more than that stream's images.
        const int64_t room = model.arena_bytes - model.offset[static_cast<size_t>(number)];
        if (tensor.role != tinytl::Role::constant && *bytes > room) *bytes = room;
    }
    return reinterpret_cast<uint8_t*>(tensor.data);
}

void tinytl_timing(tinytl_program* program, int on) { program->executor.time(on != 0); }

int tinytl_seconds(tinytl_program* program, int stream, double* seconds) {
    if (stream < 0 || stream >= tinytl::streams)
        return refuse(TINYTL_BAD_INPUT, "stream %d: there are 0 (begin) to 3 (evaluate)", stream);
    program->executor.take_seconds(stream, seconds);
    return TINYTL_OK;
}

double tinytl_gemm_peak(tinytl_program* program) {
    Executor& executor = program->executor;
    return executor.kernels().gemm_peak(executor.threads(), executor.scratch());
}

}  // extern "C"
