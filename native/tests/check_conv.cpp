// Holds conv, conv_dx and conv_dw (without depthwise) against plain loops in double precision, and times them.
//
//   check_conv check SEED COUNT   COUNT random geometries for each operation and instruction set that runs here:
//                                 values, mask bits, all types of weights, in place, the same bits on 1 to 3 threads
//   check_conv time ISA THREADS   a line of standard input a case, "op images H W C O kernel stride pad groups dtype"
//                                 (f32s: an f32 weight with a scale for each output channel);
//                                 prints it with seconds (the least of many runs), billions of multiply-adds a second,
//                                 and their share of what the multiply-add loop alone reaches right then
//   check_conv peak ISA THREADS   what the multiply-add loop alone reaches
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <limits>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "../runtime/call.hpp"

#define TINYTL_DECLARE(isa)                          \
    namespace tinytl {                               \
    namespace isa {                                  \
    void conv(const Call&);                          \
    void conv_dx(const Call&);                       \
    void conv_dw(const Call&);                       \
    double gemm_peak(Threads&, std::byte* scratch);  \
    }                                                \
    }
// As in CMakeLists.txt: TINYTL_HAVE_X is defined where the kernels were compiled for X.
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
    std::string name;
    void (*op[3])(const Call&);
    double (*peak)(Threads&, std::byte*);
};

#define TINYTL_ADD(isa) found.push_back({#isa, {isa::conv, isa::conv_dx, isa::conv_dw}, isa::gemm_peak})

// Those that were compiled and run here.
std::vector<Isa> isas() {
    std::vector<Isa> found;
#if TINYTL_HAVE_PLAIN
    TINYTL_ADD(plain);
#endif
#if TINYTL_HAVE_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        TINYTL_ADD(avx2);
#endif
#if TINYTL_HAVE_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        TINYTL_ADD(avx512);
#endif
#if TINYTL_HAVE_NEON
    TINYTL_ADD(neon);
#endif
    return found;
}

struct Case {
    int op = 0;  // 0 conv, 1 conv_dx, 2 conv_dw
    int64_t images = 1, h = 1, w = 1, c = 1, o = 1;
    Window k{1, 1, 1, 1, 0, 0, 0, 0, 1, 1};
    int64_t groups = 1;
    Dtype dtype = Dtype::f32;
    bool scaled = false;  // an f32 weight with a table beside it
    bool bias = false, more = false, in_place = false, mask = false, batch = false;
    double lo = -std::numeric_limits<double>::infinity(), hi = -lo, slope = 0;

    int64_t oh() const { return (h + k.top + k.bottom - k.dh * (k.kh - 1) - 1) / k.sh + 1; }
    int64_t ow() const { return (w + k.left + k.right - k.dw * (k.kw - 1) - 1) / k.sw + 1; }
    bool possible() const {
        return h + k.top + k.bottom > k.dh * (k.kh - 1) && w + k.left + k.right > k.dw * (k.kw - 1);
    }
    int64_t depth() const { return c / groups; }
    double work() const { return double(images) * oh() * ow() * o * k.kh * k.kw * depth(); }
    std::string text() const {
        std::ostringstream s;
        s << "op " << op << " images " << images << " " << h << "x" << w << "x" << c << " -> " << o << " kernel "
          << k.kh << "x" << k.kw << " stride " << k.sh << "," << k.sw << " pad " << k.top << "," << k.left << ","
          << k.bottom << "," << k.right << " dilation " << k.dh << "," << k.dw << " groups " << groups << " dtype "
          << int(dtype) << " scaled " << scaled << " bias " << bias << " more " << more << " in place " << in_place << " mask " << mask
          << " lo " << lo << " hi " << hi << " slope " << slope;
        return s.str();
    }
};

using Bytes = std::vector<std::byte>;

template <class T>
Bytes bytes_of(const std::vector<T>& v) {
    Bytes b(v.size() * sizeof(T));
    if (!v.empty()) std::memcpy(b.data(), v.data(), b.size());
    return b;
}

float half_value(uint16_t h) {
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    const double v = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return static_cast<float>(h & 0x8000 ? -v : v);
}

