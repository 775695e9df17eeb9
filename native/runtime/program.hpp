// A program as the executor holds it: what the file says, checked, with an address for every tensor.
//
// The meaning of instructions and of their operands is in src/tinytl/compiler/op_table.py; this file mirrors its
// numbers, and tests/test_native_table.py holds the two together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tinytl {

enum class Dtype : int32_t { f32 = 0, f64 = 1, u8 = 2, i8 = 3, f16 = 4, i32 = 5, i64 = 6, bits = 7 };
enum class Role : int32_t { constant, trained, state, gradient, derived, input, activation, mask, metric, scratch };
enum class Scope : int32_t { fixed = 0, batch = 1, micro = 2, tile = 3 };

enum class Op : int32_t {
    normalize = 1, conv = 2, group_norm = 3, affine = 4, activation = 5, add = 6, smooth = 7, gate = 8, avg_pool = 9,
    adaptive_pool = 10, max_pool = 11, upsample = 12, dropout = 13, softmax_loss = 14, copy = 15,
    standardize = 20, scale_weight = 21, shift_bias = 22,
    act_grad = 30, bias_grad = 31, conv_dx = 32, conv_dw = 33, group_norm_grad = 34, affine_grad = 35,
    channel_dot = 36, smooth_grad = 37, gate_grad = 38, avg_pool_grad = 39, adaptive_pool_grad = 40,
    max_pool_grad = 41, upsample_grad = 42, dropout_grad = 43,
    standardize_grad = 50, scale_weight_grad = 51, shift_bias_grad = 52,
    zero = 60, sgd = 61, adam = 62, sgd8 = 63, adam8 = 64,
};

// One tensor. Shapes leave the axis of images out: (H, W, C) of an image, (O, kh, kw, I / groups) of a weight,
// (kh, kw, C) of a depthwise weight, (n) of a vector.
struct Tensor {
    Dtype dtype;
    Role role;
    Scope scope;
    int32_t rank;
    int64_t shape[6];
    int64_t image_bytes;  // of one image; of all where the scope is fixed
    int64_t elements;     // likewise
    std::byte* data;      // of its first image
};

// A window over an image: kernel, stride, zeros around it, dilation.
struct Window {
    int64_t kh, kw, sh, sw, top, left, bottom, right, dh, dw;
};

struct Instruction {
    Op op;
    std::vector<int32_t> operands;   // numbers of tensors; -1: absent
    std::vector<double> attributes;  // in the table's order; whole numbers are exact
    Window window() const {          // of the ops whose attributes begin with one
        const double* a = attributes.data();
        auto n = [&](int i) { return static_cast<int64_t>(a[i]); };
        return {n(0), n(1), n(2), n(3), n(4), n(5), n(6), n(7), n(8), n(9)};
    }
};

}  // namespace tinytl
