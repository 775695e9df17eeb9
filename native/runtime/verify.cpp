// How the operands of one instruction must fit each other, so that its kernel stays inside of all of them.
#include <cmath>
#include <cstring>

#include "failure.hpp"
#include "model.hpp"
#include "op_table.hpp"

namespace tinytl {
namespace {

constexpr const char* stream_names[] = {"begin", "micro", "finish", "evaluate"};

class Check {
public:
    Check(const Model& model, int stream, size_t at)
        : model_(model), stream_(stream), at_(at), instruction_(model.code[stream][at]),
          kind_(kind_of(static_cast<int64_t>(instruction_.op))) {}

    void all();

private:
    struct Image {
        int64_t h, w, c;
        bool operator==(const Image& other) const { return h == other.h && w == other.w && c == other.c; }
    };

    [[noreturn]] void wrong(const char* operand, const char* why) const {
        fail(TINYTL_BAD_FILE, "is damaged: instruction %zu of '%s' (%s): %s %s: compile it again", at_,
             stream_names[stream_], kind_.name, operand, why);
    }
    int place(const char* name) const {
        for (int i = 0; i < kind_.operands; ++i)
            if (!std::strcmp(kind_.operand[i].name, name)) return i;
        wrong(name, "is no operand of it");
    }
    bool has(const char* name) const { return instruction_.operands[static_cast<size_t>(place(name))] >= 0; }
    const Tensor& tensor(const char* name) const {
        return model_.tensors[static_cast<size_t>(instruction_.operands[static_cast<size_t>(place(name))])];
    }
    int32_t number_of(const char* name) const { return instruction_.operands[static_cast<size_t>(place(name))]; }
    int64_t whole(size_t attribute, int64_t least, int64_t most) const {
        const double value = instruction_.attributes[attribute];
        if (!(value >= static_cast<double>(least) && value <= static_cast<double>(most)) || value != std::floor(value))
            wrong("an attribute", "is out of range");
        return static_cast<int64_t>(value);
    }

    // ---- kinds of operands
    void type(const char* name, Dtype dtype) const {
        if (tensor(name).dtype != dtype) wrong(name, "is of another type");
    }
    void fixed(const char* name) const {
        if (tensor(name).scope != Scope::fixed) wrong(name, "is not of scope 'fixed'");
    }
    void per_image(const char* name) const {
        if (tensor(name).scope == Scope::fixed) wrong(name, "is of scope 'fixed'");
    }
    // An image (H, W, C) of that type; fewer axes stand for the innermost ones.
    Image image(const char* name, Dtype dtype = Dtype::f32) const {
        type(name, dtype);
        per_image(name);
        return shape3(name);
    }
    Image shape3(const char* name) const {
        const Tensor& t = tensor(name);
        if (t.rank > 3 || t.elements <= 0) wrong(name, "has no shape (H, W, C)");
        int64_t shape[3] = {1, 1, 1};
        for (int i = 0; i < t.rank; ++i) shape[3 - t.rank + i] = t.shape[i];
        return {shape[0], shape[1], shape[2]};
    }
    // An image with all three axes, for kernels that read them by number.
    Image full(const char* name) const {
        if (tensor(name).rank != 3) wrong(name, "has no shape (H, W, C)");
        return image(name);
    }
    void same(const char* name, Image expected, Dtype dtype = Dtype::f32) const {
        if (!(image(name, dtype) == expected)) wrong(name, "has another shape");
    }
    void maybe_same(const char* name, Image expected, Dtype dtype = Dtype::f32) const {
        if (has(name)) same(name, expected, dtype);
    }
    // f32 values of scope 'fixed', so many.
    void vector(const char* name, int64_t elements) const {
        type(name, Dtype::f32);
        fixed(name);
        if (tensor(name).elements != elements) wrong(name, "has another number of elements");
    }
    void maybe_vector(const char* name, int64_t elements) const {
        if (has(name)) vector(name, elements);
    }
    // A number for each channel of each image.
    void of_images(const char* name, int64_t elements) const {
        type(name, Dtype::f32);
        per_image(name);
        if (tensor(name).elements != elements) wrong(name, "has another number of elements");
    }