// The operands of one case: x (the input), w, table, bias, more (residual or other), grad, mask.
struct Data {
    std::vector<float> x, w, bias, more, grad;  // w: values, as the codes mean
    Bytes codes;
    std::vector<float> table;
    std::vector<uint8_t> mask;

    Data(const Case& one, std::mt19937& random) {
        std::uniform_real_distribution<float> uniform(-1, 1);
        const auto fill = [&](std::vector<float>& v, int64_t n) {
            v.resize(n);
            for (float& f : v) f = uniform(random);
        };
        const int64_t weights = one.o * one.k.kh * one.k.kw * one.depth(), each = weights / one.o;
        fill(x, one.images * one.h * one.w * one.c);
        fill(grad, one.images * one.oh() * one.ow() * one.o);
        fill(bias, one.op == 1 ? one.c : one.o);
        fill(more, one.op == 1 ? x.size() : grad.size());
        fill(w, weights);
        mask.resize(one.images * one.h * one.w * ((one.c + 7) / 8));
        for (uint8_t& m : mask) m = static_cast<uint8_t>(random());
        if (one.dtype == Dtype::f32) {
            codes = bytes_of(w);
            if (one.scaled) fill(table, one.o);
            for (int64_t i = 0; one.scaled && i < weights; ++i) w[i] *= table[i / each];
        } else if (one.dtype == Dtype::i8) {
            fill(table, one.o);
            std::vector<int8_t> q(weights);
            for (int64_t i = 0; i < weights; ++i) {
                q[i] = static_cast<int8_t>(random());
                w[i] = q[i] * table[i / each];
            }
            codes = bytes_of(q);
        } else if (one.dtype == Dtype::u8) {
            fill(table, 256);
            std::vector<uint8_t> q(weights);
            for (int64_t i = 0; i < weights; ++i) w[i] = table[q[i] = static_cast<uint8_t>(random())];
            codes = bytes_of(q);
        } else {
            fill(table, 1);
            std::vector<uint16_t> q(weights);
            for (int64_t i = 0; i < weights; ++i) {
                q[i] = static_cast<uint16_t>(random() & 0xbfff);  // |value| < 2
                if (i % 5 == 0) q[i] &= 0x83ff;                   // without a leading 1
                w[i] = half_value(q[i]) * table[0];
            }
            codes = bytes_of(q);
        }
    }
};

Tensor tensor(Dtype dtype, std::vector<int64_t> shape, Scope scope, int64_t image_bytes, void* data) {
    Tensor t{};
    t.dtype = dtype;
    t.scope = scope;
    t.rank = static_cast<int32_t>(shape.size());
    for (size_t i = 0; i < shape.size(); ++i) t.shape[i] = shape[i];
    t.image_bytes = image_bytes;
    t.data = static_cast<std::byte*>(data);
    return t;
}

struct Result {
    std::vector<float> y;       // conv: y; conv_dx: y; conv_dw: w
    std::vector<uint8_t> mask;  // conv
    std::vector<float> bias;    // conv_dx
};

// An instruction's operands set up once, so that it can be run again and again.
struct Runner {
    const Case& one;
    Data& data;
    Result result;
    std::vector<Tensor> tensors;
    Instruction instruction;
    std::vector<float> skipped;  // y where it has the scope of the batch: the images before come first
    int64_t first = 0;

