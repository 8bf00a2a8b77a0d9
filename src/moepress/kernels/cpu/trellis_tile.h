// The tiles of a slab of a trellis matrix: decoding them over `Lanes` (lanes_portable.h).
//
//     slab     K / 8 tiles
//     tile     64 rows x 8 columns: `width` words for each of 32 paths; word j of all paths is one
//              register, [16 lanes][2 parities] of 16 bits
//     half     at half widths, the first 8 bits of a path in a tile: the high bytes of a register
//              that two tiles share, or the low ones in the second of them
//     window   the 16 bits of a path that end at some bit of a word: the end of the word before,
//              then the start of this word. Shifted and masked to 12 bits: the state of a weight.
//     step i   weight i of all paths: row 16 (i div 4) + lane, column 2 (i mod 4) + parity
//
// `state_at` finds the states of a step. Before the first word comes the last word of the tile one
// slab above; it was read for that slab and is still in the cache.
#pragma once

#include <cstdint>

#include "trellis_code.h"

// Steps are unrolled by templates. With sanitizers they are not inlined: compiling would take
// minutes.
#if defined(__SANITIZE_ADDRESS__)
#define MOEPRESS_INLINE inline
#define MOEPRESS_INLINE_LAMBDA
#else
#define MOEPRESS_INLINE [[gnu::always_inline]] inline
#define MOEPRESS_INLINE_LAMBDA __attribute__((always_inline))
#endif

