// Convolutions of several taps without gathering: the rows of a tile are pixels that have the same taps in the image,
// and are read where they lie. Nothing is copied, and nothing is multiplied by the zeros around the image: of a kernel
// of 5 x 5 on 3 x 3 pixels those are 16 of 25 products, on 7 x 7 pixels 5 of 16.
#pragma once

#include "conv_finish.hpp"
#include "conv_gather.hpp"
#include "last_vector.hpp"

namespace tinytl {
namespace TINYTL_ISA {

// Rows of a tile: each has an address of its own in a register.
inline constexpr int most_runs = 8;
static inline int64_t rows_of_taps(int64_t vectors) { return least(most_runs, rows_of_tile(vectors)); }

// `lines` x `taps` runs of `depth` values of A, and the rows of B that they are multiplied by. (One run of a row that
// lies in one piece: what is left over by the tiles of gemm.hpp, and panels that end with half a vector.)
struct Runs {
    const float* a;                     // of row 0
    const int64_t* rows;                // where each row of the tile begins, from `a` on
    const float* b;                     // of packed panels
    int64_t lines, taps, depth;
    int64_t a_line, a_tap, b_line, b_tap;  // from one to the next
};

// The sums of a tile, left at `to` (MR, NV): what is done with them is compiled apart, once for all numbers of rows.
template <int MR, int NV, class Last>
__attribute__((noinline)) void runs_tile(const Runs& runs, vf* to) {
    typedef typename Last::type last;
    vf acc[MR][NV > 1 ? NV - 1 : 1];
    last end[MR];
    int64_t at[MR];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < NV - 1; ++v) acc[r][v] = vf{};
        end[r] = last{};
        at[r] = runs.rows[r];
    }
    for (int64_t line = 0; line < runs.lines; ++line) {
        for (int64_t tap = 0; tap < runs.taps; ++tap) {
            const float* a = runs.a + line * runs.a_line + tap * runs.a_tap;
            const float* b = runs.b + line * runs.b_line + tap * runs.b_tap;
            const float* const stop = a + runs.depth;
#pragma GCC unroll 2
            for (; a < stop; ++a, b += NV * W) {
                vf row[NV > 1 ? NV - 1 : 1];
#pragma GCC unroll 4
                for (int v = 0; v < NV - 1; ++v) row[v] = load(b + v * W);
                const last row_end = Last::whole(b + (NV - 1) * W);
#pragma GCC unroll 16
                for (int r = 0; r < MR; ++r) {
                    const float value = a[at[r]];
#pragma GCC unroll 4
                    for (int v = 0; v < NV - 1; ++v) acc[r][v] += value * row[v];
                    end[r] += value * row_end;
                }
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < NV - 1; ++v) to[r * NV + v] = acc[r][v];
        to[r * NV + NV - 1] = Last::widen(end[r]);
    }
}

template <int NV, class Last, int MR = tile_rows<NV> < most_runs ? tile_rows<NV> : most_runs>
TINYTL_INLINE void runs_tile_of(int64_t rows, const Runs& runs, vf* to) {
    if constexpr (MR > 1) {
        if (rows < MR) return runs_tile_of<NV, Last, MR - 1>(rows, runs, to);
    }
    runs_tile<MR, NV, Last>(runs, to);
}

template <int NV, class Finish>
__attribute__((noinline)) void runs_tile_and_finish(int64_t rows, const Runs& runs, const Finish& finish,
                                                    const Spot& spot) {
    vf sums[most_runs][NV];
    if (half_is_enough(spot.width)) runs_tile_of<NV, Half>(rows, runs, sums[0]);
    else runs_tile_of<NV, Full>(rows, runs, sums[0]);
    finish.template operator()<most_runs, NV, false>(sums, spot, static_cast<int>(rows));
}

template <class Finish>
static inline void any_runs_tile(int64_t vectors, int64_t rows, const Runs& runs, const Finish& finish,
                                 const Spot& spot) {
    if constexpr (max_vectors == 4) {
        if (vectors == 4) return runs_tile_and_finish<4>(rows, runs, finish, spot);
        if (vectors == 3) return runs_tile_and_finish<3>(rows, runs, finish, spot);
    }
    if (vectors == 2) return runs_tile_and_finish<2>(rows, runs, finish, spot);
    runs_tile_and_finish<1>(rows, runs, finish, spot);
}

// Neighbouring points [begin, end) of one axis of the grid that have the same taps [first, last) in the image.
struct SameTaps {
    int64_t begin, end, first, last;

