// The product of a slab, 64 rows of a trellis matrix, and a panel of tokens. Written once over
// `Lanes` (lanes_portable.h lists what it has to provide) and instantiated for each instruction
// set.
//
// A weight's value is a sum t of bytes of state * multiplier, minus a center z. With the scale s of
// a row, and activations x = a q in codes q of 8 or 15 bits:
//
//     y = s sum over groups of  a (sum(t q) - z sum(q))
//
// The difference in parentheses is an exact integer: sum(t q) is at most 751 * 16256 * 128 < 2^31.
//
// What t is to a dot product depends on the bits of q and on the instruction set (`Form`,
// trellis_tile.h):
//
//     15 bits                           t, a 16-bit number
//     8 bits, up to 2 bits of width     the two bytes that t sums, beside a q that the panel holds
//                                       twice, where the instruction set sums products of any bytes
//                                       (lanes_portable.h, sums_any_byte); else t
//     8 bits, above                     averages of two bytes, two of them for t: one dot product,
//                                       where all four bytes would take two. Bytes or, else, their
//                                       sum. It changes a value by up to 1, the standard deviation
//                                       of the values being 126: docs/log.md#trellis-averages
//
// trellis_tile.h decodes. A step is multiplied with the activations of its two columns, summed in 32
// bits; panels of kManyTokens tokens and more are left to trellis_many.h. With bytes a step takes 4
// instructions for each register at 2 bits (window, mask, product, dot product) and 6 above: 32
// weights in a register of 512 bits, 16 in one of 256 bits. Speed: docs/log.md#trellis-bytes.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "isa.h"
#include "trellis_code.h"
#include "trellis_many.h"
#include "trellis_tile.h"