namespace moepress {
namespace {

// The words of a tile. Word 0 is the last word of the tile above. Of half widths word 1 is the
// window that ends with the half, and `half` a register with the half in its high bytes.
template <class Lanes, int width>
struct Tile {
    typename Lanes::Words word[whole_words(width) + is_half(width) + 1];
    typename Lanes::Words half;  // unused at whole widths
};

// The tile at `tile`; at half widths `tile` is where the two tiles lie, and `odd` says which of them
// it is.
template <class Lanes, int width, bool odd = false>
MOEPRESS_INLINE Tile<Lanes, width> load_tile(const uint8_t* above, const uint8_t* tile) {
    constexpr int whole = whole_words(width), half = is_half(width), skip = half + odd * whole;
    static_assert(half || !odd);
    Tile<Lanes, width> out;
    out.word[0] = Lanes::words(above + 64 * (skip + whole - 1));
    if constexpr (half) {
        out.half = Lanes::words(tile);
        if constexpr (odd) out.half = Lanes::template window<8>(out.half, out.half);
        out.word[1] = Lanes::template window<8>(out.word[0], out.half);
    }
#pragma GCC unroll 4
    for (int j = 0; j < whole; ++j)
        out.word[j + half + 1] = Lanes::words(tile + 64 * (skip + j));
    return out;
}

// Call use(tile, t) for tiles t = 0 .. tiles - 1 of a group, which lie at `tile`, those above them at
// `above`.
template <class Lanes, int width, class Use>
MOEPRESS_INLINE void each_tile(const uint8_t* above, const uint8_t* tile, int tiles, Use use) {
    constexpr int together = is_half(width) ? 2 : 1;
    for (int t = 0; t < tiles; t += together) {
        const uint8_t* over = above + tiles_bytes(width, t);
        const uint8_t* from = tile + tiles_bytes(width, t);
        use(load_tile<Lanes, width>(over, from), t);
        if constexpr (together == 2) use(load_tile<Lanes, width, true>(over, from), t + 1);
    }
}

// The window of all paths whose last bit is bit `end`, 1 to 16, of part j of a tile: its words, at
// half widths after the half, of which the last bit is 8.
template <class Lanes, int width, int j, int end>
MOEPRESS_INLINE typename Lanes::Words window(const Tile<Lanes, width>& tile) {
    if constexpr (is_half(width) && j == 0) {
        if constexpr (end < 8) return Lanes::template window<end>(tile.word[0], tile.half);
        return tile.word[1];
    } else if constexpr (end == 16) {
        return tile.word[j + 1];
    } else {
        return Lanes::template window<end>(tile.word[j], tile.word[j + 1]);
    }
}

// Ends of the windows that the states in a part of a tile are taken from, bit e for a window that
// ends at bit e, by width and part. A window of 16 bits holds the 12 bits of every state that ends at
// one of its last 5 bits: for the last of them a mask gives the state, for the first a shift, for the
// others both. The window at the end of a part, 16 or 8, is always there. These sets have the fewest
// instructions (tried all), if a window takes 3 of them or, where it is cheap, 1 or 2. The compiler
// computes each window once.
template <bool cheap>
constexpr uint32_t window_ends(int width, int part) {
    constexpr int three[] = {1 << 3 | 1 << 9, 1 << 5 | 1 << 11, 1 << 4 | 1 << 10};
    constexpr int half_of_1[] = {cheap ? 1 << 1 | 1 << 7 : 1 << 3,
                                 cheap ? 1 << 5 | 1 << 8 | 1 << 11 | 1 << 14 : 1 << 5 | 1 << 11};
    constexpr int half_of_2[] = {1 << 2, 1 << 4 | 1 << 9, 1 << 1 | 1 << 6 | 1 << 11};
    constexpr int half_of_3[] = {1 << 7, 1 << 6 | 1 << 13, 1 << 4 | 1 << 11, 1 << 2 | 1 << 9};
    const int ends = width == 1    ? (cheap ? 0xE1E0 : 1 << 5 | 1 << 6 | 1 << 11)
                     : width == 2  ? (cheap ? 1 << 6 | 1 << 8 | 1 << 14 : 1 << 4 | 1 << 10)
                     : width == 3  ? three[part]
                     : width == 4  ? 1 << 8
                     : width == 15 ? half_of_1[part]
                     : width == 25 ? half_of_2[part]
                                   : half_of_3[part];
    return uint32_t(ends) | 1 << (is_half(width) && part == 0 ? 8 : 16);
}

// The end of the window for a state that ends at bit `taken`, 1 to 16.
constexpr int window_end(uint32_t ends, int taken) {
    constexpr int order[] = {0, 4, 1, 2, 3};
    for (int more : order)
        if (ends >> (taken + more) & 1) return taken + more;
    return -1;
}

// The states of step i of a tile, 32 weights.
template <class Lanes, int width, int i>
MOEPRESS_INLINE typename Lanes::Words state_at(const Tile<Lanes, width>& tile) {
    constexpr int half = is_half(width) ? 8 : 0;         // bits before the first word
    constexpr int end = path_bits(width, i + 1);         // of the state, in bits of the tile
    constexpr int j = (end - 1 + (16 - half) % 16) / 16;  // the part that holds its last bit
    constexpr int taken = j == 0 ? end : end - 16 * j + (16 - half) % 16;  // bits of it up to there
    constexpr int last = window_end(window_ends<Lanes::cheap_windows>(width, j), taken);
    static_assert(last >= taken);
    typename Lanes::Words state = window<Lanes, width, j, last>(tile);
    if constexpr (last > taken) state = Lanes::template shift_right<last - taken>(state);
    if constexpr (last - taken < 16 - kStateBits) state = Lanes::masked(state, kStates - 1);
    return state;
}

// What a step is decoded to: numbers of which each is multiplied with the code of its column.
enum class Form {
    kSums,         // t, the sum of bytes of state * multiplier, as a word
    kProducts,     // up to 2 bits: the two bytes whose sum is t
    kAverages,     // above 2 bits: two bytes, (byte0 + byte2 + 1) div 2 and (byte1 + byte3 + 1) div 2.
                   // Twice their sum is t or up to 2 more, 1 in the mean
    kAverageSums,  // the sum of these two, as a word
};

// Step i of a tile, 32 weights.
template <class Lanes, int width, Form form, int i>
MOEPRESS_INLINE typename Lanes::Words step_at(const Tile<Lanes, width>& tile) {
    static_assert(form == Form::kSums || (form == Form::kProducts) != sums_four_bytes(width));
    const typename Lanes::Words state = state_at<Lanes, width, i>(tile);
    constexpr int multiplier = kMultiplier[value_bits(width, i)];
    if constexpr (form == Form::kProducts)
        return Lanes::low_products(state, multiplier);
    else if constexpr (form == Form::kAverages)
        return Lanes::average_products(state, multiplier);
    else if constexpr (form == Form::kAverageSums)
        return Lanes::average_sums(state, multiplier);
    else
        return Lanes::template byte_sums<sums_four_bytes(width)>(state, multiplier);
}

// Several tokens: decode steps i to 15 of a tile into out [16].
template <class Lanes, int width, Form form, int i = 0>
MOEPRESS_INLINE void decode_steps(const Tile<Lanes, width>& tile, typename Lanes::Words* out) {
    out[i] = step_at<Lanes, width, form, i>(tile);
    if constexpr (i + 1 < kSteps) decode_steps<Lanes, width, form, i + 1>(tile, out);
}

// out [16] += a (sum - correction); correction = z sum(q).
template <class Lanes>
MOEPRESS_INLINE void finish_group(const typename Lanes::Pairs& sum, float a, int32_t correction,
                                  float* out) {
    Lanes::store(out, Lanes::mul_add(Lanes::splat(a), sum.value(correction),
                                     Lanes::load_floats(out)));
}

}  // namespace
}  // namespace moepress
