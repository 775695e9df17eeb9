// The register tile that all matrix products come down to, and how columns are divided into panels.
//
// A panel is a block of B, depth x (NV W), packed so that the NV vectors of one k lie side by side. A tile multiplies
// MR rows of A with it, held in MR NV registers from the first k to the last; each element of A is broadcast from where
// it lies, so that A needs no packing. Each element of the result is one chain of multiply-adds over k, in the order of
// k, whatever the tile: neither the division into tiles nor that among threads changes a bit.
#pragma once

#include "simd.hpp"

namespace tinytl {
namespace TINYTL_ISA {

#define TINYTL_INLINE static inline __attribute__((always_inline))

// As wide as a panel gets, and the rows that go with each width: the sums, one row of B and one value of A fill the
// processor's vector registers.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int max_vectors = 4;  // 32 registers
template <int NV>
inline constexpr int tile_rows = NV == 4 ? 6 : NV == 3 ? 8 : 12;
#else
inline constexpr int max_vectors = 2;  // 16 registers
template <int NV>
inline constexpr int tile_rows = NV == 2 ? 6 : 10;
#endif

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }
static inline int64_t pieces(int64_t total, int64_t size) { return (total + size - 1) / size; }

static inline int64_t rows_of_tile(int64_t vectors) {
#if defined(__AVX512F__) || defined(__aarch64__)
    return vectors == 4 ? tile_rows<4> : vectors == 3 ? tile_rows<3> : vectors == 2 ? tile_rows<2> : tile_rows<1>;
#else
    return vectors == 2 ? tile_rows<2> : tile_rows<1>;
#endif
}

// Columns in panels of nearly equal width. They begin at multiples of 8 columns, where a mask's bytes begin.
struct Panels {
    int64_t columns, count;

    explicit Panels(int64_t columns) : columns(columns), count(pieces(columns, max_vectors * W)) {}
    int64_t begin(int64_t panel) const {  // first column
        constexpr int64_t unit = W < 8 ? 8 : W;
        return least(columns, pieces(columns, unit) * panel / count * unit);
    }
    int64_t width(int64_t panel) const { return begin(panel + 1) - begin(panel); }
    int64_t vectors(int64_t panel) const { return pieces(width(panel), W); }
};

// acc[r][v] += sum over k of A[r][k] B[k][v]. A[r][k] is a[r stride + k], or a[k stride + r] where `along_rows`.
template <int MR, int NV, bool along_rows>
TINYTL_INLINE void multiply(vf (&acc)[MR][NV], const float* a, int64_t stride, const float* b, int64_t depth) {
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k) {
        vf row[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) row[v] = load(b + (k * NV + v) * W);
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) {
            const vf value = set1(along_rows ? a[k * stride + r] : a[r * stride + k]);
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) acc[r][v] += value * row[v];
        }
    }
}

struct Product {
    const float* a;
    int64_t stride;  // of a
    const float* b;  // a packed panel
    int64_t depth;
};

// One tile; `finish(acc, spot)` takes the sums from the registers to where they belong.
template <int MR, int NV, bool along_rows, class Finish, class Spot>
__attribute__((noinline)) void tile(const Product& product, const Finish& finish, const Spot& spot) {
    vf acc[MR][NV];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[r][v] = vf{};
    multiply<MR, NV, along_rows>(acc, product.a, product.stride, product.b, product.depth);
    finish(acc, spot);
}

template <int NV, bool along_rows, class Finish, class Spot, int MR = tile_rows<NV>>
TINYTL_INLINE void tile_of(int64_t rows, const Product& product, const Finish& finish, const Spot& spot) {
    if constexpr (MR > 1) {
        if (rows < MR) return tile_of<NV, along_rows, Finish, Spot, MR - 1>(rows, product, finish, spot);
    }
    tile<MR, NV, along_rows>(product, finish, spot);
}

// A tile of rows <= rows_of_tile(vectors).
template <bool along_rows, class Finish, class Spot>
TINYTL_INLINE void any_tile(int64_t vectors, int64_t rows, const Product& product, const Finish& finish,
                            const Spot& spot) {
    if constexpr (max_vectors == 4) {
        if (vectors == 4) return tile_of<4, along_rows>(rows, product, finish, spot);
        if (vectors == 3) return tile_of<3, along_rows>(rows, product, finish, spot);
    }
    if (vectors == 2) return tile_of<2, along_rows>(rows, product, finish, spot);
    tile_of<1, along_rows>(rows, product, finish, spot);
}

// A tile of rows_of_tile(vectors) rows, whose elements of A lie side by side.
template <class Finish, class Spot>
TINYTL_INLINE void whole_tile(int64_t vectors, const Product& product, const Finish& finish, const Spot& spot) {
    if constexpr (max_vectors == 4) {
        if (vectors == 4) return tile<tile_rows<4>, 4, false>(product, finish, spot);
        if (vectors == 3) return tile<tile_rows<3>, 3, false>(product, finish, spot);
    }
    if (vectors == 2) return tile<tile_rows<2>, 2, false>(product, finish, spot);
    tile<tile_rows<1>, 1, false>(product, finish, spot);
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
