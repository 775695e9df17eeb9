// What happens to a tile's sums while they are in registers: bias, residual, activation, mask, sums over rows.
#pragma once

#include "gemm.hpp"

namespace tinytl {
namespace TINYTL_ISA {

// Where a tile lies in the result.
struct Spot {
    const int64_t* pixels;  // of its rows; nullptr: they are `pixel` and those behind it
    int64_t pixel;
    int64_t channel, width;  // first channel and how many, of all channels
    bool first, last;        // the first and the last piece of k; the sums between them wait in the result
    float* sums;             // of the tile's channels, where sums over rows are wanted
};

// One bit a lane: neither z <= low nor z >= high.
TINYTL_INLINE uint32_t inside_of(vf z, vf low, vf high) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    const __m512 x = reinterpret_cast<__m512>(z);
    const __mmask16 above = _mm512_cmp_ps_mask(x, reinterpret_cast<__m512>(low), _CMP_NLE_UQ);
    return _mm512_mask_cmp_ps_mask(above, x, reinterpret_cast<__m512>(high), _CMP_NGE_UQ);
#else
    return bits_of(~((z <= low) | (z >= high)));
#endif
}

// write_bits where the bits are not whole bytes, or begin within one.
__attribute__((noinline)) static void write_odd_bits(uint8_t* to, int shift, uint64_t bits, int64_t count) {
    if (count < 64) bits &= (uint64_t{1} << count) - 1;
    if (shift) {
        *to = static_cast<uint8_t>((*to & ((1u << shift) - 1)) | (bits << shift & 0xffu));
        count -= 8 - shift;
        bits >>= 8 - shift;
        ++to;
    }
    for (; count > 0; count -= 8, bits >>= 8) *to++ = static_cast<uint8_t>(bits);
}

// `count` <= 64 bits to the mask's row of a pixel, from channel `c` on; zeros behind the last up to a whole byte. Where
// c is not a multiple of 8, the channels before it have been written already.
TINYTL_INLINE void write_bits(uint8_t* row, int64_t c, uint64_t bits, int64_t count) {
    uint8_t* to = row + (c >> 3);
    if (c & 7 || count & 15) {
        write_odd_bits(to, static_cast<int>(c & 7), bits, count);
    } else if (count == 64) {
        std::memcpy(to, &bits, 8);
    } else {
        if (count & 32) std::memcpy(to, &bits, 4), bits >>= 32, to += 4;
        if (count & 16) std::memcpy(to, &bits, 2);
    }
}

// The bits of W channels from `c` on, of which `n` exist.
TINYTL_INLINE uint32_t read_bits(const uint8_t* row, int64_t c, int64_t n) {
    const uint8_t* from = row + (c >> 3);
    if (W == 16 && n == W && !(c & 7)) {
        uint16_t bits;
        std::memcpy(&bits, from, 2);
        return bits;
    }
    const int shift = static_cast<int>(c & 7);
    uint32_t bits = 0;
    for (int64_t at = 0; at < shift + n; at += 8) bits |= static_cast<uint32_t>(from[at >> 3]) << at;
    return bits >> shift;
}

// Call body(r) for the rows of a tile. Those in registers are all of MR, and are known by number when this is compiled.
template <int MR, bool in_registers, class Body>
TINYTL_INLINE void for_rows(int rows, const Body& body) {
    if constexpr (in_registers) {
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) body(r);
    } else {
#pragma GCC unroll 1
        for (int r = 0; r < rows; ++r) body(r);
    }
}

// A row of a tile to where it belongs; its last vector has `tail` channels. Of whole tiles the row that lies `ahead`,
// one of the next tile, is fetched.
template <bool whole, int NV>
TINYTL_INLINE void store_row(float* to, const vf (&z)[NV], int64_t tail, int64_t ahead) {
#pragma GCC unroll 4
    for (int v = 0; v < NV - 1; ++v) store(to + v * W, z[v]);
    if (tail == W) store(to + (NV - 1) * W, z[NV - 1]);
    else store_part(to + (NV - 1) * W, z[NV - 1], tail);
    if constexpr (whole) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) fetch_to_write(to + ahead + v * W);
    }
}

// y = act(sums + bias + residual), and one bit an element.
struct Forward {
    float* y;
    const float* bias;
    const float* residual;
    uint8_t* mask;
    int64_t channels, mask_bytes;  // of a pixel
    float lo, hi, slope;
    bool bounded;  // whether there is an activation