    Runner(const Case& one, Data& data) : one(one), data(data) {
        const Window& k = one.k;
        for (int64_t n : {k.kh, k.kw, k.sh, k.sw, k.top, k.left, k.bottom, k.right, k.dh, k.dw, one.groups, int64_t{0}})
            instruction.attributes.push_back(static_cast<double>(n));
        const int64_t in = one.h * one.w * one.c, out = one.oh() * one.ow() * one.o;
        const auto image = [&](std::vector<float>& v, int64_t h, int64_t w, int64_t c) {
            return tensor(Dtype::f32, {h, w, c}, Scope::micro, h * w * c * 4, v.data());
        };
        const auto vector = [&](std::vector<float>& v) {
            return tensor(Dtype::f32, {int64_t(v.size())}, Scope::fixed, v.size() * 4, v.data());
        };
        const auto input = [&](std::vector<float>& v) { return image(v, one.h, one.w, one.c); };
        const auto output = [&](std::vector<float>& v) { return image(v, one.oh(), one.ow(), one.o); };
        const auto operand = [&](const Tensor& t) {
            tensors.push_back(t);
            instruction.operands.push_back(static_cast<int32_t>(tensors.size()) - 1);
        };
        const auto optional = [&](bool present, const Tensor& t) {
            if (present) operand(t);
            else instruction.operands.push_back(-1);
        };
        const std::vector<int64_t> shape{one.o, k.kh, k.kw, one.depth()};
        const Tensor w = tensor(one.dtype, shape, Scope::fixed, data.codes.size(), data.codes.data());
        const float none = std::numeric_limits<float>::quiet_NaN();
        if (one.op == 0) {
            instruction.op = Op::conv;
            for (double a : {one.lo, one.hi, one.slope}) instruction.attributes.push_back(a);
            result.y = one.in_place ? data.more : std::vector<float>(out * one.images, none);
            result.mask.assign(one.images * one.oh() * one.ow() * ((one.o + 7) / 8), 0xa5);
            operand(input(data.x));
            operand(w);
            optional(!data.table.empty(), vector(data.table));
            optional(one.bias, vector(data.bias));
            optional(one.more, output(one.in_place ? result.y : data.more));
            operand(output(result.y));
            optional(one.mask, tensor(Dtype::bits, {one.oh(), one.ow(), one.o}, Scope::micro,
                                      result.mask.size() / one.images, result.mask.data()));
        } else if (one.op == 1) {
            instruction.op = Op::conv_dx;
            instruction.attributes.push_back(one.slope);
            result.y = one.in_place ? data.more : std::vector<float>(in * one.images, none);
            result.bias = data.bias;
            operand(output(data.grad));
            operand(w);
            optional(!data.table.empty(), vector(data.table));
            optional(one.more, input(one.in_place ? result.y : data.more));
            optional(one.mask, tensor(Dtype::bits, {one.h, one.w, one.c}, Scope::micro, data.mask.size() / one.images,
                                      data.mask.data()));
            operand(input(result.y));
            optional(one.bias, vector(result.bias));
        } else {
            instruction.op = Op::conv_dw;
            result.y = data.w;
            operand(input(data.x));
            operand(output(data.grad));
            operand(tensor(Dtype::f32, shape, Scope::fixed, result.y.size() * 4, result.y.data()));
        }
        if (one.batch) {  // the result belongs to the whole batch, of which three images come before these
            Tensor& y = tensors[instruction.operands[one.op == 2 ? 1 : 5]];
            y.scope = Scope::batch;
            y.data -= 3 * y.image_bytes;
            first = 3;
        }
    }

    void run(const Isa& isa, Threads& threads, std::byte* scratch) {
        const StepScalars step{0.0, 1, 0, 1, true};
        const Call call{instruction, tensors.data(), one.images, first, 0, threads, scratch, step};
        isa.op[one.op](call);
    }
};

struct Expected {
    std::vector<double> y, size;  // size: sum of the absolute values that were added up
    std::vector<double> bias, bias_size;
};

// For each tap of each pixel: body(n, ih, iw, oh, ow, r, s).
template <class Body>
void for_taps(const Case& one, Body body) {
    const Window& k = one.k;
    for (int64_t n = 0; n < one.images; ++n)
        for (int64_t i = 0; i < one.oh(); ++i)
            for (int64_t j = 0; j < one.ow(); ++j)
                for (int64_t r = 0; r < k.kh; ++r)
                    for (int64_t s = 0; s < k.kw; ++s) {
                        const int64_t h = i * k.sh - k.top + r * k.dh, w = j * k.sw - k.left + s * k.dw;
                        if (h >= 0 && h < one.h && w >= 0 && w < one.w) body(n, h, w, i, j, r, s);
                    }
}

