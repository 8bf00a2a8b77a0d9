// The product of a block, 16 rows of a scalar matrix, and a panel of tokens. Written once over
// `Lanes` (lanes_portable.h lists what it has to provide) and instantiated for each instruction
// set.
//
// With the codes c, scale s and zero z of a row in a group, and activations x = a q in 8-bit codes
// q:
//
//     y = sum over groups of  s (a sum(c q) - z a sum(q))
//
// sum(c q) is an exact integer, at most 255 * 127 * 128 < 2^22, so its float is exact too. Rounding
// happens only in what follows, once for each group: the error is that of a float32 sum of K / g
// terms. a sum(q) is the same for all rows; the panel holds it.
//
//     block   [ codes: tile of group 0 | tile of group 1 | ... ][ scales ][ zero codes ]
//     tile    [ unit | unit | ... ]          at 3 bits: [ 2-bit units ... ][ 1-bit units ... ]
//     unit    32 columns of 16 rows: 8 quads of 4 columns, 64 * bits bytes
//     quad    4 columns of 16 rows, one byte for each code: one register, [16 rows][4 columns]
//
// `codes_of` decodes a quad (docs/format.md, "Tiles"). It is then multiplied with every token of
// the panel, so that decoding costs one or two instructions for `width` dot products.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"
#include "scalar_format.h"

namespace moepress {
namespace {

// With one token, codes need not be moved to the low bits of their bytes. Masked in place they are
// 2^shift times as large; each shift then has a sum of its own, which is shifted back at the end of
// the group. This replaces a shift for each quad by one for each sum.
template <class Lanes, int bits, int width>
constexpr bool kInPlace = Lanes::sums_any_byte && width == 1 &&
                          (bits == 1 || bits == 2 || bits == 4) && 8 / bits <= Lanes::most_sums;

// Decode quad `quad`, 0 to 7, of a unit: the codes of 16 rows and 4 columns. `plane` holds the
// unit's codes, 8 / bits quads in each run of 64 bytes; at 3 bits their low two bits, and `high`
// the third.
template <class Lanes, int bits, int quad, bool in_place>
[[gnu::always_inline]] inline typename Lanes::Codes codes_of(const uint8_t* plane,
                                                             const uint8_t* high) {
    constexpr int plane_bits = bits == 3 ? 2 : bits;
    constexpr int at = plane_bits * quad;
    const typename Lanes::Codes chunk = Lanes::load(plane + 64 * (at / 8));
    const typename Lanes::Codes low = Lanes::template field<plane_bits, at % 8, in_place>(chunk);
    if constexpr (bits == 3) return Lanes::template with_high<quad>(low, Lanes::load(high));
    return low;
}

// Add the products of quads `quad` to 7 of a unit with all tokens. A token has `ways` sums in
// `dot`, used in turn, since consecutive additions to one sum would wait for each other.
template <class Lanes, int bits, int width, int ways, int quad = 0>
[[gnu::always_inline]] inline void add_quads(const uint8_t* plane, const uint8_t* high,
                                             const int8_t* x,
                                             typename Lanes::template Dot<bits>* dot) {
    const typename Lanes::Codes codes =
        codes_of<Lanes, bits, quad, kInPlace<Lanes, bits, width>>(plane, high);
#pragma GCC unroll 16
    for (int p = 0; p < width; ++p) {
        int32_t four;
        std::memcpy(&four, x + 4 * p, 4);
        dot[p * ways + quad % ways].add(codes, four);
    }
    if constexpr (quad < 7)
        add_quads<Lanes, bits, width, ways, quad + 1>(plane, high, x + 4 * width, dot);
}

// Products with one or two tokens are bound by memory. Hardware prefetching alone leaves a third of
// the bandwidth unused: it stops at every page, and a block is three streams (codes, scales,
// zeros). So codes are prefetched this many bytes ahead, scales and zeros one block ahead. The
// target is the second-level cache: the first level has too few buffers for misses to cover the
// latency. Measured on Zen 4 with 2-bit codes and one thread, where a plain read gets 26 GB/s: 11
// GB/s without prefetching, 15 into the first level, 23 into the second. 4 KB ahead is too few; 8
// to 12 KB make no difference.
constexpr int kCodesAhead = 8192;

template <class Lanes, int bits, int width>
void scalar_dot(const uint8_t* block, int64_t cols, int group, const ScalarPanel& x, float* out) {
    using Float = typename Lanes::Float;
    constexpr bool zero_codes = has_zero(bits);
    constexpr float levels = (1 << bits) - 1;
    constexpr int unit_bytes = 64 * (bits == 3 ? 2 : bits);
    constexpr bool in_place = kInPlace<Lanes, bits, width>;
    constexpr int ways = in_place ? 8 / bits : width < Lanes::sums ? Lanes::sums / width : 1;
    const int64_t groups = cols / group;
    const int64_t next = block_bytes(cols, bits, group);
    const uint8_t* plane = block;
    const uint8_t* ahead = block + kCodesAhead;
    const uint8_t* scale = block + 2 * cols * bits;
    const uint8_t* zero = scale + 32 * groups;
    const int8_t* quads = x.codes;
    Float y[width];
#pragma GCC unroll 16
    for (int p = 0; p < width; ++p) y[p] = Lanes::zero();
    for (int64_t g = 0; g < groups; ++g) {
        typename Lanes::template Dot<bits> dot[width * ways];
        const uint8_t* high = plane + 4 * group;  // at 3 bits: the plane of high bits
        for (int column = 0; column < group; column += 32) {
            if constexpr (width <= 2)
                for (int line = 0; line < bits; ++line, ahead += 64) Lanes::prefetch(ahead);
            add_quads<Lanes, bits, width, ways>(plane, high, quads, dot);
#pragma GCC unroll 16
            for (int p = 0; p < width * ways; ++p) dot[p].carry();
            plane += unit_bytes;
            high += 64;
            quads += 32 * width;
        }
        if constexpr (bits == 3) plane = high;
        if constexpr (width <= 2) {
            // `ahead` does not count the bytes of scales and zeros that lie before the next codes.
            Lanes::prefetch(scale + kCodesAhead + 48 * g);
            Lanes::prefetch(scale + next + 32 * g);
            if constexpr (zero_codes) Lanes::prefetch(zero + next + 16 * g);
        }
        const Float s = Lanes::bfloat16(scale + 32 * g);
        Float z = Lanes::splat(levels / 2);
        if constexpr (zero_codes)
            z = Lanes::mul(Lanes::bytes(zero + 16 * g), Lanes::splat(levels / 255));
#pragma GCC unroll 16
        for (int p = 0; p < width; ++p) {
#pragma GCC unroll 16
            for (int way = 1; way < ways; ++way)
                dot[p * ways].join(dot[p * ways + way], in_place ? bits * way : 0);
            const Float a = Lanes::splat(x.scale[g * width + p]);
            const Float correction = Lanes::mul(z, Lanes::splat(x.sum[g * width + p]));
            const Float sum = dot[p * ways].value();
            y[p] = Lanes::mul_add(s, Lanes::mul_sub(a, sum, correction), y[p]);
        }
    }
#pragma GCC unroll 16
    for (int p = 0; p < width; ++p) Lanes::store(out + 16 * p, y[p]);
}

}  // namespace
}  // namespace moepress
