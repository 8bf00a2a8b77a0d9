// Weights of a trellis matrix as one byte each, for products with many tokens: then one dot product
// of bytes takes 4 columns, as for scalar codes. kernels/trellis.py, `byte_values`, defines the same
// values.
//
//     1, 1.5, 2 bits    byte = (byte0 + byte1 + 1) div 2, of state * multiplier.
//                       value = 2 byte - 255.5. The exact value is .5 more or less, and both are
//                       equally frequent.
//     2.5 to 4 bits     byte = t / 3, rounded; t, the sum of the four bytes, is at most 751.
//                       value = 3 byte - center. t is a multiple of 3 at 2.5 and 3 bits, whose
//                       multiplier is one, and 255 as well: the value is exact. At 3.5 and 4 bits
//                       the exact value is 0 or 1 more or less.
//
// A group of columns gives the integer unit * sum(byte q) - center * sum(q) of `parts` parts. It is
// at most 511 * 127 * 128 < 2^23, so its float is exact. Precision: docs/log.md#trellis-one-byte.
#pragma once

#include <cstdint>

#include "trellis_code.h"
#include "trellis_tile.h"

namespace moepress {
namespace {

// value = (unit * byte - center) / parts
constexpr int byte_unit(int width) { return sums_four_bytes(width) ? 3 : 4; }
constexpr int byte_center(int width) {
    return sums_four_bytes(width) ? center_of(width) : 2 * center_of(width) + 1;
}
constexpr float byte_share(int width) { return sums_four_bytes(width) ? 1.0f : 0.5f; }  // 1 / parts

// Decode a tile: take(i, bytes) gets the bytes of steps i and i + 1, i = 0, 2, ... 14: 16 rows x 4
// columns, of each row in the order 0, 2, 1, 3.
template <class Lanes, int width, class Take>
MOEPRESS_INLINE void decode_bytes(const Tile<Lanes, width>& tile, Take take) {
    typename Lanes::Words step[kSteps];
    constexpr Form form = sums_four_bytes(width) ? Form::kSums : Form::kProducts;
    decode_steps<Lanes, width, form>(tile, step);
#pragma GCC unroll 8
    for (int i = 0; i < kSteps; i += 2)
        if constexpr (sums_four_bytes(width))
            take(i, Lanes::thirds(step[i], step[i + 1]));
        else
            take(i, Lanes::halves(step[i], step[i + 1]));
}

// out [16] += a times the products of a group; sum: of byte q, q: of q.
template <class Lanes, int width>
MOEPRESS_INLINE void finish_bytes(typename Lanes::Pairs sum, float a, int32_t q, float* out) {
    sum.template multiply<byte_unit(width)>();
    finish_group<Lanes>(sum, a * byte_share(width), byte_center(width) * q, out);
}

}  // namespace
}  // namespace moepress
