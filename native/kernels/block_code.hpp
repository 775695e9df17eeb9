// The dynamic 8-bit code of src/tinytl/engine/block_code.py: 256 values a block, one scale, codes into a table of 256.
//
// The tables are made by the compiler, so that nothing has to run before main(), which on some processors could not.
#pragma once

#include "elementwise.hpp"

namespace tinytl {
namespace TINYTL_ISA {

inline constexpr int64_t code_block = 256;  // values that share a scale

// `values`: ascending. `upper`: the largest number that is rounded to each of them; infinity for the last. `first`: the
// entry for the smallest number whose sign, exponent and 7 bits of the mantissa are given. Among those a number lies
// below at most one bound, so that one comparison tells whether it is the next entry.
struct BlockCode {
    // Exponents from 2^-25 to 2^1: a smaller magnitude has the entry of 2^-25, a larger one that of 2^1.
    static constexpr uint32_t low = 102u << 7, high = 128u << 7;

    float values[256] = {};
    float upper[256] = {};
    uint8_t first[2][high - low + 1] = {};  // positive, negative

    explicit constexpr BlockCode(bool is_signed) {
        constexpr double powers[] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
        double exact[256] = {};
        int at = is_signed ? 128 : 1;  // of the smallest positive value; 0 lies before it
        for (int i = 0; i < 7; ++i) {
            const int parts = 1 << (is_signed ? i : i + 1);
            for (int part = 0; part < parts; ++part)
                exact[at++] = powers[i] * (0.1 + 0.9 * (part + 0.5) / parts);
        }
        exact[255] = 1.0;
        for (int i = 0; is_signed && i < 127; ++i) exact[i] = -exact[254 - i];
        for (int i = 0; i < 256; ++i) {
            values[i] = static_cast<float>(exact[i]);
            upper[i] = i == 255 ? __builtin_inff() : static_cast<float>((exact[i] + exact[i == 255 ? i : i + 1]) / 2);
        }
        if (!is_signed) upper[0] = 0.0f;  // nothing above 0 is rounded to 0
        int entry = 0;
        for (uint32_t key = high + 1; key-- > low;) {  // negative: ascending as the magnitude falls
            const double number = -magnitude(key, 0x7FFFF);
            while (entry < 255 && static_cast<double>(upper[entry]) < number) ++entry;
            first[1][key - low] = static_cast<uint8_t>(entry);
        }
        entry = 0;
        for (uint32_t key = low; key <= high; ++key) {
            const double number = key == low ? 0.0 : magnitude(key, 0);
            while (entry < 255 && static_cast<double>(upper[entry]) < number) ++entry;
            first[0][key - low] = static_cast<uint8_t>(entry);
        }
    }

    // The entry nearest to x, the last one for NaN.
    uint8_t nearest(float x) const {
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        uint32_t key = bits >> 16 & 0x7FFF;
        if (key < low) key = low;
        if (key > high) key = high;
        uint8_t entry = first[bits >> 31][key - low];
        entry = static_cast<uint8_t>(entry + (x > upper[entry]));
        return x == x ? entry : uint8_t{255};
    }

private:
    // The float whose upper bits are `key` and whose lower 16 bits are set, or not.
    static constexpr double magnitude(uint32_t key, uint32_t lower) {
        double power = 1.0;
        for (int e = static_cast<int>(key >> 7); e < 127; ++e) power /= 2;
        for (int e = static_cast<int>(key >> 7); e > 127; --e) power *= 2;
        return power * (1.0 + (static_cast<double>(key & 127) * 65536 + (lower ? 65535 : 0)) / 8388608.0);
    }
};

static constexpr BlockCode signed_code(true), unsigned_code(false);

}  // namespace TINYTL_ISA
}  // namespace tinytl
