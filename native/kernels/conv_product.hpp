// The product behind a convolution, forward and by input: blocks that fit the threads' scratch memory, and who does
// what.
//
// For each group of channels, each run of panels and each piece of k: the panels are packed once, then all rows go past
// them. Threads share the rows where there are many of them, and the panels where packing is what costs. Rows are cut
// into parts that do not depend on the number of threads; sums over rows are taken part by part.
#pragma once

#include "../runtime/call.hpp"
#include "conv_finish.hpp"
#include "conv_gather.hpp"
#include "conv_taps.hpp"

namespace tinytl {
namespace TINYTL_ISA {

// Floats of a thread's scratch memory.
inline constexpr int64_t scratch_floats = scratch_per_thread / 4;
inline constexpr int64_t sum_floats = 8192;       // sums over rows: parts x channels
inline constexpr int64_t block_rows = 512;        // rows gathered at a time, at most
inline constexpr int64_t gathered_floats = 18432; // of A, where it has to be gathered
inline constexpr int64_t most_parts = 16, part_rows = 24;
inline constexpr int64_t least_k_of_half = 48;  // below, what follows the product takes longer
inline constexpr int64_t k_piece = 512;  // k at a time: the sums are kept in registers that long

static inline int64_t parts_of(int64_t rows, int64_t channels) {
    return most(1, even_parts(least(least(rows / part_rows, most_parts), sum_floats / channels)));
}

// Whether threads share rows, or panels. In multiply-adds of one vector for each k: packing a vector costs about 8.
// Where panels are shared, each thread reads rows that another wrote, and leaves results that another will read; a line
// of another core's cache costs as much as some 40 multiply-adds of a vector.
static inline bool rows_are_shared(int64_t rows, int64_t k, int64_t parts, int64_t units, int64_t vectors,
                                   int64_t threads, int64_t gathering) {
    const int64_t by_rows = vectors * (pieces(parts, threads) * rows / parts + 8) + gathering / threads;
    const int64_t moved = threads > 1 ? 2 * rows + 40 * rows * vectors / most(k, 1) : 0;
    const int64_t by_panels = pieces(units, threads) * pieces(vectors, units) * (rows + 8) + gathering + moved;
    return by_rows <= by_panels;
}

// Writes the panel of `width` columns from `first` on, of k0 to k1, to `to`. A pointer, so that the product is compiled
// once for all types of weights.
struct Pack {
    void (*write)(const void* data, float* to, int64_t group, int64_t first, int64_t width, int64_t k0, int64_t k1);
    const void* data;