Expected expect(const Case& one, const Data& data) {
    Expected e;
    const int64_t depth = one.depth(), rows = one.o / one.groups;
    e.y.assign(one.op == 0 ? data.grad.size() : one.op == 1 ? data.x.size() : data.w.size(), 0.0);
    if (one.op == 2) e.y.assign(data.w.begin(), data.w.end());
    e.size.resize(e.y.size());
    for (size_t i = 0; i < e.y.size(); ++i) e.size[i] = std::fabs(e.y[i]);
    for_taps(one, [&](int64_t n, int64_t h, int64_t w, int64_t i, int64_t j, int64_t r, int64_t s) {
        for (int64_t o = 0; o < one.o; ++o)
            for (int64_t c = 0; c < depth; ++c) {
                const int64_t at_x = ((n * one.h + h) * one.w + w) * one.c + o / rows * depth + c;
                const int64_t at_y = ((n * one.oh() + i) * one.ow() + j) * one.o + o;
                const int64_t at_w = ((o * one.k.kh + r) * one.k.kw + s) * depth + c;
                const int64_t at = one.op == 0 ? at_y : one.op == 1 ? at_x : at_w;
                const double term = double(one.op == 0 ? data.x[at_x] : data.grad[at_y]) *
                                    (one.op == 2 ? data.x[at_x] : data.w[at_w]);
                e.y[at] += term;
                e.size[at] += std::fabs(term);
            }
    });
    if (one.op == 0)
        for (size_t i = 0; i < e.y.size(); ++i) {
            if (one.bias) e.y[i] += data.bias[i % one.o];
            if (one.more) e.y[i] += data.more[i];
            e.size[i] += 2;
        }
    if (one.op == 1) {
        e.bias.assign(one.c, 0.0);
        e.bias_size.assign(one.c, 1.0);
        for (size_t i = 0; i < e.y.size(); ++i) {
            const int64_t c = i % one.c, pixel = i / one.c;
            if (one.more) e.y[i] += data.more[i];
            e.size[i] += 1;
            if (one.mask && !(data.mask[pixel * ((one.c + 7) / 8) + c / 8] >> (c % 8) & 1)) e.y[i] *= one.slope;
            e.bias[c] += e.y[i];
            e.bias_size[c] += e.size[i];
        }
        for (int64_t c = 0; c < one.c; ++c) e.bias[c] += data.bias[c];
    }
    return e;
}

// Empty where it is right.
std::string compare(const Case& one, const Expected& e, const Result& result) {
    const double tolerance = 4e-6;  // of the sum of absolute values
    std::ostringstream wrong;
    const int64_t bytes = (one.o + 7) / 8;
    for (size_t i = 0; i < e.y.size(); ++i) {
        double y = e.y[i];
        if (one.op == 0) {
            if (y <= one.lo) y = one.lo + one.slope * (y - one.lo);
            else if (y >= one.hi) y = one.hi;
            const double edge = std::fmin(std::fabs(e.y[i] - one.lo), std::fabs(e.y[i] - one.hi));
            if (one.mask && edge > tolerance * e.size[i]) {
                const bool inside = e.y[i] > one.lo && e.y[i] < one.hi;
                const int64_t c = i % one.o;
                if (inside != bool(result.mask[i / one.o * bytes + c / 8] >> (c % 8) & 1)) {
                    wrong << "mask of element " << i << " (" << e.y[i] << ")";
                    return wrong.str();
                }
            }
        }
        if (!(std::fabs(y - result.y[i]) <= tolerance * e.size[i])) {
            wrong << "element " << i << ": " << result.y[i] << ", expected " << y;
            return wrong.str();
        }
    }
    if (one.op == 0 && one.mask && one.o % 8)
        for (size_t i = bytes - 1; i < result.mask.size(); i += bytes)
            if (result.mask[i] >> (one.o % 8)) return "bits behind the last channel";
    if (one.op == 1 && one.bias)
        for (int64_t c = 0; c < one.c; ++c)
            if (!(std::fabs(e.bias[c] - result.bias[c]) <= tolerance * e.bias_size[c])) {
                wrong << "bias " << c << ": " << result.bias[c] << ", expected " << e.bias[c];
                return wrong.str();
            }
    return "";
}

