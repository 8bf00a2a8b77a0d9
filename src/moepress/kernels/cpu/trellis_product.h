// The product of a slab, 64 rows of a trellis matrix, and a panel of tokens. Written once over
// `Lanes` (lanes_portable.h lists what it has to provide) and instantiated for each instruction
// set.
//
// A weight's value is a sum t of bytes of state * multiplier, minus a center z. With the scale s of
// a row, and activations x = a q in 15-bit codes q:
//
//     y = s sum over groups of  a (sum(t q) - z sum(q))
//
// The difference in parentheses is an exact integer: sum(t q) is at most 751 * 16256 * 128 < 2^31.
//
//     slab     K / 8 tiles
//     tile     64 rows x 8 columns: `bits` words for each of 32 paths; word j of all paths is one
//              register, [16 lanes][2 parities] of 16 bits
//     window   the 16 bits of a path that end at some bit of a word: the end of the word before,
//              then the start of this word. Shifted and masked to 12 bits: the state of a weight.
//     step i   weight i of all paths: row 16 (i div 4) + lane, column 2 (i mod 4) + parity
//
// `sums_at` decodes a step. A step is multiplied with the activations of its two columns: a dot
// product of pairs, summed in 32 bits. Before word 0 comes the last word of the tile one slab
// above; it was read for that slab and is still in the cache. At 2 bits a step takes 7
// instructions for each register: 32 weights in a register of 512 bits, 16 in one of 256 bits.
// Speed: docs/log.md#trellis-product-speed.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"
#include "trellis_code.h"

// Steps are unrolled by templates. With sanitizers they are not inlined: compiling would take
// minutes.
#if defined(__SANITIZE_ADDRESS__)
#define MOEPRESS_INLINE inline
#else
#define MOEPRESS_INLINE [[gnu::always_inline]] inline
#endif