    // ---- weights
    struct Weight {
        int64_t out, kh, kw, in_of_group;
    };
    Weight weight(const char* name, bool depthwise) const {
        const Tensor& t = tensor(name);
        fixed(name);
        if (t.rank != (depthwise ? 3 : 4) || t.elements <= 0) wrong(name, "has no shape of a weight");
        return depthwise ? Weight{t.shape[2], t.shape[0], t.shape[1], 1} : Weight{t.shape[0], t.shape[1], t.shape[2], t.shape[3]};
    }
    // The table beside a weight says what its codes mean; beside an f32 weight there may be scales, or nothing.
    void codes(const char* name, int64_t out) const {
        const Dtype dtype = tensor(name).dtype;
        if (dtype == Dtype::f32) return maybe_vector("table", out);
        if (dtype != Dtype::i8 && dtype != Dtype::u8 && dtype != Dtype::f16) wrong(name, "is of another type");
        if (!has("table")) wrong("table", "is absent");
        vector("table", dtype == Dtype::i8 ? out : dtype == Dtype::u8 ? 256 : 1);
    }
    void same_weight(const char* name, const Tensor& expected) const {
        const Tensor& t = tensor(name);
        type(name, Dtype::f32);
        fixed(name);
        if (t.rank != expected.rank || std::memcmp(t.shape, expected.shape, sizeof t.shape))
            wrong(name, "has another shape");
    }

    // ---- windows
    Window window() const {
        constexpr int64_t most = 1 << 20;
        for (size_t i = 0; i < 10; ++i) whole(i, i >= 4 && i < 8 ? 0 : 1, most);
        return instruction_.window();
    }
    // Of an image `x`, `y` has as many rows and columns as there are places for the window. A pooling may round `up`: its
    // last window then begins in the image, and reaches beyond.
    void places(Image x, Image y, const char* name, bool up = false) const {
        const Window w = window();
        auto fits = [up](int64_t size, int64_t before, int64_t after, int64_t span, int64_t stride, int64_t count) {
            const int64_t room = size + before + after - span;
            const bool beyond = up && room % stride && (count - 1) * stride < size + before;
            return room >= 0 && (count == room / stride + 1 || (beyond && count == room / stride + 2));
        };
        if (!fits(x.h, w.top, w.bottom, w.dh * (w.kh - 1) + 1, w.sh, y.h) ||
            !fits(x.w, w.left, w.right, w.dw * (w.kw - 1) + 1, w.sw, y.w))
            wrong(name, "has another size than the window makes");
    }
    void pooled(Image x, Image y, const char* name) const { places(x, y, name, true); }
    // Of a convolution from x to y, with weight `w` (its codes are looked at apart).
    void convolution(Image x, Image y, const char* w, const char* made) const {
        places(x, y, made);
        const bool depthwise = whole(11, 0, 1) == 1;
        const int64_t groups = whole(10, 1, int64_t{1} << 31);
        const Weight shape = weight(w, depthwise);
        const Window win = instruction_.window();
        if (shape.kh != win.kh || shape.kw != win.kw || shape.out != y.c || x.c % groups || y.c % groups ||
            (depthwise ? groups != x.c || x.c != y.c : shape.in_of_group != x.c / groups))
            wrong(w, "does not fit the images");
    }
    // The scratch memory of a thread holds what 8,192 rows or columns of one pixel's window need.
    void sides(Image image, const char* name) const {
        if (image.h > 8192 || image.w > 8192) wrong(name, "has a side of more than 8192 pixels");
    }
    // Average pooling: a divisor of 0 stands for the window's size.
    void average(Image x, Image y, const char* made) const {
        pooled(x, y, made);
        if (x.c != y.c) wrong(made, "has another number of channels");
        sides(x, made);
        sides(y, made);
        whole(10, 0, 1);
        whole(11, 0, int64_t{1} << 40);
    }
    int64_t groups(size_t attribute, Image x) const {
        const int64_t groups = whole(attribute, 1, int64_t{1} << 31);
        if (x.c % groups) wrong("groups", "does not divide the channels");
        return groups;
    }

