// The tiles of a slab of a trellis matrix: decoding them over `Lanes` (lanes_portable.h).
//
//     slab     K / 8 tiles
//     tile     64 rows x 8 columns: `bits` words for each of 32 paths; word j of all paths is one
//              register, [16 lanes][2 parities] of 16 bits
//     window   the 16 bits of a path that end at some bit of a word: the end of the word before,
//              then the start of this word. Shifted and masked to 12 bits: the state of a weight.
//     step i   weight i of all paths: row 16 (i div 4) + lane, column 2 (i mod 4) + parity
//
// `state_at` finds the states of a step. Before word 0 comes the last word of the tile one slab
// above; it was read for that slab and is still in the cache.
#pragma once

#include <cstdint>

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
    if constexpr (end == 16)
        return tile.word[j + 1];
    else
        return Lanes::template window<end>(tile.word[j], tile.word[j + 1]);
}

// Ends of the windows that a word's states are taken from, bit e for a window that ends at bit e,
// by code bits and word. A window of 16 bits holds the 12 bits of every state that ends at one of
// its last 5 bits: for the last of them a mask gives the state, for the first a shift, for the
// others both. The word itself, end 16, is always there. These sets have the fewest instructions
// (tried all), if a window takes 3 of them or, where it is cheap, 1 or 2. The compiler computes
// each window once.
template <bool cheap>
constexpr uint32_t window_ends(int bits, int word) {
    constexpr int three[] = {1 << 3 | 1 << 9, 1 << 5 | 1 << 11, 1 << 4 | 1 << 10};
    const int ends = bits == 1   ? (cheap ? 0xE1E0 : 1 << 5 | 1 << 6 | 1 << 11)
                     : bits == 2 ? (cheap ? 1 << 6 | 1 << 8 | 1 << 14 : 1 << 4 | 1 << 10)
                     : bits == 3 ? three[word]
                                 : 1 << 8;
    return uint32_t(ends) | 1 << 16;
}

// The end of the window for a state that ends at bit `taken`, 1 to 16.
constexpr int window_end(uint32_t ends, int taken) {
    constexpr int order[] = {0, 4, 1, 2, 3};
    for (int more : order)
        if (ends >> (taken + more) & 1) return taken + more;
    return -1;
}

// The states of step i of a tile, 32 weights.
template <class Lanes, int bits, int i>
MOEPRESS_INLINE typename Lanes::Words state_at(const Tile<Lanes, bits>& tile) {
    constexpr int end = bits * (i + 1);  // of the state, in bits of the tile
    constexpr int j = (end - 1) / 16;    // the word that holds its last bit
    constexpr int taken = end - 16 * j;  // bits of that word up to there, 1 to 16
    constexpr int last = window_end(window_ends<Lanes::cheap_windows>(bits, j), taken);
    static_assert(last >= taken);
    typename Lanes::Words state = window<Lanes, bits, j, last>(tile);
    if constexpr (last > taken) state = Lanes::template shift_right<last - taken>(state);
    if constexpr (last - taken < 16 - kStateBits) state = Lanes::masked(state, kStates - 1);
    return state;
}

// Several tokens: decode steps i to 15 of a tile into out [16], as bytes of products or as t.
template <class Lanes, int bits, bool bytes, int i = 0>
MOEPRESS_INLINE void decode_steps(const Tile<Lanes, bits>& tile, typename Lanes::Words* out) {
    const typename Lanes::Words state = state_at<Lanes, bits, i>(tile);
    if constexpr (bytes)
        out[i] = Lanes::low_products(state, kMultiplier[bits]);
    else
        out[i] = Lanes::template byte_sums<(bits > 2)>(state, kMultiplier[bits]);
    if constexpr (i + 1 < kSteps) decode_steps<Lanes, bits, bytes, i + 1>(tile, out);
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
