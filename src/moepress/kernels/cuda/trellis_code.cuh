// Trellis codes in the registers of a warp: from the words of four neighbouring tiles (32 columns)
// of a slab (64 rows) to the fragments of A of mma m16n8k32. kernels/trellis.py explains the code.
//
// Who holds what. The order of columns inside a matrix product is free as long as A and B agree, and
// so is the order of rows. So lane l = 4 r + j of a warp takes tile j of the four, its path lanes
// 2 r and 2 r + 1, both parities, and all 16 weights of these four paths: the 64 weights of a lane
// come from bits + 1 of its own 8-byte words (the first one from the slab above), and every shift is
// a constant.
//
// The value of a state is a sum of bytes of state * multiplier, minus a center. The matrix product
// sums the bytes: the activation of a weight stands under each of its bytes. A register of A is the
// product of one weight; the center is subtracted later, times the sum of the activations.
//
// At 1 and 2 bits the low two bytes of the product count, so a state needs no shift:
//     (window & 0xFFF << s) * (multiplier << 16 - s) mod 2^32  =  state * multiplier << 16,
// one AND and one multiplication for each weight. The bytes 0 and 1 are zero.
#pragma once

#include "device.h"
#include "trellis_code.h"

namespace moepress {

// The words of a lane: word[j + 1] is word j of its tile, word[0] the last word of the tile above.
// x: path lane 2 r; y: path lane 2 r + 1. Parity 0 is in the lower half, parity 1 in the upper.
template <int bits>
struct Words {
    uint2 word[bits + 1];
};

// The last 32 bits of a path at the end of each word, by parity.
template <int bits>
struct Windows {
    uint32_t window[2][bits];
};

template <int bits>
DEVICE Windows<bits> windows(const uint32_t (&word)[bits + 1]) {
    Windows<bits> out;
#pragma unroll
    for (int j = 0; j < bits; ++j) {
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

// The product of weight i of a path, whose windows are given. i is a constant after unrolling.
template <int bits>
DEVICE uint32_t product(const uint32_t (&window)[bits], int i) {
    const int end = bits * (i + 1);  // of the state, in bits of the tile
    const int j = (end - 1) / 16;    // the word that holds its last bit
    const int taken = end - 16 * j;  // bits of that word up to there, 1 to 16
    const int shift = 16 - taken;
    constexpr int multiplier = kMultiplier[bits];
    // Two ways to cut out a state, on different pipes: shift and mask, or two shifts, the first of
    // which is a multiplication. Half of the weights take each.
    if (bits > 2 && shift && i % 2)
        return (multiplied(window[j], 1u << (20 - shift)) >> 20) * uint32_t(multiplier);
    return product_at<bits>(window[j], shift);
}

// Two products in one register, at 1 and 2 bits: bytes 0 and 1 are those of `first`.
DEVICE uint32_t merged(uint32_t first, uint32_t second) {
    return __byte_perm(first, second, 0x7632);
}

// The other way to share a slab: warp b of four takes row block b, 16 rows, of the four tiles, and a
// lane the weights 4 b .. 4 b + 3 of its four paths: columns 8 j .. 8 j + 7 of rows 2 r and 2 r + 1.
// They lie within a window of up to 32 bits that ends `shift` bits before the end of word `last`.
template <int bits>
struct RowBlock {
    int last;   // 0 .. bits - 1
    int shift;  // 0 .. 15
    uint32_t bytes[2];  // selectors of the window's bytes, for each parity

    DEVICE explicit RowBlock(int block) {
        const int end = 4 * bits * (block + 1);  // in bits of the tile
        last = (end - 1) / 16;
        shift = 16 * (last + 1) - end;
        // At 2 bits the window begins at a byte.
        bytes[0] = bits == 2 && shift ? 0x0541 : 0x5410;
        bytes[1] = bits == 2 && shift ? 0x0763 : 0x7632;
    }
};

template <int bits>
constexpr int kCounted = bits <= 2 ? 2 : 4;  // bytes of a product

// The fragments of A, one for each byte that counts: a[byte][0], [1]: columns 8 j .. 8 j + 3 of rows
// 2 r, 2 r + 1; a[byte][2], [3]: columns 8 j + 4 .. 8 j + 7. `word`: the words last - 2, last - 1,
// last of the row block (the first one is used at 3 bits only).
template <int bits>
DEVICE void fragments(const uint2 (&word)[3], const RowBlock<bits>& block,
                      uint32_t (&a)[kCounted<bits>][4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const uint32_t oldest = h ? word[0].y : word[0].x, old = h ? word[1].y : word[1].x;
        const uint32_t now = h ? word[2].y : word[2].x;
        uint32_t window[2] = {__byte_perm(now, old, block.bytes[0]),
                              __byte_perm(now, old, block.bytes[1])};
        if (bits == 3) {
            window[0] = __funnelshift_r(window[0], oldest, block.shift);
            window[1] = __funnelshift_r(window[1], oldest >> 16, block.shift);
        } else if (bits == 1) {
            window[0] >>= block.shift;
            window[1] >>= block.shift;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t p[4];  // of four columns
#pragma unroll
            for (int c = 0; c < 4; ++c)
                p[c] = product_at<bits>(window[c % 2], bits * (3 - 2 * half - c / 2));
            const int at = 2 * half + h;
            const uint32_t high = __byte_perm(p[0], p[1], 0x7362);
            const uint32_t high2 = __byte_perm(p[2], p[3], 0x7362);
            a[kCounted<bits> - 2][at] = __byte_perm(high, high2, 0x5410);
            a[kCounted<bits> - 1][at] = __byte_perm(high, high2, 0x7632);
            if (bits > 2) {
                const uint32_t low = __byte_perm(p[0], p[1], 0x5140);
                const uint32_t low2 = __byte_perm(p[2], p[3], 0x5140);
                a[0][at] = __byte_perm(low, low2, 0x5410);
                a[1][at] = __byte_perm(low, low2, 0x7632);
            }
        }
    }
}

}  // namespace moepress