    template <class Body>
    explicit Pack(const Body& body)
        : write([](const void* data, float* to, int64_t group, int64_t first, int64_t width, int64_t k0, int64_t k1) {
              (*static_cast<const Body*>(data))(to, group, first, width, k0, k1);
          }),
          data(&body) {}
};

// Whether the taps' values are read where they lie: where enough of them lie side by side, and a line of taps of a
// panel fits the scratch memory.
static inline bool reads_in_place(const Gather& g) {
    return !g.direct() && g.na > 0 && g.nb > 0 && g.depth >= 8 &&
           g.nb * g.depth * max_vectors * W <= scratch_floats - sum_floats;
}

// As `multiply_rows`, by conv_taps.hpp.
template <class Finish>
void multiply_taps(const Call& call, const Gather& g, int64_t groups, int64_t columns, bool aligned, const Pack& pack,
                   const Finish& finish, bool sums) {
    const Panels panels(columns);
    const int64_t rows = g.rows(), channels = groups * columns;
    const int64_t parts = parts_of(rows, channels), units = groups * panels.count, threads = call.threads.count();
    const int64_t at_most = rows_of_taps(pieces(pieces(columns, W), panels.count)), tiles = count_tiles(g, at_most);

    // Some lines of taps at a time.
    const int64_t line = g.nb * g.depth;
    const int64_t line_pieces = pieces(g.na, most(1, k_piece / line)), lines_at_once = pieces(g.na, line_pieces);
    const int64_t at_once = (scratch_floats - sum_floats) / (lines_at_once * line * W);  // vectors of columns that fit
    const bool together = g.depth == g.channels && g.db == 1;  // a line's taps are one run

    const int64_t vectors = groups * pieces(columns, W);
    const bool share_rows = !aligned || rows_are_shared(rows, g.k(), parts, units, vectors, threads, 0);

    call.threads.run([&](int thread) {
        const int64_t unit_begin = share_rows ? 0 : units * thread / threads;
        const int64_t unit_end = share_rows ? units : units * (thread + 1) / threads;
        const int64_t part_begin = share_rows ? parts * thread / threads : 0;
        const int64_t part_end = share_rows ? parts * (thread + 1) / threads : parts;
        float* own_sums = reinterpret_cast<float*>(call.scratch_of(thread));
        float* packed = own_sums + sum_floats;
        if (sums) clear_floats(own_sums, parts * channels);
        if (part_begin == part_end) return;

        for (int64_t unit = unit_begin; unit < unit_end;) {
            const int64_t group = unit / panels.count, p0 = unit % panels.count;
            int64_t p1 = p0, wide = 0;
            while (p1 < panels.count && unit + p1 - p0 < unit_end && (p1 == p0 || wide + panels.vectors(p1) <= at_once))
                wide += panels.vectors(p1++);
            unit += p1 - p0;
            for (int64_t piece = 0; piece < line_pieces; ++piece) {
                const int64_t a0 = g.na * piece / line_pieces, a1 = g.na * (piece + 1) / line_pieces;
                int64_t at = 0;
                for (int64_t p = p0; p < p1; ++p) {
                    pack.write(pack.data, packed + at, group, panels.begin(p), panels.width(p), a0 * line, a1 * line);
                    at += (a1 - a0) * line * panels.vectors(p) * W;
                }
                for (int64_t part = part_begin; part < part_end; ++part) {
                    const auto tile = [&](int64_t begin, int64_t end, const SameTaps& down, const SameTaps& right) {
                        int64_t source[most_runs], target[most_runs];
                        place_rows(g, down, right, begin, end, source, target);
                        const int64_t first = most(a0, down.first), last = least(a1, down.last);
                        const int64_t taps = right.last - right.first;
                        Runs runs;
                        runs.rows = source;
                        runs.lines = most(0, last - first);
                        runs.taps = together ? 1 : taps;
                        runs.depth = together ? taps * g.depth : g.depth;
                        runs.a = g.source + (first * g.da * g.sw + right.first * g.db) * g.channels + group * g.depth;
                        runs.a_line = g.da * g.sw * g.channels;
                        runs.a_tap = g.db * g.channels;
                        const float* b = packed;
                        for (int64_t p = p0; p < p1; ++p) {
                            const int64_t nv = panels.vectors(p), channel = group * columns + panels.begin(p);
                            const int64_t width = panels.width(p);
                            runs.b = b + ((first - a0) * line + right.first * g.depth) * nv * W;
                            runs.b_line = line * nv * W;
                            runs.b_tap = g.depth * nv * W;
                            const Spot spot{target,     0, channel, width, piece == 0, piece == line_pieces - 1,
                                            sums ? own_sums + part * channels + channel : nullptr};
                            any_runs_tile(nv, end - begin, runs, finish, spot);
                            b += (a1 - a0) * line * nv * W;
                        }
                    };
                    for_tiles(g, at_most, tiles * part / parts, tiles * (part + 1) / parts, tile);
                }
            }
        }
    });
}

// Multiply the rows of A by the columns of each group, and hand each tile to `finish`. `aligned`: whether each panel's
// bits of the mask are whole bytes. `sums`: whether sums over rows are wanted; they are left at the beginning of each
// thread's scratch memory, (parts, channels), see `add_sums` in conv_dx.cpp.
template <class Finish>
void multiply_rows(const Call& call, const Gather& g, int64_t groups, int64_t columns, bool aligned, const Pack& pack,
                   const Finish& finish, bool sums) {
    const Panels panels(columns);
    const int64_t rows = g.rows(), k = g.k(), channels = groups * columns;
    if (rows == 0) return;
    if (reads_in_place(g)) return multiply_taps(call, g, groups, columns, aligned, pack, finish, sums);
    const int64_t parts = parts_of(rows, channels), units = groups * panels.count, threads = call.threads.count();
    const bool direct = g.direct(), in_order = g.in_order();

    const int64_t k_pieces = most(1, pieces(k, k_piece)), k_size = most(1, pieces(k, k_pieces));
    const int64_t panel_floats =
        scratch_floats - sum_floats - 2 * block_rows - (direct ? 0 : gathered_floats);
    const int64_t at_once = panel_floats / (k_size * W);  // vectors of columns whose panels fit
    const int64_t block =
        direct ? most(48, least(block_rows, 16384 / k_size)) : least(block_rows, gathered_floats / k_size);

    const int64_t vectors = groups * pieces(columns, W), gathering = direct ? 0 : 3 * rows;  // a row: about 3
    const bool share_rows = !aligned || rows_are_shared(rows, k, parts, units, vectors, threads, gathering);

    call.threads.run([&](int thread) {
        const int64_t unit_begin = share_rows ? 0 : units * thread / threads;
        const int64_t unit_end = share_rows ? units : units * (thread + 1) / threads;
        const int64_t part_begin = share_rows ? parts * thread / threads : 0;
        const int64_t part_end = share_rows ? parts * (thread + 1) / threads : parts;
        float* own_sums = reinterpret_cast<float*>(call.scratch_of(thread));
        int64_t* pixels = reinterpret_cast<int64_t*>(own_sums + sum_floats);
        float* packed = reinterpret_cast<float*>(pixels + block_rows);
        float* gathered = packed + panel_floats;
        if (sums) clear_floats(own_sums, parts * channels);
        if (part_begin == part_end) return;

        for (int64_t unit = unit_begin; unit < unit_end;) {
            const int64_t group = unit / panels.count, p0 = unit % panels.count;
            int64_t p1 = p0, wide = 0;
            while (p1 < panels.count && unit + p1 - p0 < unit_end && (p1 == p0 || wide + panels.vectors(p1) <= at_once))
                wide += panels.vectors(p1++);
            unit += p1 - p0;
            for (int64_t piece = 0; piece < k_pieces; ++piece) {
                const int64_t k0 = piece * k_size, k1 = least(k, k0 + k_size);
                int64_t at = 0;
                for (int64_t p = p0; p < p1; ++p) {
                    pack.write(pack.data, packed + at, group, panels.begin(p), panels.width(p), k0, k1);
                    at += (k1 - k0) * panels.vectors(p) * W;
                }
                for (int64_t part = part_begin; part < part_end; ++part) {
                    const int64_t row_end = rows * (part + 1) / parts;
                    for (int64_t row = rows * part / parts, n; row < row_end; row += n) {
                        n = pieces(row_end - row, pieces(row_end - row, block));
                        const float* a = gathered;
                        int64_t stride = k1 - k0;
                        if (direct) {
                            a = g.source + row * g.channels + group * g.depth + k0;
                            stride = g.channels;
                        } else if (k1 > k0) {
                            gather_rows(g, group * g.depth, row, n, k0, k1, gathered, stride);
                        }
                        if (!in_order) target_pixels(g, row, n, pixels);
                        int64_t offsets[most_runs];
                        for (int r = 0; r < most_runs; ++r) offsets[r] = r * stride;
                        const float* b = packed;
                        for (int64_t p = p0; p < p1; ++p) {
                            const int64_t nv = panels.vectors(p), channel = group * columns + panels.begin(p);
                            const int64_t width = panels.width(p), whole = rows_of_tile(nv), few = rows_of_taps(nv);
                            const bool half = half_is_enough(width) && k1 - k0 >= least_k_of_half;
                            for (int64_t r0 = 0, r1; r0 < n; r0 = r1) {
                                const bool as_whole = !half && n - r0 >= whole;
                                r1 = as_whole ? r0 + whole : least(n, r0 + few);
                                const Spot spot{in_order ? nullptr : pixels + r0,
                                                row + r0,
                                                channel,
                                                width,
                                                piece == 0,
                                                piece == k_pieces - 1,
                                                sums ? own_sums + part * channels + channel : nullptr};
                                if (as_whole) {
                                    whole_tile(nv, {a + r0 * stride, stride, b, k1 - k0}, finish, spot);
                                    continue;
                                }
                                const Runs runs{a + r0 * stride, offsets, b, 1, 1, k1 - k0, 0, 0, 0, 0};
                                any_runs_tile(nv, r1 - r0, runs, finish, spot);
                            }
                            b += (k1 - k0) * nv * W;
                        }
                    }
                }
            }
        }
    });
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
