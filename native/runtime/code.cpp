// Parsing of the section CODE.
#include <cmath>
#include <cstring>

#include "failure.hpp"
#include "model.hpp"
#include "op_table.hpp"

namespace tinytl {
namespace {

constexpr int64_t code_version = 2, align = 64, most = int64_t{1} << 40, scratch_bytes = 256 * 1024;
constexpr int64_t dtype_bytes[] = {4, 8, 1, 1, 2, 4, 8, 1};
constexpr const char* stream_names[] = {"begin", "micro", "finish", "evaluate"};

class Words {
public:
    explicit Words(Section section) : next_(section.data), left_(section.bytes / 8), all_(left_) {}
    int64_t number() { return take<int64_t>(); }
    double real() { return take<double>(); }
    int64_t left() const { return left_; }
    // A number from `least` to `highest`.
    int64_t number(const char* what, int64_t least, int64_t highest) {
        const int64_t value = number();
        if (value < least || value > highest)
            fail(TINYTL_BAD_FILE, "is damaged: %s is %lld (word %lld of CODE), expected %lld to %lld: compile it again", what,
                 static_cast<long long>(value), static_cast<long long>(all_ - left_ - 1), static_cast<long long>(least),
                 static_cast<long long>(highest));
        return value;
    }

private:
    template <class T>
    T take() {
        if (left_ <= 0) fail(TINYTL_BAD_FILE, "is damaged: CODE ends after %lld words: compile it again",
                             static_cast<long long>(all_));
        T value;
        std::memcpy(&value, next_, sizeof value);
        next_ += sizeof value;
        --left_;
        return value;
    }
    const std::byte* next_;
    int64_t left_, all_;
};

// Elements and bytes of one image; the factors are below `most`, and so are the bytes: times a batch they still fit.
void measure(Tensor& tensor, int number) {
    tensor.elements = 1;
    for (int i = 0; i < tensor.rank; ++i)
        if (__builtin_mul_overflow(tensor.elements, tensor.shape[i], &tensor.elements) || tensor.elements > most / 8)
            fail(TINYTL_BAD_FILE, "is damaged: tensor %d is too large: compile it again", number);
    if (tensor.dtype == Dtype::bits) {
        const int64_t row = tensor.rank ? tensor.shape[tensor.rank - 1] : 1;
        tensor.image_bytes = row ? tensor.elements / row * ((row + 7) / 8) : 0;
    } else {
        tensor.image_bytes = tensor.elements * dtype_bytes[static_cast<int>(tensor.dtype)];
    }
}

void read_tensor(Words& words, Model& model, int number, int64_t data_bytes) {
    Tensor& tensor = model.tensors[static_cast<size_t>(number)];
    tensor.role = static_cast<Role>(words.number("a tensor's role", 0, 9));
    tensor.dtype = static_cast<Dtype>(words.number("a tensor's type", 0, 7));
    tensor.scope = static_cast<Scope>(words.number("a tensor's scope", 0, 3));
    tensor.rank = static_cast<int32_t>(words.number("a tensor's rank", 0, 6));
    for (int64_t& extent : tensor.shape) extent = words.number("a tensor's extent", 0, most);
    tensor.data = nullptr;
    measure(tensor, number);
    const bool constant = tensor.role == Role::constant;
    if (constant && tensor.scope != Scope::fixed)
        fail(TINYTL_BAD_FILE, "is damaged: tensor %d is constant and not of scope 'fixed': compile it again", number);
    const int64_t offset = words.number("a tensor's offset", -1, most);
    const int64_t initial = words.number("the offset of a tensor's first values", -1, most);
    // Between the streams a tensor of scope 'micro' or 'tile' means nothing: each stream checks its own extent
    // (read_instruction).
    const int64_t bytes = tensor.image_bytes * (tensor.scope == Scope::batch ? model.batch : 1);
    const int64_t room = constant ? data_bytes : model.arena_bytes;
    if (offset >= 0 && (offset % align || offset > room || bytes > room - offset))
        fail(TINYTL_BAD_FILE, "is damaged: tensor %d (%lld bytes at %lld) does not fit %s of %lld bytes: compile it again",
             number, static_cast<long long>(bytes), static_cast<long long>(offset), constant ? "DATA" : "the arena",
             static_cast<long long>(room));
    if (initial >= 0 && (constant || tensor.scope != Scope::fixed || offset < 0 || initial % align || initial > data_bytes ||
                         bytes > data_bytes - initial))
        fail(TINYTL_BAD_FILE, "is damaged: the first values of tensor %d do not fit DATA: compile it again", number);
    if ((tensor.role == Role::trained || tensor.role == Role::state) &&
        (tensor.scope != Scope::fixed || offset < 0 || bytes > model.state_bytes - offset))
        fail(TINYTL_BAD_FILE, "is damaged: tensor %d is trained and lies outside of the state of %lld bytes: compile it again",
             number, static_cast<long long>(model.state_bytes));
    model.offset[static_cast<size_t>(number)] = offset;
    model.initial[static_cast<size_t>(number)] = initial;
}

// Images and labels are looked at once, when a step begins, and the state is what a checkpoint keeps: nothing else may lie
// over them, nor reach into the threads' scratch memory.
bool lies_well(const Model& model, int32_t number, int stream) {
    const Tensor& tensor = model.tensors[static_cast<size_t>(number)];
    const int64_t begin = model.offset[static_cast<size_t>(number)], bytes = model.bytes(tensor, stream);
    if (bytes > model.scratch_offset - begin) return false;
    if (tensor.role != Role::trained && tensor.role != Role::state && begin < model.state_bytes) return false;
    for (const int64_t slot : {model.images, model.labels}) {
        if (slot == number) continue;
        const int64_t other = model.offset[static_cast<size_t>(slot)];
        if (begin < other + model.bytes(model.tensors[static_cast<size_t>(slot)], stream) && begin + bytes > other) return false;
    }
    return true;
}

// Operands: each lies somewhere, is there where it must be, and is writable where it is written.
void check_operands(const Model& model, int stream, size_t at) {
    const Instruction& instruction = model.code[stream][at];
    const OpKind& kind = kind_of(static_cast<int64_t>(instruction.op));
    for (int i = 0; i < kind.operands; ++i) {
        const OperandKind& operand = kind.operand[i];
        const int32_t number = instruction.operands[static_cast<size_t>(i)];
        auto wrong = [&](const char* why) {
            fail(TINYTL_BAD_FILE, "is damaged: instruction %zu of '%s' (%s): %s %s: compile it again", at,
                 stream_names[stream], kind.name, operand.name, why);
        };
        if (number < 0) {
            if (!operand.optional) wrong("is absent");
            continue;
        }
        const Tensor& tensor = model.tensors[static_cast<size_t>(number)];
        const int64_t offset = model.offset[static_cast<size_t>(number)];
        if (offset < 0) wrong("lies nowhere");
        if (writes(operand.mode) && (number == model.labels || number == model.images)) wrong("is what was given");
        if (tensor.role == Role::constant) {
            if (writes(operand.mode)) wrong("is constant and would be written");
        } else if (!lies_well(model, number, stream)) {
            wrong("lies where something else must stay");
        }
    }
}

void read_instruction(Words& words, Model& model, int stream, size_t at) {
    Instruction& instruction = model.code[stream][at];
    const int64_t op = words.number();
    const OpKind& kind = kind_of(op);
    if (!kind.name)
        fail(TINYTL_BAD_FILE, "is damaged or newer: instruction %zu of '%s' has the unknown op %lld: compile it again", at,
             stream_names[stream], static_cast<long long>(op));
    instruction.op = static_cast<Op>(op);
    words.number("a count of operands", kind.operands, kind.operands);
    instruction.operands.resize(static_cast<size_t>(kind.operands));
    for (int32_t& operand : instruction.operands)
        operand = static_cast<int32_t>(words.number("an operand", -1, static_cast<int64_t>(model.tensors.size()) - 1));
    words.number("a count of attributes", kind.attributes, kind.attributes);
    instruction.attributes.resize(static_cast<size_t>(kind.attributes));
    for (double& attribute : instruction.attributes) attribute = words.real();
    check_operands(model, stream, at);
    verify(model, stream, at);
}

// Of each tile its first instruction and the one behind its last. What has memory for a tile alone is touched in tiles alone.
void read_tiles(Words& words, Model& model) {
    model.tile_images = words.number("the images of a tile", 1, model.micro_batch);
    const int64_t count = static_cast<int64_t>(model.code[stream_micro].size());
    model.tiles.resize(static_cast<size_t>(words.number("the number of tiles", 0, count)));
    int64_t end = 0;
    for (Range& tile : model.tiles) {
        const int64_t begin = words.number("a tile's first instruction", end, count - 1);
        end = words.number("a tile's end", begin + 1, count);
        tile = {static_cast<size_t>(begin), static_cast<size_t>(end)};
    }
    for (int stream = 0; stream < streams; ++stream) {
        auto tile = model.tiles.begin();
        for (size_t at = 0; at < model.code[stream].size(); ++at) {
            while (tile != model.tiles.end() && at >= tile->end) ++tile;
            if (stream == stream_micro && tile != model.tiles.end() && at >= tile->begin) continue;
            for (const int32_t number : model.code[stream][at].operands)
                if (number >= 0 && model.tensors[static_cast<size_t>(number)].scope == Scope::tile)
                    fail(TINYTL_BAD_FILE, "is damaged: instruction %zu of '%s' is in no tile, and tensor %d is of one: "
                         "compile it again", at, stream_names[stream], number);
        }
    }
}

void check_slot(const Model& model, int64_t number, const char* name, Dtype dtype, Scope scope, int64_t elements) {
    const Tensor& tensor = model.tensors[static_cast<size_t>(number)];
    if (tensor.dtype != dtype || tensor.scope != scope || tensor.elements != elements || tensor.role == Role::constant ||
        model.offset[static_cast<size_t>(number)] < 0)
        fail(TINYTL_BAD_FILE, "is damaged: its tensor for %s (%lld) is not of the right kind: compile it again", name,
             static_cast<long long>(number));
}

}  // namespace

Model read_code(Section code, int64_t data_bytes) {
    if (code.bytes % 8) fail(TINYTL_BAD_FILE, "is damaged: CODE is not a row of 64-bit words: compile it again");
    Words words(code);
    const int64_t found = words.number();
    if (found != code_version)
        fail(TINYTL_BAD_FILE, "has CODE of version %lld, this tinytl reads %lld: %s", static_cast<long long>(found),
             static_cast<long long>(code_version),
             found > code_version ? "upgrade tinytl (pip install --upgrade tinytl)" : "compile it again");
    Model model = {};
    constexpr int64_t images = 1 << 20;
    model.batch = words.number("the batch", 1, images);
    model.micro_batch = words.number("the micro-batch", 1, model.batch);
    model.evaluate_images = words.number("the images of an evaluation", 1, images);
    model.threads = words.number("the number of threads", 1, 1024);
    model.height = words.number("the images' height", 1, images);
    model.width = words.number("the images' width", 1, images);
    model.classes = words.number("the number of classes", 1, images);
    model.arena_bytes = words.number("the arena's size", 0, most);
    model.state_bytes = words.number("the state's size", 0, model.arena_bytes);
    model.scratch_offset = words.number("the scratch memory's offset", 0, model.arena_bytes);
    if (model.scratch_offset % align || model.threads * scratch_bytes > model.arena_bytes - model.scratch_offset)
        fail(TINYTL_BAD_FILE, "is damaged: its arena has no room for the scratch memory of %lld threads: compile it again",
             static_cast<long long>(model.threads));
    int64_t* const slots[] = {&model.images, &model.labels, &model.logits, &model.metrics, &model.step_count};
    for (int64_t* slot : slots) *slot = words.number("a tensor's number", 0, most);
    const int64_t count = words.number("the number of tensors", 0, words.left() / 12);
    for (int64_t* slot : slots)
        if (*slot >= count) fail(TINYTL_BAD_FILE, "is damaged: it names tensor %lld of %lld: compile it again",
                                 static_cast<long long>(*slot), static_cast<long long>(count));
    model.tensors.resize(static_cast<size_t>(count));
    model.offset.resize(static_cast<size_t>(count));
    model.initial.resize(static_cast<size_t>(count));
    for (int number = 0; number < count; ++number) read_tensor(words, model, number, data_bytes);
    check_slot(model, model.images, "images", Dtype::u8, Scope::batch, model.height * model.width * 3);
    check_slot(model, model.labels, "labels", Dtype::i32, Scope::batch, 1);
    check_slot(model, model.logits, "logits", Dtype::f32, Scope::batch, model.classes);
    check_slot(model, model.metrics, "metrics", Dtype::f64, Scope::fixed, 2);
    check_slot(model, model.step_count, "the count of steps", Dtype::i64, Scope::fixed, 1);
    if (model.tensors[static_cast<size_t>(model.step_count)].role != Role::state)
        fail(TINYTL_BAD_FILE, "is damaged: the count of steps is no part of its state: compile it again");
    for (int stream = 0; stream < streams; ++stream) {
        model.code[stream].resize(static_cast<size_t>(words.number("a number of instructions", 0, words.left())));
        for (size_t at = 0; at < model.code[stream].size(); ++at) read_instruction(words, model, stream, at);
    }
    read_tiles(words, model);
    if (words.left()) fail(TINYTL_BAD_FILE, "is damaged: %lld words behind the end of CODE: compile it again",
                           static_cast<long long>(words.left()));
    return model;
}

}  // namespace tinytl