    SameTaps(int64_t from, int64_t points, int64_t step, int64_t offset, int64_t taps, int64_t apart, int64_t size)
        : begin(from), end(from + 1) {
        taps_of_point(from * step + offset, taps, apart, size, first, last);
        for (int64_t f, l; end < points; ++end) {
            taps_of_point(end * step + offset, taps, apart, size, f, l);
            if (f != first || l != last) break;
        }
    }

private:
    static void taps_of_point(int64_t at, int64_t taps, int64_t apart, int64_t size, int64_t& first, int64_t& last) {
        const int64_t d = most(1, apart);  // (of one tap it says nothing)
        first = at < 0 ? least(taps, pieces(-at, d)) : 0;
        last = most(first, at < size ? least(taps, (size - 1 - at) / d + 1) : 0);
    }
};

// Call body(first row in the block, behind the last, down, right) for tiles [begin, end), counted over all blocks of
// points with the same taps, of `at_once` rows at most.
template <class Body>
TINYTL_INLINE void for_tiles(const Gather& g, int64_t at_once, int64_t begin, int64_t end, Body&& body) {
    int64_t number = 0;  // of the block's first tile
    for (int64_t i = 0; i < g.gh && number < end;) {
        const SameTaps down(i, g.gh, g.si, g.oh, g.na, g.da, g.sh);
        for (int64_t j = 0; j < g.gw && number < end;) {
            const SameTaps right(j, g.gw, g.sj, g.ow, g.nb, g.db, g.sw);
            const int64_t points = g.images * (down.end - down.begin) * (right.end - right.begin);
            const int64_t tiles = pieces(points, at_once);
            for (int64_t t = most(0, begin - number); t < least(tiles, end - number); ++t)
                body(points * t / tiles, points * (t + 1) / tiles, down, right);
            number += tiles;
            j = right.end;
        }
        i = down.end;
    }
}
static inline int64_t count_tiles(const Gather& g, int64_t at_once) {
    int64_t count = 0;
    for (int64_t i = 0; i < g.gh;) {
        const SameTaps down(i, g.gh, g.si, g.oh, g.na, g.da, g.sh);
        for (int64_t j = 0; j < g.gw;) {
            const SameTaps right(j, g.gw, g.sj, g.ow, g.nb, g.db, g.sw);
            count += pieces(g.images * (down.end - down.begin) * (right.end - right.begin), at_once);
            j = right.end;
        }
        i = down.end;
    }
    return count;
}

// Where the rows [begin, end) of a block lie in the source, for tap (0, 0) and the first group, and in the result.
static inline void place_rows(const Gather& g, const SameTaps& down, const SameTaps& right, int64_t begin, int64_t end,
                              int64_t* source, int64_t* target) {
    const int64_t wide = right.end - right.begin, high = down.end - down.begin;
    int64_t j = right.begin + begin % wide, i = down.begin + begin / wide % high, image = begin / (wide * high);
    for (; begin < end; ++begin) {
        *source++ = ((image * g.sh + i * g.si + g.oh) * g.sw + j * g.sj + g.ow) * g.channels;
        *target++ = (image * g.th + i * g.ti + g.uh) * g.tw + j * g.tj + g.uw;
        if (++j < right.end) continue;
        j = right.begin;
        if (++i == down.end) i = down.begin, ++image;
    }
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