namespace moepress {
namespace {

// The form of few tokens; `precise`: q has 15 bits.
template <class Lanes, int width, bool precise>
constexpr Form few_form() {
    if (precise) return Form::kSums;
    if (sums_four_bytes(width)) return Lanes::sums_any_byte ? Form::kAverages : Form::kAverageSums;
    return Lanes::sums_any_byte ? Form::kProducts : Form::kSums;
}

constexpr bool averages(Form form) { return form == Form::kAverages || form == Form::kAverageSums; }
constexpr bool has_bytes(Form form) { return form == Form::kProducts || form == Form::kAverages; }

// Add a step times the codes of its two columns.
template <Form form, class Pairs, class Words>
MOEPRESS_INLINE void add_step(const Words& step, int32_t pair, Pairs& sum) {
    if constexpr (has_bytes(form))
        sum.add_bytes(step, pair);
    else
        sum.add(step, pair);
}

// One token: add the products of steps i to 15 of a tile to the sums of the four runs of 16 rows.
// `x` are the codes of the tile's 8 columns.
template <class Lanes, int width, Form form, int i = 0>
MOEPRESS_INLINE void add_steps(const Tile<Lanes, width>& tile, const int16_t* x,
                               typename Lanes::Pairs* sum) {
    int32_t pair;
    std::memcpy(&pair, x + 2 * (i % 4), 4);
    add_step<form>(step_at<Lanes, width, form, i>(tile), pair, sum[i / 4]);
    if constexpr (i + 1 < kSteps) add_steps<Lanes, width, form, i + 1>(tile, x, sum);
}

// out [16] += a (sum of unit t q - center sum(q)). With averages the unit is 2, and z one more for
// what they add in the mean; bytes may be stored less an offset.
template <class Lanes, int width, Form form>
MOEPRESS_INLINE void finish_few(typename Lanes::Pairs sum, float a, int32_t q, float* out) {
    constexpr int unit = averages(form) ? 2 : 1;
    constexpr int stored = has_bytes(form) ? 2 * unit * Lanes::byte_offset : 0;
    if constexpr (unit == 2) sum.template multiply<2>();
    finish_group<Lanes>(sum, a, (center_of(width) + (unit - 1) - stored) * q, out);
}

// A group of columns, times tokens p to count - 1 of a panel: `tokens` of them at a time, as long
// as there are so many, then half as many. Several tokens and runs of 16 rows together, so that
// each decoded register and each pair of activations is loaded for several products.
template <class Lanes, int width, Form form, int tokens>
void add_group(const typename Lanes::Words* decoded, int64_t cols, int group, int64_t g,
               const TrellisPanel& x, int64_t p, float* out) {
    constexpr int runs = tokens < Lanes::tokens ? 4 : Lanes::runs;
    const int tiles = group / kTileColumns;
    for (; p + tokens <= x.count; p += tokens) {
        const int16_t* codes[tokens];
        for (int q = 0; q < tokens; ++q)
            codes[q] = x.all.codes + x.places[p + q] * cols + g * group;
        for (int run = 0; run < 4; run += runs) {
            typename Lanes::Pairs sum[tokens][runs];
            for (int t = 0; t < tiles; ++t)
#pragma GCC unroll 4
                for (int c = 0; c < 4; ++c) {
                    const typename Lanes::Words* w = decoded + t * kSteps + 4 * run + c;
#pragma GCC unroll 4
                    for (int q = 0; q < tokens; ++q) {
                        int32_t pair;
                        std::memcpy(&pair, codes[q] + t * kTileColumns + 2 * c, 4);
#pragma GCC unroll 4
                        for (int r = 0; r < runs; ++r) add_step<form>(w[4 * r], pair, sum[q][r]);
                    }
                }
            for (int q = 0; q < tokens; ++q) {
                const int64_t at = x.places[p + q] * (cols / group) + g;
                for (int r = 0; r < runs; ++r)
                    finish_few<Lanes, width, form>(sum[q][r], x.all.scale[at], x.all.sum[at],
                                                   out + (p + q) * kSlabRows + 16 * (run + r));
            }
        }
    }
    if constexpr (tokens > 1)
        add_group<Lanes, width, form, tokens / 2>(decoded, cols, group, g, x, p, out);
}

// out [count][64] *= the scales of the rows.
template <class Lanes>
void scale_rows(const uint8_t* scales, int64_t count, float* out) {
    for (int run = 0; run < 4; ++run) {
        const typename Lanes::Float s = Lanes::bfloat16(scales + 32 * run);
        for (int64_t p = 0; p < count; ++p) {
            float* at = out + p * kSlabRows + 16 * run;
            Lanes::store(at, Lanes::mul(s, Lanes::load_floats(at)));
        }
    }
}

constexpr int kWordsAhead = 8192;  // bytes to prefetch ahead, see kCodesAhead in scalar_product.h

// `precise`: codes have 15 bits, else 8. `crossed`: see ManyKind.
template <class Lanes, int width, bool precise, bool crossed>
void trellis_dot(const uint8_t* above, const uint8_t* slab, int64_t cols, int group,
                 const TrellisPanel& panel, const uint8_t* scales, float* out) {
    const TrellisPanel x = panel;  // a copy: stores to `out` might alias the reference
    constexpr Form form = few_form<Lanes, width, precise>();
    const int tiles = group / kTileColumns;
    const int64_t groups = cols / group;
    for (int64_t i = 0; i < x.count * kSlabRows; ++i) out[i] = 0;
    using Many = ManyKind<Lanes, width, !precise && Lanes::sums_any_byte, crossed>;
    union Operands {
        typename Lanes::Words decoded[kMaxGroup / kTileColumns * kSteps];
        typename Many::Operands many;
        Operands() {}
    } operands;
    typename Lanes::Words* const decoded = operands.decoded;
    for (int64_t g = 0; g < groups; ++g) {
        const uint8_t* from = slab + tiles_bytes(width, g * tiles);
        const uint8_t* over = above + tiles_bytes(width, g * tiles);
        if (x.count == 1) {
            const int16_t* codes = x.all.codes + x.places[0] * cols + g * group;
            typename Lanes::Pairs sum[4];
            each_tile<Lanes, width>(
                over, from, tiles,
                [&](const Tile<Lanes, width>& tile, int t) MOEPRESS_INLINE_LAMBDA {
                    constexpr int ahead = int(tiles_bytes(width, 2) / 2);  // of a tile
#pragma GCC unroll 4
                    for (int j = 0; j < ahead; j += 64)
                        Lanes::prefetch(from + t * ahead + j + kWordsAhead);
                    add_steps<Lanes, width, form>(tile, codes + t * kTileColumns, sum);
                });
            const int64_t at = x.places[0] * groups + g;
            for (int run = 0; run < 4; ++run)
                finish_few<Lanes, width, form>(sum[run], x.all.scale[at], x.all.sum[at],
                                               out + 16 * run);
            continue;
        }
        if constexpr (!std::is_same_v<Many, NoKind>) {
            if (x.count >= kManyTokens) {
                Many::add_group(over, from, cols, group, g, x, operands.many, out);
                continue;
            }
        }
        each_tile<Lanes, width>(
            over, from, tiles,
            [&](const Tile<Lanes, width>& tile, int t) MOEPRESS_INLINE_LAMBDA {
                decode_steps<Lanes, width, form>(tile, decoded + t * kSteps);
            });
        add_group<Lanes, width, form, Lanes::tokens>(decoded, cols, group, g, x, 0, out);
    }
    scale_rows<Lanes>(scales, x.count, out);
}

template <class Lanes, bool crossed = Lanes::crosses, int... width>
constexpr void set_trellis_dots(Isa& isa, std::integer_sequence<int, width...>) {
    ((isa.trellis_dot[0][width] =
          trellis_dot<Lanes, width, false, crossed && !Lanes::sums_any_byte>), ...);
    // The same function where neither form nor kind depends on the bits of the codes.
    ((isa.trellis_dot[1][width] =
          trellis_dot<Lanes, width, Lanes::sums_any_byte || sums_four_bytes(width), crossed>), ...);
}

}  // namespace
}  // namespace moepress
