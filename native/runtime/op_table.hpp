// What each op takes: the executor's copy of src/tinytl/compiler/op_table.py, with which a file is checked.
#pragma once

#include "program.hpp"

namespace tinytl {

enum class Mode : uint8_t { in, out, add, inout };

struct OperandKind {
    char name[20];
    Mode mode;
    bool optional;
};

struct OpKind {
    const char* name;  // nullptr: no such op
    int operands;
    int attributes;
    OperandKind operand[10];
};

// Its row; one without a name where there is no such op.
const OpKind& kind_of(int64_t op);

inline bool writes(Mode mode) { return mode != Mode::in; }

}  // namespace tinytl
