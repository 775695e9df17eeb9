// Runs every kernel but those of check_conv.cpp on random geometries, each operand in memory of exactly its size, so
// that a build with -fsanitize=address,undefined sees whatever is read or written beside it. One, two and three
// threads must give the same bits; depthwise convolutions are held against plain loops in double precision too. (What
// the other kernels compute is held against the interpreter by tests/test_native_kernels.py.)
//
//   check_other SEED COUNT    COUNT random cases of each op, on each instruction set that runs here
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../runtime/call.hpp"

// As in CMakeLists.txt: TINYTL_HAVE_X is defined where the kernels were compiled for X.
#define TINYTL_DECLARE(isa)           \
    namespace tinytl {                \
    namespace isa {                   \
    Kernel kernel_of(Op op);          \
    }                                 \
    }
#if TINYTL_HAVE_PLAIN
TINYTL_DECLARE(plain)
#endif
#if TINYTL_HAVE_AVX2
TINYTL_DECLARE(avx2)
#endif
#if TINYTL_HAVE_AVX512
TINYTL_DECLARE(avx512)
#endif
#if TINYTL_HAVE_NEON
TINYTL_DECLARE(neon)
#endif

using namespace tinytl;

namespace {

struct Isa {
    const char* name;
    Kernel (*kernel_of)(Op);
};

// Those that were compiled and run here.
std::vector<Isa> isas() {
    std::vector<Isa> found;
#if TINYTL_HAVE_PLAIN
    found.push_back({"plain", plain::kernel_of});
#endif
#if TINYTL_HAVE_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back({"avx2", avx2::kernel_of});
#endif
#if TINYTL_HAVE_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        found.push_back({"avx512", avx512::kernel_of});
#endif
#if TINYTL_HAVE_NEON
    found.push_back({"neon", neon::kernel_of});
#endif
    return found;
}

using Shape = std::vector<int64_t>;
constexpr int64_t dtype_bytes[] = {4, 8, 1, 1, 2, 4, 8, 1};

struct Random {
    std::mt19937_64 engine;
    int64_t number(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(engine); }
    bool coin() { return number(0, 1); }
    int64_t of(std::initializer_list<int64_t> values) { return values.begin()[number(0, int64_t(values.size()) - 1)]; }
    float real() { return std::normal_distribution<float>()(engine); }
};

// One instruction and its operands' first values.
struct Case {
    Random& random;
    Instruction instruction;
    int64_t images = 1;
    std::vector<Tensor> tensors;
    std::vector<std::vector<std::byte>> values;

