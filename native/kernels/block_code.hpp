// The dynamic 8-bit code of src/tinytl/engine/block_code.py: 256 values a block, one scale, codes into a table of 256.
//
// The tables are made by the compiler, so that nothing has to run before main(), which on some processors could not.
#pragma once

#include "lookup.hpp"

namespace tinytl {
namespace TINYTL_ISA {

inline constexpr int64_t code_block = 256;  // values that share a scale

// The table, and how to find the entry nearest to a number. Entries divide each power of ten in equal parts: a line
// through it gives the entry or the one before, and one comparison with the bound between the two tells which.
//
// The signed table is symmetric around entry `zero`, but for 1.0, which has no opposite; magnitudes are looked for, and
// entries are counted from `zero`.
template <bool Signed>
struct BlockCode {
    static constexpr int zero = Signed ? 127 : 0, half = Signed ? 128 : 256;

    alignas(64) float values[256] = {};  // ascending
    alignas(64) float upper[half] = {};  // the largest number rounded to entry `zero` + i; infinity for the last
    float power[6] = {};                 // below which (or at which) the line of number i holds
    alignas(32) float slope[8] = {}, offset[8] = {};

    constexpr BlockCode() {
        constexpr double powers[] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
        double exact[257 - zero] = {};  // from 0 on
        int at = 1;
        for (int i = 0; i < 7; ++i) {
            const int parts = 1 << (Signed ? i : i + 1);
            // From an entry's lower bound to its upper one the line climbs from 0.75 before to 0.25 behind its number:
            // far enough from both whole numbers for the widest entries, those between two powers, and for rounding.
            slope[i] = static_cast<float>(parts / (0.9 * powers[i]));
            offset[i] = static_cast<float>(at - 0.25 - parts / 9.0);
            if (i < 6) power[i] = static_cast<float>(powers[i]);
            for (int part = 0; part < parts; ++part)
                exact[at++] = powers[i] * (0.1 + 0.9 * (part + 0.5) / parts);
        }
        exact[at] = 1.0;
        for (int i = 0; i <= at; ++i) values[zero + i] = static_cast<float>(exact[i]);
        for (int i = 1; i <= zero; ++i) values[zero - i] = -values[zero + i];
        for (int i = 0; i < half; ++i)
            upper[i] = i == at ? __builtin_inff() : static_cast<float>((exact[i] + exact[i + 1]) / 2);
        if (!Signed) upper[0] = 0.0f;  // nothing above 0 is rounded to 0
    }

    inline __attribute__((always_inline)) vf decode(vi codes) const { return lookup<256>(values, codes); }

    // The entries nearest to x; of two as near the lower one. NaN has the last.
    inline __attribute__((always_inline)) vi nearest(vf x) const {
        const vf size = min(Signed ? (x < 0.0f ? -x : x) : max(x, vf{}), set1(1.0f));
        vi line = {};
        for (int i = 0; i < 6; ++i) line -= size > power[i];  // a comparison is 0 or -1
        const vf height = size * lookup<8>(slope, line) + lookup<8>(offset, line);
        vi entry = __builtin_convertvector(height, vi);
        const vf bound = lookup<half>(upper, entry);
        if (!Signed) {
            entry -= size > bound;
        } else {
            const vi negative = x < 0.0f;
            entry -= (size > bound) | (negative & (size == bound));
            const vi below = zero - entry;
            entry = negative ? (below < 0 ? vi{} : below) : zero + entry;
        }
        return x == x ? entry : vi{} + 255;
    }
};

static constexpr BlockCode<true> signed_code;
static constexpr BlockCode<false> unsigned_code;

}  // namespace TINYTL_ISA
}  // namespace tinytl