namespace moepress {
namespace {

// The words of a tile: word[j + 1] is word j, word[0] the last word of the tile above.
template <class Lanes, int bits>
struct Tile {
    typename Lanes::Words word[bits + 1];
};

template <class Lanes, int bits>
MOEPRESS_INLINE Tile<Lanes, bits> load_tile(const uint8_t* above, const uint8_t* tile) {
    Tile<Lanes, bits> out;
    out.word[0] = Lanes::words(above + 64 * (bits - 1));
#pragma GCC unroll 4
    for (int j = 0; j < bits; ++j) out.word[j + 1] = Lanes::words(tile + 64 * j);
    return out;
}

// The window of all paths whose last bit is bit `end`, 1 to 16, of word j.
template <class Lanes, int bits, int j, int end>
MOEPRESS_INLINE typename Lanes::Words window(const Tile<Lanes, bits>& tile) {
    if constexpr (end == 16) return tile.word[j + 1];
    return Lanes::template window<end>(tile.word[j], tile.word[j + 1]);
}

// Decode step i of a tile: the sums of bytes of 32 weights. A window of 16 bits holds the 12 bits
// of every state that ends at one of its last 5 bits (12 to 16). So four windows for each word,
// which end at its bits 16, 11, 6 and 1, serve all steps; the compiler computes each once.
template <class Lanes, int bits, int i>
MOEPRESS_INLINE typename Lanes::Words sums_at(const Tile<Lanes, bits>& tile) {
    constexpr int end = bits * (i + 1);  // of the state, in bits of the tile
    constexpr int j = (end - 1) / 16;    // the word that holds its last bit
    constexpr int taken = end - 16 * j;  // bits of that word up to there, 1 to 16
    constexpr int last = taken > 11 ? 16 : taken > 6 ? 11 : taken > 1 ? 6 : 1;  // of its window
    static_assert(16 - kStateBits >= 4);
    typename Lanes::Words state = window<Lanes, bits, j, last>(tile);
    if constexpr (last > taken) state = Lanes::template shift_right<last - taken>(state);
    state = Lanes::masked(state, kStates - 1);
    return Lanes::template byte_sums<(bits > 2)>(state, kMultiplier[bits]);
}

// One token: add the products of steps i to 15 of a tile to the sums of the four runs of 16 rows.
// `x` are the codes of the tile's 8 columns.
template <class Lanes, int bits, int i = 0>
MOEPRESS_INLINE void add_steps(const Tile<Lanes, bits>& tile, const int16_t* x,
                               typename Lanes::Pairs* sum) {
    int32_t pair;
    std::memcpy(&pair, x + 2 * (i % 4), 4);
    sum[i / 4].add(sums_at<Lanes, bits, i>(tile), pair);
    if constexpr (i + 1 < kSteps) add_steps<Lanes, bits, i + 1>(tile, x, sum);
}

// Several tokens: decode steps i to 15 of a tile into out [16].
template <class Lanes, int bits, int i = 0>
MOEPRESS_INLINE void decode_steps(const Tile<Lanes, bits>& tile, typename Lanes::Words* out) {
    out[i] = sums_at<Lanes, bits, i>(tile);
    if constexpr (i + 1 < kSteps) decode_steps<Lanes, bits, i + 1>(tile, out);
}

// out[r] += a (sum - correction) for the 64 rows of a slab; correction = z sum(q).
template <class Lanes>
MOEPRESS_INLINE void finish_group(const typename Lanes::Pairs* sum, float a, int32_t correction,
                                  float* out) {
    for (int run = 0; run < 4; ++run)
        Lanes::store(out + 16 * run,
                     Lanes::mul_add(Lanes::splat(a), sum[run].value(correction),
                                    Lanes::load_floats(out + 16 * run)));
}

constexpr int kWordsAhead = 8192;  // bytes to prefetch ahead, see kCodesAhead in scalar_product.h

template <class Lanes, int bits>
void trellis_dot(const uint8_t* above, const uint8_t* slab, int64_t cols, int group,
                 const TrellisPanel& panel, const uint8_t* scales, float* out) {
    const TrellisPanel x = panel;  // a copy: stores to `out` might alias the reference
    constexpr int tile_bytes = 64 * bits;
    constexpr int center = kCenter[bits];
    const int tiles = group / kTileColumns;
    const int64_t groups = cols / group;
    for (int64_t i = 0; i < x.count * kSlabRows; ++i) out[i] = 0;
    typename Lanes::Words decoded[kMaxGroup / kTileColumns * kSteps];
    for (int64_t g = 0; g < groups; ++g) {
        const uint8_t* from = slab + g * tiles * tile_bytes;
        const uint8_t* over = above + g * tiles * tile_bytes;
        if (x.count == 1) {
            const int16_t* codes = x.all.codes + x.places[0] * cols + g * group;
            typename Lanes::Pairs sum[4];
            for (int t = 0; t < tiles; ++t) {
#pragma GCC unroll 4
                for (int j = 0; j < bits; ++j)
                    Lanes::prefetch(from + t * tile_bytes + 64 * j + kWordsAhead);
                add_steps<Lanes, bits>(
                    load_tile<Lanes, bits>(over + t * tile_bytes, from + t * tile_bytes),
                    codes + t * kTileColumns, sum);
            }
            const int64_t at = x.places[0] * groups + g;
            finish_group<Lanes>(sum, x.all.scale[at], center * x.all.sum[at], out);
            continue;
        }
        for (int t = 0; t < tiles; ++t)
            decode_steps<Lanes, bits>(
                load_tile<Lanes, bits>(over + t * tile_bytes, from + t * tile_bytes),
                decoded + t * kSteps);
        for (int64_t p = 0; p < x.count; ++p) {
            const int16_t* codes = x.all.codes + x.places[p] * cols + g * group;
            typename Lanes::Pairs sum[4];
            for (int t = 0; t < tiles; ++t)
#pragma GCC unroll 4
                for (int c = 0; c < 4; ++c) {
                    int32_t pair;
                    std::memcpy(&pair, codes + t * kTileColumns + 2 * c, 4);
#pragma GCC unroll 4
                    for (int run = 0; run < 4; ++run)
                        sum[run].add(decoded[t * kSteps + 4 * run + c], pair);
                }
            const int64_t at = x.places[p] * groups + g;
            finish_group<Lanes>(sum, x.all.scale[at], center * x.all.sum[at], out + p * kSlabRows);
        }
    }
    for (int run = 0; run < 4; ++run) {
        const typename Lanes::Float s = Lanes::bfloat16(scales + 32 * run);
        for (int64_t p = 0; p < x.count; ++p) {
            float* at = out + p * kSlabRows + 16 * run;
            Lanes::store(at, Lanes::mul(s, Lanes::load_floats(at)));
        }
    }
}

}  // namespace
}  // namespace moepress

#undef MOEPRESS_INLINE