    void absent() {
        instruction.operands.push_back(-1);
        tensors.push_back({});
        values.emplace_back();
    }
    Tensor& operand(Dtype dtype, Scope scope, const Shape& shape, int64_t codes = 256) {
        Tensor t{};
        t.dtype = dtype;
        t.role = Role::activation;
        t.scope = scope;
        t.rank = static_cast<int32_t>(shape.size());
        t.elements = 1;
        for (size_t i = 0; i < 6; ++i) t.shape[i] = i < shape.size() ? shape[i] : 1;
        for (int64_t extent : shape) t.elements *= extent;
        const int64_t row = shape.empty() ? 1 : shape.back();
        t.image_bytes = dtype == Dtype::bits ? t.elements / row * ((row + 7) / 8)
                                             : t.elements * dtype_bytes[static_cast<int>(dtype)];
        const int64_t bytes = t.image_bytes * (scope == Scope::fixed ? 1 : images);
        std::vector<std::byte> value(static_cast<size_t>(bytes));
        for (int64_t i = 0; i < bytes; ++i) value[size_t(i)] = static_cast<std::byte>(random.number(0, codes - 1));
        if (dtype == Dtype::f32)
            for (int64_t i = 0; i < bytes / 4; ++i) set(value, i, random.real());
        if (dtype == Dtype::f64)
            for (int64_t i = 0; i < bytes / 8; ++i) set(value, i, double(random.real()));
        if (dtype == Dtype::i32)
            for (int64_t i = 0; i < bytes / 4; ++i) set(value, i, int32_t(random.number(0, codes - 1)));
        if (dtype == Dtype::f16)
            for (int64_t i = 0; i < bytes / 2; ++i) set(value, i, uint16_t(random.number(0, 0x4000)));
        instruction.operands.push_back(static_cast<int32_t>(tensors.size()));
        tensors.push_back(t);
        values.push_back(std::move(value));
        return tensors.back();
    }
    template <class T>
    static void set(std::vector<std::byte>& value, int64_t i, T number) {
        std::memcpy(value.data() + i * int64_t(sizeof number), &number, sizeof number);
    }
    void image(const Shape& shape) { operand(Dtype::f32, Scope::micro, shape); }
    void maybe_image(const Shape& shape) { random.coin() ? image(shape) : absent(); }
    void fixed(const Shape& shape) { operand(Dtype::f32, Scope::fixed, shape); }
    void maybe_fixed(const Shape& shape) { random.coin() ? fixed(shape) : absent(); }
    void bits(const Shape& shape) { operand(Dtype::bits, Scope::micro, shape); }
    void maybe_bits(const Shape& shape) { random.coin() ? bits(shape) : absent(); }
    void attribute(double value) { instruction.attributes.push_back(value); }
    void act() {
        const bool bounded = random.coin();
        attribute(bounded ? 0 : -HUGE_VAL);
        attribute(bounded && random.coin() ? 1 : HUGE_VAL);
        attribute(random.coin() ? 0 : 0.25);
    }
    // A weight of any type and its table.
    void weight(const Shape& shape, int64_t outs) {
        const Dtype dtype = static_cast<Dtype>(random.of({0, 2, 3, 4}));
        operand(dtype, Scope::fixed, shape);
        if (dtype == Dtype::f32) maybe_fixed({outs});
        else fixed({dtype == Dtype::u8 ? 256 : dtype == Dtype::i8 ? outs : 1});
    }
    // A window on an image that it fits on; returns what it makes.
    Shape window(Shape& image) {
        Shape made = image;
        int64_t kernel[2], stride[2], before[2], after[2], dilation[2];
        for (int a = 0; a < 2; ++a) {
            kernel[a] = a && random.coin() ? kernel[0] : random.of({1, 2, 3, 3, 4, 5, 5, 7, 7, 9});
            stride[a] = a && random.coin() ? stride[0] : random.number(1, 3);
            dilation[a] = random.of({1, 1, 1, 2});
            before[a] = random.number(0, kernel[a] / 2), after[a] = random.number(0, kernel[a] / 2);
            const int64_t reach = dilation[a] * (kernel[a] - 1) + 1 - before[a] - after[a];
            image[size_t(a)] = (reach > 1 ? reach : 1) + random.number(0, random.of({3, 20, 40}));
            made[size_t(a)] = (image[size_t(a)] - reach) / stride[a] + 1;
        }
        for (int64_t v : {kernel[0], kernel[1], stride[0], stride[1], before[0], before[1], after[0], after[1],
                          dilation[0], dilation[1]})
            attribute(double(v));
        return made;
    }
};


// A random instruction of that op.
Case make(Op op, Random& random) {
    Case c{random, {op, {}, {}}, random.number(1, 3), {}, {}};
    const int64_t channels = random.of({1, 3, 4, 5, 8, 12, 16, 17, 24, 33, 40, 96});
    Shape shape = {random.number(1, 20), random.number(1, 20), channels};
    const Shape vector = {channels}, one = {1, 1, channels};
    const bool depthwise = random.coin();
    const int64_t k = random.number(2, 4), outs = random.number(1, 40), inner = random.number(1, 20);
    const Shape weight = depthwise ? Shape{k, k, channels} : Shape{outs, k, k, inner};
    const int64_t filters = depthwise ? channels : outs;
    const int64_t values = random.of({1, 17, 256, 257, 5000, 40000});
    const int64_t groups = channels % 8 == 0 ? random.of({1, 2, 8, channels}) : random.of({1, channels});
    switch (op) {
        case Op::normalize:
            c.operand(Dtype::u8, Scope::micro, shape), c.fixed(vector), c.fixed(vector), c.image(shape);
            break;
        case Op::conv:
        case Op::conv_dx:
        case Op::conv_dw: {
            const Shape made = c.window(shape);
            const Shape w = {int64_t(c.instruction.attributes[0]), int64_t(c.instruction.attributes[1]), channels};
            c.attribute(double(channels)), c.attribute(1);
            if (op == Op::conv) {
                c.image(shape), c.weight(w, channels), c.maybe_fixed(vector), c.maybe_image(made), c.image(made);
                c.maybe_bits(made), c.act();
            } else if (op == Op::conv_dx) {
                c.image(made), c.weight(w, channels), c.maybe_image(shape), c.maybe_bits(shape), c.image(shape);
                c.maybe_fixed(vector), c.attribute(random.coin() ? 0 : 0.5);
            } else {
                c.image(shape), c.image(made), c.fixed(w);
            }
            break;
        }
        case Op::group_norm:
            c.image(shape), c.maybe_fixed(vector), c.maybe_fixed(vector), c.image(shape);
            c.maybe_image({groups, 2}), c.maybe_bits(shape), c.attribute(double(groups)), c.attribute(1e-5), c.act();
            break;
        case Op::affine:
            c.image(shape), c.fixed(vector), c.maybe_fixed(vector), c.image(shape), c.maybe_bits(shape), c.act();
            break;
        case Op::activation: c.image(shape), c.image(shape), c.maybe_bits(shape), c.act(); break;
        case Op::add: c.image(shape), c.image(shape), c.image(shape), c.maybe_bits(shape), c.act(); break;
        case Op::smooth:
        case Op::smooth_grad:
            if (op == Op::smooth_grad) c.image(shape);
            c.image(shape), c.image(shape), c.attribute(double(random.number(0, 8))), c.attribute(0.5);
            break;
        case Op::gate: c.image(shape), c.image(one), c.image(shape); break;
        case Op::gate_grad: c.image(shape), c.image(shape), c.image(one), c.image(shape), c.image(one); break;
        case Op::avg_pool:
        case Op::avg_pool_grad:
        case Op::max_pool:
        case Op::max_pool_grad: {
            const Shape made = c.window(shape);
            const bool average = op == Op::avg_pool || op == Op::avg_pool_grad;
            if (average) c.attribute(double(random.coin())), c.attribute(double(random.of({0, 3})));
            if (op == Op::avg_pool) c.image(shape), c.image(made);
            if (op == Op::avg_pool_grad) c.image(made), c.maybe_image(shape), c.image(shape);
            if (op == Op::max_pool) {
                c.image(shape), c.image(made);
                random.coin() ? void(c.operand(Dtype::u8, Scope::micro, made)) : c.absent();
            }
            if (op == Op::max_pool_grad) c.image(made), c.operand(Dtype::u8, Scope::micro, made), c.image(shape);
            break;
        }
        case Op::adaptive_pool:
        case Op::adaptive_pool_grad:
        case Op::upsample:
        case Op::upsample_grad: {
            const Shape made = {random.of({1, 2, shape[0], 7, 40}), random.of({1, 3, shape[1], 9, 40}), channels};
            if (op == Op::adaptive_pool) c.image(shape), c.image(made);
            if (op == Op::adaptive_pool_grad) c.image(made), c.maybe_image(shape), c.image(shape);
            if (op == Op::upsample) c.image(shape), c.maybe_image(made), c.image(made);
            if (op == Op::upsample_grad) c.image(made), c.image(shape);
            break;
        }
        case Op::dropout:
            c.image(shape), c.image(shape), c.maybe_bits(shape), c.attribute(0.3), c.attribute(5);
            break;
        case Op::dropout_grad: c.image(shape), c.bits(shape), c.image(shape), c.attribute(0.3); break;
        case Op::softmax_loss:
            c.image(one), c.operand(Dtype::i32, Scope::micro, {}, channels), c.image(one);
            c.operand(Dtype::f64, Scope::fixed, {2}), c.attribute(0.1);
            break;
        case Op::copy: c.image(shape), c.image(shape); break;
        case Op::standardize:
        case Op::standardize_grad: c.fixed(weight), c.fixed(weight), c.attribute(1e-5), c.attribute(depthwise); break;
        case Op::scale_weight:
        case Op::scale_weight_grad:
            c.weight(weight, filters), c.maybe_fixed({filters}), c.fixed({filters}), c.fixed(weight);
            if (op == Op::scale_weight_grad) c.maybe_fixed({filters});
            c.attribute(depthwise);
            break;
        case Op::shift_bias:
            for (int i = 0; i < 3; ++i) c.maybe_fixed(vector);
            for (int i = 0; i < 3; ++i) c.fixed(vector);
            break;
        case Op::shift_bias_grad:
            c.fixed(vector), c.maybe_fixed(vector), c.maybe_fixed(vector), c.fixed(vector), c.fixed(vector);
            for (int i = 0; i < 3; ++i) c.maybe_fixed(vector);
            break;
        case Op::act_grad: c.image(shape), c.bits(shape), c.image(shape), c.maybe_fixed(vector), c.attribute(0); break;
        case Op::bias_grad: c.image(shape), c.fixed(vector); break;
        case Op::group_norm_grad:
            c.image(shape), c.image(shape), c.image({groups, 2}), c.maybe_fixed(vector), c.image(shape);
            c.maybe_fixed(vector), c.maybe_fixed(vector), c.attribute(double(groups));
            break;
        case Op::affine_grad: c.image(shape), c.fixed(vector), c.image(shape); break;
        case Op::channel_dot: c.image(shape), c.image(shape), c.fixed(vector); break;
        case Op::zero: c.fixed({values}); break;
        case Op::sgd:
            c.fixed({values}), c.fixed({values}), c.maybe_fixed({values}), c.attribute(0.1), c.attribute(0.9);
            break;
        case Op::adam:
            for (int i = 0; i < 4; ++i) c.fixed({values});
            for (double a : {0.1, 0.9, 0.99, 1e-6}) c.attribute(a);
            break;
        case Op::sgd8:
        case Op::adam8:
            c.fixed({values}), c.fixed({values});
            for (int i = 0; i < (op == Op::sgd8 ? 1 : 2); ++i)
                c.operand(Dtype::u8, Scope::fixed, {values}), c.fixed({(values + 255) / 256});
            for (double a : {0.1, 0.9, 0.99, 1e-6})
                if (op == Op::adam8 || a == 0.1 || a == 0.9) c.attribute(a);
            break;
    }
    return c;
}

using Values = std::vector<std::vector<std::byte>>;

// All operands after the kernel, each of which lay in memory of exactly its size while it ran.
Values run(const Case& c, Kernel kernel, Threads& threads) {
    std::vector<Tensor> tensors = c.tensors;
    std::vector<std::unique_ptr<std::byte[]>> memory;
    for (size_t i = 0; i < tensors.size(); ++i) {
        memory.emplace_back(new std::byte[c.values[i].size()]);
        if (!c.values[i].empty()) std::memcpy(memory[i].get(), c.values[i].data(), c.values[i].size());
        tensors[i].data = memory[i].get();
    }
    const size_t bytes = size_t(scratch_per_thread) * size_t(threads.count());
    std::byte* scratch = static_cast<std::byte*>(std::aligned_alloc(64, bytes));
    std::memset(scratch, 0x7F, bytes);  // large numbers: what is not written must not be read
    const StepScalars step{0.01, 3, 7, 8, true};
    kernel(Call{c.instruction, tensors.data(), c.images, 0, 0, threads, scratch, step});
    std::free(scratch);
    Values found = c.values;
    for (size_t i = 0; i < found.size(); ++i)
        if (!found[i].empty()) std::memcpy(found[i].data(), memory[i].get(), found[i].size());
    return found;
}

float at(const Values& values, size_t operand, int64_t i) {
    float v;
    std::memcpy(&v, values[operand].data() + i * 4, sizeof v);
    return v;
}

// Element i of a depthwise weight of any type.
double weight_at(const Case& c, size_t w, int64_t i) {
    const std::byte* data = c.values[w].data();
    switch (c.tensors[w].dtype) {
        case Dtype::f32:
            return double(at(c.values, w, i)) *
                   (c.values[w + 1].empty() ? 1.0 : double(at(c.values, w + 1, i % c.tensors[w].shape[2])));
        case Dtype::i8: return double(int8_t(data[i])) * at(c.values, w + 1, i % c.tensors[w].shape[2]);
        case Dtype::u8: return at(c.values, w + 1, int64_t(data[i]));
        default: {
            uint16_t h;
            std::memcpy(&h, data + 2 * i, sizeof h);
            const double m = h & 1023, e = h >> 10;
            return (e == 0 ? std::ldexp(m, -24) : std::ldexp(1024 + m, int(e) - 25)) * at(c.values, w + 1, 0);
        }
    }
}

// The largest difference of a depthwise convolution from plain loops, relative to the largest value.
double difference(const Case& c, Op op, const Values& found) {
    const Window w = c.instruction.window();
    const bool forward = op == Op::conv, by_weight = op == Op::conv_dw;
    const Tensor& x = c.tensors[op == Op::conv_dx ? 5 : 0];
    const Tensor& g = c.tensors[forward ? 5 : by_weight ? 1 : 0];
    const int64_t height = x.shape[0], width = x.shape[1], channels = x.shape[2];
    const int64_t rows = g.shape[0], columns = g.shape[1];
    const size_t made = by_weight ? 2 : 5;
    std::vector<double> sums(found[made].size() / 4);
    for (int64_t n = 0; n < c.images; ++n)
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j)
                for (int64_t ky = 0; ky < w.kh; ++ky)
                    for (int64_t kx = 0; kx < w.kw; ++kx) {
                        const int64_t y = i * w.sh - w.top + ky * w.dh, z = j * w.sw - w.left + kx * w.dw;
                        if (y < 0 || y >= height || z < 0 || z >= width) continue;
                        for (int64_t ch = 0; ch < channels; ++ch) {
                            const int64_t out = ((n * rows + i) * columns + j) * channels + ch;
                            const int64_t in = ((n * height + y) * width + z) * channels + ch;
                            const int64_t tap = (ky * w.kw + kx) * channels + ch;
                            if (forward) sums[size_t(out)] += double(at(c.values, 0, in)) * weight_at(c, 1, tap);
                            else if (by_weight)
                                sums[size_t(tap)] += double(at(c.values, 0, in)) * double(at(c.values, 1, out));
                            else sums[size_t(in)] += double(at(c.values, 0, out)) * weight_at(c, 1, tap);
                        }
                    }
    double worst = 0, largest = 1e-30;
    for (size_t i = 0; i < sums.size(); ++i) {
        const int64_t k = int64_t(i), ch = k % channels;
        double z = sums[i];
        if (forward) {
            if (c.instruction.operands[3] >= 0) z += double(at(c.values, 3, ch));
            if (c.instruction.operands[4] >= 0) z += double(at(c.values, 4, k));
            largest = std::fmax(largest, std::fabs(z));
            const double lo = c.instruction.attributes[12], hi = c.instruction.attributes[13];
            z = z >= hi ? hi : z <= lo ? lo + c.instruction.attributes[14] * (z - lo) : z;
        } else if (by_weight) {
            z += double(at(c.values, 2, k));
        } else {
            if (c.instruction.operands[3] >= 0) z += double(at(c.values, 3, k));
            const int64_t byte = k / channels * ((channels + 7) / 8) + ch / 8;
            if (c.instruction.operands[4] >= 0 && !(int(c.values[4][size_t(byte)]) >> (ch & 7) & 1))
                z *= c.instruction.attributes[12];
        }
        largest = std::fmax(largest, std::fabs(z));
        worst = std::fmax(worst, std::fabs(z - double(at(found, made, k))));
    }
    return worst / largest;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) return std::fputs("usage: check_other SEED COUNT\n", stderr), 2;
    Random random{std::mt19937_64(std::strtoull(argv[1], nullptr, 10))};
    const int64_t count = std::atoll(argv[2]);
    Threads one(1), two(2), three(3);
    int wrong = 0, ran = 0;
    double worst = 0;
    for (int number = 1; number <= 64; ++number) {
        const Op op = static_cast<Op>(number);
        if (!isas()[0].kernel_of(op)) continue;
        for (int64_t n = 0; n < count; ++n) {
            const Case c = make(op, random);
            const bool depthwise = op == Op::conv || op == Op::conv_dx || op == Op::conv_dw;
            for (const Isa& isa : isas()) {
                const Values found = run(c, isa.kernel_of(op), one);
                for (Threads* threads : {&two, &three})
                    if (run(c, isa.kernel_of(op), *threads) != found) {
                        std::printf("%s op %d case %lld: other bits on %d threads\n", isa.name, number,
                                    static_cast<long long>(n), threads->count());
                        ++wrong;
                    }
                const double error = depthwise ? difference(c, op, found) : 0;
                if (!(error < 1e-5)) {
                    std::printf("%s op %d case %lld: off by %g\n", isa.name, number, static_cast<long long>(n), error);
                    ++wrong;
                }
                worst = std::fmax(worst, error);
                ++ran;
            }
        }
    }
    std::printf("%d cases, %d wrong; depthwise convolutions off by %.2g at most\n", ran, wrong, worst);
    return wrong ? 1 : 0;
}
