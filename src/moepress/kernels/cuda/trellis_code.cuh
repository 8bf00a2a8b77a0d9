// Trellis codes in the registers of a warp: from the words of four neighbouring tiles (32 columns)
// of a slab (64 rows) to the fragments of A of mma m16n8k32. kernels/trellis.py explains the code.
//
// Who holds what. The order of columns inside a matrix product is free as long as A and B agree, and
// so is the order of rows. So lane l = 4 r + j of a warp takes tile j of the four, its path lanes
// 2 r and 2 r + 1, both parities, and all 16 weights of these four paths: the 64 weights of a lane
// come from bits + 1 words of 8 bytes (the first one from the slab above), and every shift is a
// constant.
//
// The value of a state is a sum of bytes of state * multiplier, minus a center. The matrix product
// sums the bytes: the activation of a weight stands under each of its bytes. A register of A is the
// product of one weight; the center is subtracted later, times the sum of the activations.
//
// At 1 and 2 bits the low two bytes of the product count, so a state needs no shift:
//     (window & 0xFFF << s) * (multiplier << 16 - s) mod 2^32  =  state * multiplier << 16,
// one AND and one multiplication for each weight. The bytes 0 and 1 are zero.
//
// Half widths. A path has half a word more in a tile, before its whole words; the tiles 2 u and 2 u + 1
// share a word for their halves. Kernels name a width by its halves: twice its bits.
#pragma once

#include "device.h"
#include "trellis_code.h"

namespace moepress {

template <int halves>
struct Width {
    static constexpr bool whole = halves % 2 == 0;
    static constexpr int low = halves / 2, high = (halves + 1) / 2;  // bits of even, of odd steps
    static constexpr int words = high;   // of a tile; at half widths the first one is shared
    static constexpr int own = whole ? 0 : 1;  // the first word that is a tile's own
    static constexpr int counted = high <= 2 ? 2 : 4;  // bytes of a product
    static constexpr int center = kCenter[high];       // of all steps: 255 at 1 and at 2 bits
    static constexpr int unit_bytes = 128 * halves;    // of four tiles

    // Where word `word` of a tile is in its unit.
    static DEVICE int offset(int tile, int word) {
        if (whole) return 64 * (low * tile + word);
        return 64 * (halves * (tile / 2) + (word ? tile % 2 * low + word : 0));
    }
    static DEVICE int64_t slab_bytes(int64_t cols) { return 4 * cols * halves; }
};
static_assert(kCenter[1] == kCenter[2], "at 1.5 bits both are subtracted as one");

// The halves of a width that a table gives (format/codec.py, width_number); 0: there is none.
DEVICE int halves_of(int64_t number) {
    if (number == 15 || number == 25 || number == 35) return int(number) / 5;
    return number >= 1 && number <= 4 ? 2 * int(number) : 0;
}

// The words of a lane: word[j + 1] is word j of its tile, word[0] the last word of the tile above.
// x: path lane 2 r; y: path lane 2 r + 1. Parity 0 is in the lower half, parity 1 in the upper.
template <int halves>
struct Words {
    uint2 word[Width<halves>::words + 1];
};

// The last 32 bits of a path at the end of each word, by parity. At the end of half a word: 24 bits.
template <int halves>
struct Windows {
    uint32_t window[2][Width<halves>::words];
};

// `odd`: whether the tile is the second one of the two that share a word.
template <int halves>
DEVICE Windows<halves> windows(const uint32_t (&word)[Width<halves>::words + 1], int odd) {
    constexpr int own = Width<halves>::own;
    Windows<halves> out;
    if (own) {
        out.window[0][0] = __byte_perm(word[1], word[0], 0x5541 - odd);
        out.window[1][0] = __byte_perm(word[1], word[0], 0x7763 - odd);
        // Sequence of bytes: of the word, of the half, of the tile above.
        out.window[0][own] = __byte_perm(word[own + 1], out.window[0][0], 0x5410);
        out.window[1][own] = __byte_perm(word[own + 1], out.window[1][0], 0x5432);
    }
#pragma unroll
    for (int j = 2 * own; j < Width<halves>::words; ++j) {
        out.window[0][j] = __byte_perm(word[j + 1], word[j], 0x5410);
        out.window[1][j] = __byte_perm(word[j + 1], word[j], 0x7632);
    }
    return out;
}

// The product of a weight whose state ends `shift` bits before the end of a window:
// bytes 2 and 3 count at 1 and 2 bits (0 and 1 are zero), all four at 3 and 4 bits.
template <int bits>
DEVICE uint32_t product_at(uint32_t window, int shift) {
    constexpr uint32_t multiplier = uint32_t(kMultiplier[bits]);
    if (bits <= 2) return (window & uint32_t(kStates - 1) << shift) * (multiplier << (16 - shift));
    return (window >> shift & uint32_t(kStates - 1)) * multiplier;
}

// The same for a step of that parity: at 1.5 bits values are those of 1 and 2 bits in turn, at 2.5
// and 3.5 bits those of 3 and of 4.
template <int halves>
DEVICE uint32_t product_at(uint32_t window, int shift, int parity) {
    if (halves == 3 && parity == 0) return product_at<1>(window, shift);
    return product_at<Width<halves>::high>(window, shift);
}

// The product of weight i of a path, whose windows are given. i is a constant after unrolling.
template <int halves>
DEVICE uint32_t product(const uint32_t (&window)[Width<halves>::words], int i) {
    constexpr int lead = Width<halves>::whole ? 0 : 8;  // bits before the whole words
    const int end = halves * (i + 1) / 2;  // of the state, in bits of the tile
    const int j = end <= lead ? 0 : (end - lead - 1) / 16 + Width<halves>::own;  // the word of its last bit
    const int shift = 16 * j + (lead ? 8 : 16) - end;  // bits of that word after it, 0 to 15
    constexpr int multiplier = kMultiplier[Width<halves>::high];
    // Two ways to cut out a state, on different pipes: shift and mask, or two shifts, the first of
    // which is a multiplication. Half of the weights take each.
    if (Width<halves>::counted == 4 && shift && i % 2)
        return (multiplied(window[j], 1u << (20 - shift)) >> 20) * uint32_t(multiplier);
    return product_at<halves>(window[j], shift, i % 2);
}

// Two products in one register, at 1 to 2 bits: bytes 0 and 1 are those of `first`.
DEVICE uint32_t merged(uint32_t first, uint32_t second) {
    return __byte_perm(first, second, 0x7632);
}

// The other way to share a slab: warp b of four takes row block b, 16 rows, of the four tiles, and a
// lane the weights 4 b .. 4 b + 3 of its four paths: columns 8 j .. 8 j + 7 of rows 2 r and 2 r + 1.
// They lie within a window of up to 32 bits that ends `shift` bits before the end of word `last`.
template <int halves>
struct RowBlock {
    int last;   // 0 .. words - 1
    int shift;  // 0 .. 15
    uint32_t bytes[2];  // selectors of the window's bytes, for each parity
    uint32_t older[2];  // at half widths: of the bytes before them

