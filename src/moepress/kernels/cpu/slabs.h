// Products with trellis codes, written once over `Lanes` (docs/format.md, "Slabs").
//
// With sums of bytes t, their center z, a row's scale s, and activations x = a q, q 15-bit integers:
//
//     y = s sum over groups of  a (sum(t q) - z sum(q))
//
// The inner difference is an integer, exact: at most 751 * 16256 * 128 < 2^31 before z is taken off.
//
// A register of words has two neighbouring columns of 16 rows. Of 16 steps, each gives the states of
// four such pairs of columns and of four runs of 16 rows: shifts of the words in hand, and of the
// last word of the tile above, which was read for the slab before and is still in the cache. Then a
// product, the sums of its bytes and a dot product of pairs with the activations of the two columns:
// at 2 bits 7 instructions for a register of 32 weights, of 512 bits; two of 256 bits each take as
// many. docs/log.md has the speed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "isa.h"

// Steps are unrolled by templates: sanitizers need a minute for each of them inside all others.
#if defined(__SANITIZE_ADDRESS__)
#define MOEPRESS_INLINE inline
#else
#define MOEPRESS_INLINE [[gnu::always_inline]] inline
#endif

namespace {

using moepress::kSlabRows;
using moepress::kSteps;
using moepress::kTileColumns;
using moepress::Rounded;

// Words of one tile of a path, and before them the last one of the tile above.
template <int bits>
struct Tile {
    Lanes::Words word[bits + 1];
};

template <int bits>
MOEPRESS_INLINE Tile<bits> load_tile(const uint8_t* above, const uint8_t* tile) {
    Tile<bits> out;
    out.word[0] = Lanes::words(above + 64 * (bits - 1));
#pragma GCC unroll 4
    for (int j = 0; j < bits; ++j) out.word[j + 1] = Lanes::words(tile + 64 * j);
    return out;
}

// The 16 bits of 32 paths that end with bit `end` of word j, 1 to 16.
template <int j, int end, int bits>
MOEPRESS_INLINE Lanes::Words window(const Tile<bits>& tile) {
    if constexpr (end == 16) return tile.word[j + 1];
    return Lanes::either(Lanes::template shift_right<16 - end>(tile.word[j + 1]),
                         Lanes::template shift_left<end>(tile.word[j]));
}

// The sums of bytes at step i of 32 paths. A window of 16 bits holds the 12 of a state wherever they
// end in its last 4: four windows of a word, which the compiler makes once, serve all steps.
template <int bits, int i>
MOEPRESS_INLINE Lanes::Words sums_at(const Tile<bits>& tile) {
    constexpr int end = bits * (i + 1);            // of the newest bits, in the tile
    constexpr int j = (end - 1) / 16;              // the word they are in
    constexpr int taken = end - 16 * j;            // bits of it, 1 to 16
    constexpr int last = taken > 11 ? 16 : taken > 6 ? 11 : taken > 1 ? 6 : 1;  // of its window
    static_assert(16 - moepress::kStateBits >= 4);
    Lanes::Words state = window<j, last, bits>(tile);
    if constexpr (last > taken) state = Lanes::template shift_right<last - taken>(state);
    state = Lanes::masked(state, moepress::kStates - 1);
    return Lanes::template byte_sums<(bits > 2)>(state, moepress::kMultiplier[bits]);
}

// One token: steps i .. 15 of a tile into the sums of its four runs of rows.
template <int bits, int i = 0>
MOEPRESS_INLINE void add_steps(const Tile<bits>& tile, const int16_t* x,
                                             Lanes::Pairs* sum) {
    int32_t pair;
    std::memcpy(&pair, x + 2 * (i % 4), 4);
    sum[i / 4].add(sums_at<bits, i>(tile), pair);
    if constexpr (i + 1 < kSteps) add_steps<bits, i + 1>(tile, x, sum);
}

template <int bits, int i = 0>
MOEPRESS_INLINE void store_steps(const Tile<bits>& tile, Lanes::Words* out) {
    out[i] = sums_at<bits, i>(tile);
    if constexpr (i + 1 < kSteps) store_steps<bits, i + 1>(tile, out);
}

// out[r] += a (sum - z sum(q)) for the 64 rows of a slab
MOEPRESS_INLINE void finish_group(const Lanes::Pairs* sum, float a, int32_t correction,
                                                float* out) {
    for (int run = 0; run < 4; ++run)
        Lanes::store(out + 16 * run,
                     Lanes::mul_add(Lanes::splat(a), sum[run].value(correction),
                                    Lanes::load_floats(out + 16 * run)));
}

template <int bits>
void slab_dot(const uint8_t* above, const uint8_t* slab, int64_t cols, int group, const Rounded& x,
              int64_t first, int64_t tokens, const uint8_t* scales, float* out) {
    constexpr int tile_bytes = 64 * bits;
    constexpr int center = moepress::kCenter[bits];
    const int tiles = group / kTileColumns;
    const int64_t groups = cols / group;
    for (int64_t i = 0; i < tokens * kSlabRows; ++i) out[i] = 0;
    Lanes::Words decoded[moepress::kMaxGroup / kTileColumns * kSteps];
    for (int64_t g = 0; g < groups; ++g) {
        const uint8_t* from = slab + g * tiles * tile_bytes;
        const uint8_t* over = above + g * tiles * tile_bytes;
        if (tokens == 1) {
            const int16_t* codes = x.codes + first * cols + g * group;
            Lanes::Pairs sum[4];
            for (int t = 0; t < tiles; ++t) {
#pragma GCC unroll 4
                for (int j = 0; j < bits; ++j) Lanes::prefetch(from + t * tile_bytes + 64 * j + kAhead);
                add_steps<bits>(load_tile<bits>(over + t * tile_bytes, from + t * tile_bytes),
                                codes + t * kTileColumns, sum);
            }
            const int64_t at = first * groups + g;
            finish_group(sum, x.scale[at], center * x.sum[at], out);
            continue;
        }
        for (int t = 0; t < tiles; ++t)
            store_steps<bits>(load_tile<bits>(over + t * tile_bytes, from + t * tile_bytes),
                              decoded + t * kSteps);
        for (int64_t p = 0; p < tokens; ++p) {
            const int16_t* codes = x.codes + (first + p) * cols + g * group;
            Lanes::Pairs sum[4];
            for (int t = 0; t < tiles; ++t)
#pragma GCC unroll 4
                for (int c = 0; c < 4; ++c) {
                    int32_t pair;
                    std::memcpy(&pair, codes + t * kTileColumns + 2 * c, 4);
#pragma GCC unroll 4
                    for (int run = 0; run < 4; ++run)
                        sum[run].add(decoded[t * kSteps + 4 * run + c], pair);
                }
            const int64_t at = (first + p) * groups + g;
            finish_group(sum, x.scale[at], center * x.sum[at], out + p * kSlabRows);
        }
    }
    for (int run = 0; run < 4; ++run) {
        const Lanes::Float s = Lanes::bfloat16(scales + 32 * run);
        for (int64_t p = 0; p < tokens; ++p) {
            float* at = out + p * kSlabRows + 16 * run;
            Lanes::store(at, Lanes::mul(s, Lanes::load_floats(at)));
        }
    }
}

// x <- H D x, in place (kernels/trellis.py, rotate; the same operations in the same order)
void rotate(float* x, int64_t cols) {
    for (int64_t c = 0; c < cols; ++c) {
        uint32_t h = uint32_t(c);
        h = (h ^ h >> 16) * 0x85EBCA6Bu;
        h = (h ^ h >> 13) * 0xC2B2AE35u;
        h ^= h >> 16;
        uint32_t bits;
        std::memcpy(&bits, x + c, 4);
        bits ^= h << 31;
        std::memcpy(x + c, &bits, 4);
    }
    const int64_t size = cols & -cols;
    for (int64_t half = 1; half < size; half *= 2)
        for (int64_t start = 0; start < cols; start += 2 * half)
            for (int64_t i = start; i < start + half; ++i) {
                const float a = x[i], b = x[i + half];
                x[i] = a + b;
                x[i + half] = a - b;
            }
    const float normal = float(1 / std::sqrt(double(size)));
    for (int64_t c = 0; c < cols; ++c) x[c] *= normal;
}

// Round a rotated token to 15-bit codes, one scale for each group: to place `at` of `out`.
void round_token(const float* x, int64_t cols, int group, const Rounded& out, int64_t at) {
    int16_t* to = out.codes + at * cols;
    for (int64_t g = 0; g < cols / group; ++g, x += group, to += group) {
        const Span span = span_of(x, group, 16256.0f);
        int32_t sum = 0;
        for (int i = 0; i < group; ++i) {
            const int32_t code = span.counts ? round_to_int(x[i] * span.inverse) : 0;
            to[i] = int16_t(code);
            sum += code;
        }
        out.scale[at * (cols / group) + g] = span.scale;
        out.sum[at * (cols / group) + g] = sum;
    }
}

}  // namespace