    static constexpr bool sums = false;

    template <int MR, int NV, bool in_registers = true>
    inline __attribute__((always_inline)) void operator()(vf (&acc)[MR][NV], const Spot& spot, int rows = MR) const {
        // Copies: what is stored could change the fields themselves, for all the compiler knows.
        const int64_t tail = spot.width - (NV - 1) * W, step = channels, first = spot.channel, width = spot.width;
        const int64_t* const pixels = spot.pixels;
        const int64_t pixel0 = spot.pixel, bytes = mask_bytes;
        const vf low = set1(lo), high = set1(hi), leak = set1(slope);
        const bool act = spot.last && bounded, leaky = slope != 0.0f;
        float* const out = y;
        const float* const more = spot.first ? residual : y;
        uint8_t* const bits = spot.last ? mask : nullptr;
        vf add[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            const float* from = bias + first + v * W;
            add[v] = !bias || !spot.first ? vf{} : v == NV - 1 ? load_part(from, tail) : load(from);
        }
        const auto row_of_tile = [&](int r) __attribute__((always_inline)) {
            const int64_t pixel = pixels ? pixels[r] : pixel0 + r;
            float* const to = out + pixel * step + first;
            vf z[NV];
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) z[v] = acc[r][v] + add[v];
            if (more) {
                const float* from = more + pixel * step + first;
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) z[v] += v == NV - 1 ? load_part(from + v * W, tail) : load(from + v * W);
            }
            if (act) {
                uint64_t all = 0;
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) {
                    all |= static_cast<uint64_t>(inside_of(z[v], low, high)) << (v * W);
                    // 0 times infinity is a NaN: without a slope there is no product.
                    const vf under = leaky ? low + leak * (z[v] - low) : low;
                    z[v] = z[v] <= low ? under : z[v];
                    z[v] = z[v] >= high ? high : z[v];
                }
                if (bits) write_bits(bits + pixel * bytes, first, all, width);
            }
            store_row<in_registers>(to, z, tail, MR * step);
        };
        for_rows<MR, in_registers>(rows, row_of_tile);
    }
};

// y = (sums + other), where the mask has a zero slope times that; and the sums of y over rows.
struct Backward {
    float* y;
    const float* other;
    const uint8_t* mask;
    int64_t channels, mask_bytes;
    float slope;

    static constexpr bool sums = true;

    template <int MR, int NV, bool in_registers = true>
    inline __attribute__((always_inline)) void operator()(vf (&acc)[MR][NV], const Spot& spot, int rows = MR) const {
        const int64_t tail = spot.width - (NV - 1) * W, step = channels, first = spot.channel;
        const int64_t* const pixels = spot.pixels;
        const int64_t pixel0 = spot.pixel, bytes = mask_bytes;
        const vf leak = set1(slope);
        const bool leaky = slope != 0.0f;  // else 0, whatever the gradient is: 0 times infinity is none
        float* const out = y;
        const float* const more = spot.first ? other : y;
        const uint8_t* const bits = spot.last ? mask : nullptr;
        vf total[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) total[v] = vf{};
        const auto row_of_tile = [&](int r) __attribute__((always_inline)) {
            const int64_t pixel = pixels ? pixels[r] : pixel0 + r;
            float* const to = out + pixel * step + first;
            vf z[NV];
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) z[v] = acc[r][v];
            if (more) {
                const float* from = more + pixel * step + first;
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) z[v] += v == NV - 1 ? load_part(from + v * W, tail) : load(from + v * W);
            }
            if (bits) {
                const uint8_t* row = bits + pixel * bytes;
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) {
                    const uint32_t b = read_bits(row, first + v * W, v == NV - 1 ? tail : W);
                    z[v] = lanes_of(b) ? z[v] : leaky ? leak * z[v] : vf{};
                }
            }
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) total[v] += z[v];
            store_row<in_registers>(to, z, tail, MR * step);
        };
        for_rows<MR, in_registers>(rows, row_of_tile);
        if (!spot.sums || !spot.last) return;
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            float* sum = spot.sums + v * W;
            if (v == NV - 1 && tail < W) store_part(sum, load_part(sum, tail) + total[v], tail);
            else store(sum, load(sum) + total[v]);
        }
    }
};

}  // namespace TINYTL_ISA
}  // namespace tinytl
