// How opening a program fails: a status of tinytl.h and one line.
#pragma once

#include <cstdarg>
#include <cstdio>

#include "../tinytl.h"

namespace tinytl {

struct Failure {
    tinytl_status status;
    char text[400];
};

[[noreturn]] __attribute__((format(printf, 2, 3))) inline void fail(tinytl_status status, const char* format, ...) {
    Failure failure;
    failure.status = status;
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(failure.text, sizeof failure.text, format, arguments);
    va_end(arguments);
    throw failure;
}

}  // namespace tinytl