Case random_case(int op, std::mt19937& random) {
    const auto pick = [&](int64_t low, int64_t high) { return low + int64_t(random() % uint64_t(high - low + 1)); };
    Case one;
    do {
        one = Case{};
        one.op = op;
        one.images = pick(1, 3);
        one.groups = pick(0, 2) ? 1 : pick(2, 4);
        const int64_t widest = pick(0, 3) ? 40 : 150;
        one.c = one.groups * pick(1, widest / one.groups);
        one.o = one.groups * pick(1, widest / one.groups);
        one.h = pick(1, 16);
        one.w = pick(1, 16);
        if (pick(0, 1)) {
            const bool same = pick(0, 1);
            Window& k = one.k;
            k.kh = pick(1, 5), k.kw = same ? k.kh : pick(1, 5);
            k.sh = pick(1, 3), k.sw = same ? k.sh : pick(1, 3);
            k.dh = pick(0, 3) ? 1 : 2, k.dw = same ? k.dh : pick(1, 3);
            k.top = pick(0, 3), k.left = same ? k.top : pick(0, 3);
            k.bottom = same ? k.top : pick(0, 3), k.right = same ? k.top : pick(0, 3);
        } else if (!pick(0, 3)) {
            one.k.sh = one.k.sw = pick(2, 3);
        }
        if (!pick(0, 5)) one.h = one.w = 1, one.images = pick(1, 10), one.c *= pick(1, 8);
        if (!pick(0, 7)) one.h = 40, one.w = pick(30, 50);
    } while (!one.possible() || one.work() > 2e7);
    const Dtype dtypes[] = {Dtype::f32, Dtype::f32, Dtype::i8, Dtype::u8, Dtype::f16};
    one.dtype = op == 2 ? Dtype::f32 : dtypes[pick(0, 4)];
    one.scaled = op != 2 && one.dtype == Dtype::f32 && pick(0, 1);
    one.bias = pick(0, 1);
    one.more = pick(0, 1);
    one.in_place = one.more && pick(0, 1);
    one.mask = pick(0, 1);
    one.batch = !pick(0, 3);
    if (op == 0) {
        const int act = int(pick(0, 3));  // none, ReLU, ReLU6-like, leaky
        if (act) one.lo = act == 2 ? -0.5 : 0;
        if (act == 2) one.hi = 0.75;
        if (act == 3) one.slope = 0.25;
    } else {
        one.slope = pick(0, 1) ? 0.25 : 0;
    }
    return one;
}

// Shapes that the random ones do not reach: many pieces of k, many parts of rows, more channels than are summed in
// scratch memory.
std::vector<Case> large_cases(int op) {
    std::vector<Case> cases;
    const auto add = [&](int64_t images, int64_t h, int64_t w, int64_t c, int64_t o, Window k, int64_t groups) {
        Case one;
        one.op = op, one.images = images, one.h = h, one.w = w, one.c = c, one.o = o, one.k = k, one.groups = groups;
        one.bias = one.mask = one.more = one.in_place = true;
        one.scaled = op != 2 && cases.size() % 2;
        if (op == 0) one.lo = 0;
        cases.push_back(one);
    };
    const Window point{1, 1, 1, 1, 0, 0, 0, 0, 1, 1};
    add(1, 5, 5, 1000, 331, point, 1);
    add(2, 1, 1, 1280, 102, point, 1);
    add(2, 45, 47, 24, 40, point, 1);
    add(1, 2, 3, 9001, 5, point, 1);
    add(1, 2, 3, 5, 9001, point, 1);
    add(1, 9, 7, 96, 96, {5, 5, 1, 1, 2, 2, 2, 2, 1, 1}, 2);
    add(1, 7, 7, 130, 70, {3, 3, 2, 2, 1, 1, 1, 1, 1, 1}, 1);
    add(1, 64, 64, 3, 32, {3, 3, 2, 2, 0, 0, 1, 1, 1, 1}, 1);
    return cases;
}

