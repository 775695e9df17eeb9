/* The executor's C interface: what Python (ctypes), the stand-alone program and anyone else calls.
 *
 * A function that can fail returns a status (0: done) and leaves one line of text for tinytl_error(): the value, what
 * was expected, the mend. Nothing here allocates after tinytl_open. One program is used by one thread at a time.
 */
#ifndef TINYTL_H
#define TINYTL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define TINYTL_API __declspec(dllexport)
#else
#define TINYTL_API __attribute__((visibility("default")))
#endif

#define TINYTL_ABI 1

typedef struct tinytl_program tinytl_program;

enum tinytl_status {
    TINYTL_OK = 0,
    TINYTL_BAD_FILE = 1,   /* missing, truncated, of a newer version, of a wrong hash, not a program */
    TINYTL_BAD_INPUT = 2,  /* an argument is out of range */
    TINYTL_NOT_FINITE = 3, /* a loss or a gradient is NaN or infinite */
    TINYTL_NO_MEMORY = 4
};

/* What tinytl_number() tells. */
enum tinytl_key {
    TINYTL_BATCH = 0, TINYTL_MICRO_BATCH, TINYTL_CLASSES, TINYTL_HEIGHT, TINYTL_WIDTH, TINYTL_ARENA_BYTES,
    TINYTL_ARENA_USED, /* highest byte of the arena touched so far, by address */
    TINYTL_STATE_BYTES, TINYTL_THREADS, TINYTL_TENSORS, TINYTL_STEPS, /* steps taken so far */
    TINYTL_META_BYTES, TINYTL_EVALUATE_IMAGES, TINYTL_DATA_BYTES
};

TINYTL_API int tinytl_abi(void);
TINYTL_API const char* tinytl_error(void);
/* "avx512", "avx2", "neon" or "plain": which kernels run here. TINYTL_ISA in the environment asks for a lesser one. */
TINYTL_API const char* tinytl_isa(void);

/* Open a program and give its arena first values. threads: 0 takes as many as the program was laid out for; more than
 * that are refused. check: whether the file's hash is verified (it reads the whole file once, in pieces). */
TINYTL_API int tinytl_open(const char* path, int threads, int check, tinytl_program** program);
TINYTL_API void tinytl_close(tinytl_program* program);

TINYTL_API int64_t tinytl_number(const tinytl_program* program, int key);
/* The file's META section: JSON, TINYTL_META_BYTES long, not ended by a zero. */
TINYTL_API const char* tinytl_meta(const tinytl_program* program);

/* Where a batch goes: bytes (batch, H, W, 3) and labels (batch) int32. */
TINYTL_API uint8_t* tinytl_images(tinytl_program* program);
TINYTL_API int32_t* tinytl_labels(tinytl_program* program);

/* One training step on the first `count` images of the slot. loss: sum over images of the cross entropy; correct: how
 * many were right before the step. TINYTL_NOT_FINITE: tinytl_bad_tensor() says whose gradient, -1 the loss; where the
 * loss is not finite nothing has been updated. */
TINYTL_API int tinytl_step(tinytl_program* program, int64_t count, double lr, int64_t seed, double* loss, int64_t* correct);
TINYTL_API int64_t tinytl_bad_tensor(const tinytl_program* program);
/* Forward alone; logits: (count, classes) f32. */
TINYTL_API int tinytl_evaluate(tinytl_program* program, int64_t count, float* logits);

/* What a checkpoint holds: TINYTL_STATE_BYTES, trained tensors and the optimizer's state (the count of steps too).
 * Written to, it takes effect at once. */
TINYTL_API uint8_t* tinytl_state(tinytl_program* program);

/* For tests and benchmarks: run the instructions [begin, end) of a stream (0 begin, 1 micro, 2 finish, 3 evaluate) for
 * `images` images from number `first` of the batch, with what tinytl_step would set beside them. */
TINYTL_API int tinytl_run(tinytl_program* program, int stream, int64_t begin, int64_t end, int64_t first, int64_t images,
                          int64_t count, double lr, int64_t seed);
TINYTL_API int64_t tinytl_instructions(const tinytl_program* program, int stream);
/* The op of one of them, by name; NULL: no such instruction. */
TINYTL_API const char* tinytl_op(const tinytl_program* program, int stream, int64_t number);
/* Address of a tensor, and its bytes: those of a whole batch, micro-batch or pass of `evaluate`, the larger of both. */
TINYTL_API uint8_t* tinytl_tensor(tinytl_program* program, int64_t number, int64_t* bytes);
/* Seconds spent in each instruction of a stream since the last call (or since timing went on), while timing is on. */
TINYTL_API void tinytl_timing(tinytl_program* program, int on);
TINYTL_API int tinytl_seconds(tinytl_program* program, int stream, double* seconds);
/* Billions of multiply-adds a second that this machine's best GEMM kernel reaches on operands in cache, all threads. */
TINYTL_API double tinytl_gemm_peak(tinytl_program* program);

#ifdef __cplusplus
}
#endif
#endif