    // `odd`: as of `windows`.
    DEVICE RowBlock(int block, int odd) {
        const int end = 2 * halves * (block + 1);  // in bits of the tile
        if (Width<halves>::whole) {
            last = (end - 1) / 16;
            shift = 16 * (last + 1) - end;
            // At 2 bits the window begins at a byte.
            bytes[0] = halves == 4 && shift ? 0x0541 : 0x5410;
            bytes[1] = halves == 4 && shift ? 0x0763 : 0x7632;
            return;
        }
        last = end <= 8 ? 0 : (end + 7) / 16;
        shift = 16 * last + 8 - end;
        bytes[0] = last == 0 ? 0x7654 : 0x5410;
        bytes[1] = last == 0 ? 0x7654 : last == 1 ? 0x5432 : 0x7632;
        older[0] = last == 3 ? 0x5410 : 0x5541 - odd;
        older[1] = last == 3 ? 0x7632 : 0x7763 - odd;
    }
};

// The windows of a row block, by parity. The words last - 2, last - 1, last (counted from the last
// word of the tile above, which is word -1), as far as they exist.
template <int halves>
DEVICE void row_block_windows(uint32_t oldest, uint32_t old, uint32_t now,
                              const RowBlock<halves>& block, uint32_t (&window)[2]) {
    if (Width<halves>::whole) {
        window[0] = __byte_perm(now, old, block.bytes[0]);
        window[1] = __byte_perm(now, old, block.bytes[1]);
        if (halves == 6) {
            window[0] = __funnelshift_r(window[0], oldest, block.shift);
            window[1] = __funnelshift_r(window[1], oldest >> 16, block.shift);
        } else if (halves == 2) {
            window[0] >>= block.shift;
            window[1] >>= block.shift;
        }
        return;
    }
    // The word that the halves share, and the one before it. `last` is the same for a whole warp.
    const uint32_t half = block.last == 0 ? now : block.last == 1 ? old : oldest;
    const uint32_t above = block.last == 0 ? old : oldest;
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
        const uint32_t before = __byte_perm(half, above, block.older[parity]);
        const uint32_t recent = __byte_perm(now, block.last <= 1 ? before : old, block.bytes[parity]);
        const uint32_t rest = block.last == 1 ? before >> 16 : before;
        window[parity] = halves == 3 ? recent >> block.shift
                                     : __funnelshift_r(recent, rest, block.shift);
    }
}

// The fragments of A, one for each byte that counts: a[byte][0], [1]: columns 8 j .. 8 j + 3 of rows
// 2 r, 2 r + 1; a[byte][2], [3]: columns 8 j + 4 .. 8 j + 7. `word`: those of `row_block_windows`.
template <int halves>
DEVICE void fragments(const uint2 (&word)[3], const RowBlock<halves>& block,
                      uint32_t (&a)[Width<halves>::counted][4]) {
    constexpr int counted = Width<halves>::counted;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        uint32_t window[2];
        row_block_windows<halves>(h ? word[0].y : word[0].x, h ? word[1].y : word[1].x,
                                  h ? word[2].y : word[2].x, block, window);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t p[4];  // of four columns
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int i = 2 * half + c / 2;  // of the row block's four weights of a path
                const int after = (halves * (3 - i) + 1) / 2;  // bits of those after it
                p[c] = product_at<halves>(window[c % 2], after, i % 2);
            }
            const int at = 2 * half + h;
            const uint32_t high = __byte_perm(p[0], p[1], 0x7362);
            const uint32_t high2 = __byte_perm(p[2], p[3], 0x7362);
            a[counted - 2][at] = __byte_perm(high, high2, 0x5410);
            a[counted - 1][at] = __byte_perm(high, high2, 0x7632);
            if (counted > 2) {
                const uint32_t low = __byte_perm(p[0], p[1], 0x5140);
                const uint32_t low2 = __byte_perm(p[2], p[3], 0x5140);
                a[0][at] = __byte_perm(low, low2, 0x5410);
                a[1][at] = __byte_perm(low, low2, 0x7632);
            }
        }
    }
}

}  // namespace moepress
