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

// The product of weight i of a path, whose windows are given: bytes 2 and 3 count at 1 and 2 bits
// (0 and 1 are zero), all four at 3 and 4 bits. i is a constant after unrolling.
template <int bits>
DEVICE uint32_t product(const uint32_t (&window)[bits], int i) {
    constexpr uint32_t multiplier = uint32_t(kMultiplier[bits]);
    const int end = bits * (i + 1);  // of the state, in bits of the tile
    const int j = (end - 1) / 16;    // the word that holds its last bit
    const int taken = end - 16 * j;  // bits of that word up to there, 1 to 16
    const int shift = 16 - taken;
    if (bits <= 2) return (window[j] & uint32_t(kStates - 1) << shift) * (multiplier << taken);
    return (window[j] >> shift & uint32_t(kStates - 1)) * multiplier;
}

// Two products in one register, at 1 and 2 bits: bytes 0 and 1 are those of `first`.
DEVICE uint32_t merged(uint32_t first, uint32_t second) {
    return __byte_perm(first, second, 0x7632);
}

}  // namespace moepress