int check(unsigned seed, int count) {
    std::mt19937 random(seed);
    std::vector<float> memory(3 * scratch_per_thread / 4 + 16);
    void* start = memory.data();
    size_t room = memory.size() * 4;
    std::byte* scratch = static_cast<std::byte*>(std::align(64, 3 * scratch_per_thread, start, room));
    Threads one_thread(1), two(2), three(3);
    int64_t done = 0;
    for (int op = 0; op < 3; ++op) {
        std::vector<Case> cases = large_cases(op);
        for (int i = 0; i < count; ++i) cases.push_back(random_case(op, random));
        for (const Case& one : cases) {
            Data data(one, random);
            const Expected expected = expect(one, data);
            for (const Isa& isa : isas()) {
                Runner alone(one, data);
                alone.run(isa, one_thread, scratch);
                const std::string wrong = compare(one, expected, alone.result);
                if (!wrong.empty()) {
                    std::cout << isa.name << ": " << one.text() << ": " << wrong << "\n";
                    return 1;
                }
                for (Threads* threads : {&two, &three}) {
                    Runner together(one, data);
                    together.run(isa, *threads, scratch);
                    const char* other = bytes_of(together.result.y) != bytes_of(alone.result.y)       ? "result"
                                        : together.result.mask != alone.result.mask                   ? "mask"
                                        : bytes_of(together.result.bias) != bytes_of(alone.result.bias) ? "bias"
                                                                                                        : nullptr;
                    if (other) {
                        std::cout << isa.name << ": " << one.text() << ": " << threads->count() << " threads: the "
                                  << other << " has other bits than on one\n";
                        return 1;
                    }
                }
                ++done;
            }
        }
    }
    std::cout << done << " cases agree on";
    for (const Isa& isa : isas()) std::cout << " " << isa.name;
    std::cout << "\n";
    return 0;
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

const Isa* isa_of(const std::vector<Isa>& all, const std::string& name) {
    for (const Isa& isa : all)
        if (isa.name == name) return &isa;
    std::cerr << "check_conv: " << name << ": not an instruction set that runs here\n";
    std::exit(2);
}

int time_cases(const std::string& name, int count) {
    const std::vector<Isa> all = isas();
    const Isa& isa = *isa_of(all, name);
    Threads threads(count);
    std::byte* scratch = static_cast<std::byte*>(std::aligned_alloc(64, count * scratch_per_thread));
    std::mt19937 random(1);
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        std::string op, dtype;
        Case one;
        int64_t kernel, stride, pad;
        words >> op >> one.images >> one.h >> one.w >> one.c >> one.o >> kernel >> stride >> pad >> one.groups >> dtype;
        one.op = op == "conv" ? 0 : op == "conv_dx" ? 1 : 2;
        one.k = {kernel, kernel, stride, stride, pad, pad, pad, pad, 1, 1};
        one.dtype = dtype == "i8" ? Dtype::i8 : dtype == "u8" ? Dtype::u8 : dtype == "f16" ? Dtype::f16 : Dtype::f32;
        one.scaled = dtype == "f32s";
        one.bias = true;
        one.mask = one.op == 1 || one.h > 1;
        if (one.op == 0) one.lo = 0, one.hi = 6;
        Data data(one, random);
        Runner runner(one, data);
        double best = 1e30;
        const double end = now() + 0.15;
        for (int i = 0; i < 5 || now() < end; ++i) {
            const double begin = now();
            runner.run(isa, threads, scratch);
            best = std::fmin(best, now() - begin);
        }
        const double rate = 1e-9 * one.work() / best, peak = isa.peak(threads, scratch);
        std::printf("%s %.3e %.1f %.2f\n", line.c_str(), best, rate, rate / peak);
        std::fflush(stdout);
    }
    std::free(scratch);
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    const std::string mode = argc == 4 ? argv[1] : "";
    if (mode == "check") return check(static_cast<unsigned>(std::atoi(argv[2])), std::atoi(argv[3]));
    if (mode == "time") return time_cases(argv[2], std::atoi(argv[3]));
    if (mode == "peak") {
        const std::vector<Isa> all = isas();
        const int count = std::atoi(argv[3]);
        Threads threads(count);
        std::byte* scratch = static_cast<std::byte*>(std::aligned_alloc(64, count * scratch_per_thread));
        std::printf("%.1f\n", isa_of(all, argv[2])->peak(threads, scratch));
        std::free(scratch);
        return 0;
    }
    std::cerr << "check_conv check SEED COUNT | time ISA THREADS | peak ISA THREADS\n";
    return 2;
}