    const Model& model_;
    int stream_;
    size_t at_;
    const Instruction& instruction_;
    const OpKind& kind_;
};

void Check::all() {
    switch (instruction_.op) {
        case Op::normalize: {
            const Image x = image("x", Dtype::u8);
            same("y", x);
            vector("scale", x.c);
            vector("shift", x.c);
            break;
        }
        case Op::conv: {
            const Image x = full("x"), y = full("y");
            convolution(x, y, "w", "y");
            codes("w", y.c);
            maybe_vector("bias", y.c);
            maybe_same("residual", y);
            maybe_same("mask", y, Dtype::bits);
            break;
        }
        case Op::group_norm: {
            const Image x = image("x");
            same("y", x);
            maybe_vector("gamma", x.c);
            maybe_vector("beta", x.c);
            if (has("stats")) of_images("stats", 2 * groups(0, x));
            groups(0, x);
            maybe_same("mask", x, Dtype::bits);
            break;
        }
        case Op::affine: {
            const Image x = image("x");
            same("y", x);
            vector("scale", x.c);
            maybe_vector("shift", x.c);
            maybe_same("mask", x, Dtype::bits);
            break;
        }
        case Op::activation:
        case Op::dropout: {
            const Image x = image("x");
            same("y", x);
            maybe_same("mask", x, Dtype::bits);
            break;
        }
        case Op::add: {
            if (tensor("a").scope == Scope::fixed) {  // gradients, whatever their shape
                for (const char* name : {"a", "b", "y"}) vector(name, tensor("a").elements);
                if (has("mask")) wrong("mask", "has no place where there are no images");
                break;
            }
            const Image a = image("a");
            same("b", a);
            same("y", a);
            maybe_same("mask", a, Dtype::bits);
            break;
        }
        case Op::smooth: {
            same("y", image("x"));
            whole(0, 0, 8);
            break;
        }
        case Op::gate: {
            const Image x = image("x");
            same("y", x);
            of_images("s", x.c);
            break;
        }
        case Op::avg_pool:
            average(image("x"), image("y"), "y");
            break;
        case Op::adaptive_pool:
        case Op::upsample: {
            const Image x = image("x"), y = image("y");
            if (x.c != y.c) wrong("y", "has another number of channels");
            sides(x, "x");
            sides(y, "y");
            if (instruction_.op == Op::upsample) maybe_same("residual", y);
            break;
        }
        case Op::max_pool: {
            const Image x = image("x"), y = image("y");
            pooled(x, y, "y");
            if (x.c != y.c) wrong("y", "has another number of channels");
            maybe_same("which", y, Dtype::u8);
            if (has("which") && window().kh * window().kw > 256) wrong("which", "cannot number so large a window");
            break;
        }
        case Op::softmax_loss: {
            of_images("logits", model_.classes);
            of_images("grad", model_.classes);
            type("labels", Dtype::i32);
            per_image("labels");
            if (tensor("labels").elements != 1) wrong("labels", "has more than one number an image");
            // only those of the batch are looked at before they are used as indices, and only before a step
            if (number_of("labels") != model_.labels) wrong("labels", "is not the batch's");
            if (stream_ == stream_evaluate) wrong("labels", "are not known in 'evaluate'");
            type("metrics", Dtype::f64);
            fixed("metrics");
            if (tensor("metrics").elements != 2) wrong("metrics", "has not two numbers");
            if (number_of("metrics") != model_.metrics) wrong("metrics", "is not the step's");
            break;
        }
        case Op::copy: {
            const Tensor &x = tensor("x"), &y = tensor("y");
            if (x.dtype != y.dtype || x.image_bytes != y.image_bytes || (x.scope == Scope::fixed) != (y.scope == Scope::fixed))
                wrong("y", "is not of the kind of x");
            break;
        }
        case Op::standardize:
        case Op::standardize_grad: {
            weight("w", whole(1, 0, 1) == 1);
            type("w", Dtype::f32);
            same_weight(instruction_.op == Op::standardize ? "y" : "grad", tensor("w"));
            break;
        }
        case Op::scale_weight:
        case Op::scale_weight_grad: {
            const bool forward = instruction_.op == Op::scale_weight;
            const Weight shape = weight("w", whole(0, 0, 1) == 1);
            codes("w", shape.out);
            maybe_vector("gamma", shape.out);
            vector("rstd", shape.out);
            same_weight(forward ? "y" : "grad", tensor("w"));
            if (!forward) maybe_vector("gamma_grad", shape.out);
            break;
        }
        case Op::shift_bias:
        case Op::shift_bias_grad: {
            const bool forward = instruction_.op == Op::shift_bias;
            const int64_t channels = tensor("mean").elements;
            for (const char* name : {"mean", "rstd", forward ? "y" : "grad"}) vector(name, channels);
            for (const char* name : {"bias", "gamma"}) maybe_vector(name, channels);
            if (forward) maybe_vector("beta", channels);
            else
                for (const char* name : {"bias_grad", "gamma_grad", "beta_grad"}) maybe_vector(name, channels);
            break;
        }
        case Op::act_grad: {
            const Image grad = image("grad");
            same("y", grad);
            same("mask", grad, Dtype::bits);
            maybe_vector("bias", grad.c);
            break;
        }
        case Op::bias_grad:
            vector("bias", image("grad").c);
            break;
        case Op::conv_dx: {
            const Image grad = full("grad"), y = full("y");
            convolution(y, grad, "w", "grad");
            codes("w", grad.c);
            maybe_same("other", y);
            maybe_same("mask", y, Dtype::bits);
            maybe_vector("bias", y.c);
            break;
        }
        case Op::conv_dw:
            convolution(full("x"), full("grad"), "w", "grad");
            type("w", Dtype::f32);
            break;
        case Op::group_norm_grad: {
            const Image x = image("x");
            same("grad", x);
            same("y", x);
            of_images("stats", 2 * groups(0, x));
            for (const char* name : {"gamma", "gamma_grad", "beta_grad"}) maybe_vector(name, x.c);
            break;
        }
        case Op::affine_grad: {
            const Image grad = image("grad");
            same("y", grad);
            vector("scale", grad.c);
            break;
        }
        case Op::channel_dot: {
            const Image x = image("x");
            same("grad", x);
            vector("y", x.c);
            break;
        }
        case Op::smooth_grad: {
            const Image x = image("x");
            same("grad", x);
            same("y", x);
            whole(0, 0, 8);
            break;
        }
        case Op::gate_grad: {
            const Image x = image("x");
            same("grad", x);
            same("y", x);
            of_images("s", x.c);
            of_images("s_grad", x.c);
            break;
        }
        case Op::avg_pool_grad: {
            const Image y = image("y");
            average(y, image("grad"), "grad");
            maybe_same("other", y);
            break;
        }
        case Op::adaptive_pool_grad:
        case Op::upsample_grad: {
            const Image grad = image("grad"), y = image("y");
            if (grad.c != y.c) wrong("y", "has another number of channels");
            sides(grad, "grad");
            sides(y, "y");
            if (instruction_.op == Op::adaptive_pool_grad) maybe_same("other", y);
            break;
        }
        case Op::max_pool_grad: {
            const Image grad = image("grad"), y = image("y");
            pooled(y, grad, "grad");
            if (grad.c != y.c) wrong("y", "has another number of channels");
            same("which", grad, Dtype::u8);
            break;
        }
        case Op::dropout_grad: {
            const Image grad = image("grad");
            same("y", grad);
            same("mask", grad, Dtype::bits);
            break;
        }
        case Op::zero:
            break;
        case Op::sgd:
        case Op::adam:
        case Op::sgd8:
        case Op::adam8: {
            const int64_t elements = tensor("p").elements;
            vector("p", elements);
            vector("grad", elements);
            auto state = [&](const char* name, const char* scale) {
                if (!scale) return maybe_vector(name, elements);
                type(name, Dtype::u8);
                fixed(name);
                if (tensor(name).elements != elements) wrong(name, "has another number of elements");
                vector(scale, (elements + 255) / 256);
            };
            const Op op = instruction_.op;
            if (op == Op::sgd || op == Op::sgd8) state("momentum", op == Op::sgd8 ? "momentum_scale" : nullptr);
            else
                for (const char* name : {"m", "v"})
                    state(name, op == Op::adam ? nullptr : name[0] == 'm' ? "m_scale" : "v_scale");
            break;
        }
    }
}

}  // namespace

void verify(const Model& model, int stream, size_t number) { Check(model, stream, number).all(); }

}  // namespace tinytl
