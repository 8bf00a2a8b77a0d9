// The product of a group of columns of a slab and many tokens: the group is decoded once into
// operands that lie in the first-level cache (16 KB for 128 columns), and then multiplied with some
// tokens at a time. The integers are those of trellis_product.h, so the floats are too.
//
// Dot products limit the speed. A weight's value has 9 bits with its sign up to 2 bits, 10 above,
// so that a plain dot product takes two bytes for each. Two kinds of operands need one dot
// product for 4 columns where the plain way needs two, and instructions that run beside it:
//
//     MagnitudeBytes for values of at most 255: the magnitude v is one operand; the other is
//                    q xor f, where f is 0 or, for a negative value, all ones. q xor -1 = -q - 1,
//                    so that the sum is sum(+-v q) - sum over negative values of v; the last sum
//                    belongs to the row.
//     CrossedWords   of 16 bits, for any values and activations, by Winograd's identity
//                    (t0 + q2) (t2 + q0) = t0 q0 + t2 q2 + t0 t2 + q0 q2. The sum of t0 t2
//                    belongs to the row, that of q0 q2 to the token (isa.h, `crossed`). All is
//                    modulo 2^32, which is exact, since the result is below 2^31.
//
// Limits and speed: docs/log.md#trellis-many.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "isa.h"
#include "trellis_code.h"
#include "trellis_tile.h"

namespace moepress {
namespace {

constexpr int kManyTokens = 8;  // from so many tokens on decoding for these operands pays
constexpr int kRuns = kSlabRows / kLaneRows;
constexpr int kQuads = kMaxGroup / 4;  // of columns, in a group

// Two registers for each 4 columns of 16 rows, and the sums to start from: minus what the products
// of the operands hold too many of, for each row.
template <class Lanes>
struct ManyOperands {
    typename Lanes::Words at[kRuns / Lanes::many_runs][kQuads][Lanes::many_runs][2];
    typename Lanes::Pairs start[kRuns];

    typename Lanes::Words* of(int run, int quad) {
        return at[run / Lanes::many_runs][quad][run % Lanes::many_runs];
    }
};

template <class Lanes, int width>
struct MagnitudeBytes {
    static_assert(center_of(width) == 255);  // byte0 + byte1 - 255 = byte0 - (255 - byte1)
    using Code = int8_t;

    static void decode(const typename Lanes::Words* step, int run, int quad,
                       ManyOperands<Lanes>& out) {
        Lanes::signed_bytes(step[0], step[1], out.of(run, quad), out.start[run]);
    }
    static void finish_start(typename Lanes::Pairs&) {}

    static void gather(const TrellisTokens& x, int64_t at, int group, int8_t* to) {
        for (int i = 0; i < group; i += 32) std::memcpy(to + i, x.bytes + at + i, 32);
    }
    static int32_t correction(const TrellisPanel&, int64_t) { return 0; }

    struct Operand {
        typename Lanes::Words x;
    };
    static Operand operand(const int8_t* quad) {
        int32_t four;
        std::memcpy(&four, quad, 4);
        return {Lanes::splat_four(four)};
    }
    static void add(const typename Lanes::Words* w, const Operand& x, typename Lanes::Pairs& sum) {
        sum.add_signed(w[0], w[1], x.x);
    }
};

template <class Lanes, int width, bool twice>
struct CrossedWords {
    using Code = int16_t;

    static void decode(const typename Lanes::Words* step, int run, int quad,
                       ManyOperands<Lanes>& out) {
        typename Lanes::Words* to = out.of(run, quad);
        to[0] = step[0];
        to[1] = step[1];
        out.start[run].add_words(step[0], step[1]);
    }
    static void finish_start(typename Lanes::Pairs& start) { start.negate(); }

    // Codes that are there twice, in both bytes, become 16-bit numbers.
    static void gather(const TrellisTokens& x, int64_t at, int group, int16_t* to) {
        const int16_t* from = x.codes + at;
        for (int i = 0; i < group; ++i) to[i] = twice ? int16_t(from[i] >> 8) : from[i];
    }
    static int32_t correction(const TrellisPanel& x, int64_t at) {
        return int32_t(uint32_t(center_of(width) * x.all.sum[at]) + uint32_t(x.all.crossed[at]));
    }

    struct Operand {
        typename Lanes::Words first, second;
    };
    static Operand operand(const int16_t* quad) {
        int32_t first, second;
        std::memcpy(&first, quad, 4);
        std::memcpy(&second, quad + 2, 4);
        return {Lanes::splat_four(first), Lanes::splat_four(second)};
    }
    static void add(const typename Lanes::Words* w, const Operand& x, typename Lanes::Pairs& sum) {
        sum.add_words(Lanes::add_words(w[0], x.second), Lanes::add_words(w[1], x.first));
    }
};

// Tokens p to count - 1 of a panel times a decoded group: `tokens` of them at a time, as long as
// there are so many, then half as many.
template <class Lanes, class Kind, int tokens>
void add_many(const ManyOperands<Lanes>& w, int64_t cols, int group, int64_t g,
              const TrellisPanel& x, int64_t p, float* out) {
    constexpr int runs = Lanes::many_runs;
    const int quads = group / 4;
    for (; p + tokens <= x.count; p += tokens) {
        alignas(64) typename Kind::Code codes[tokens][kMaxGroup];  // at fixed distances
        float scale[tokens];
        int32_t less[tokens];
#pragma GCC unroll 8
        for (int q = 0; q < tokens; ++q) {
            const int64_t place = x.places[p + q], at = place * (cols / group) + g;
            Kind::gather(x.all, place * cols + g * group, group, codes[q]);
            scale[q] = x.all.scale[at];
            less[q] = Kind::correction(x, at);
        }
        for (int part = 0; part < kRuns / runs; ++part) {
            typename Lanes::Pairs sum[tokens][runs];
#pragma GCC unroll 8
            for (int q = 0; q < tokens; ++q)
#pragma GCC unroll 4
                for (int r = 0; r < runs; ++r) sum[q][r] = w.start[part * runs + r];
            for (int quad = 0; quad < quads; ++quad) {
                const auto& from = w.at[part][quad];
#pragma GCC unroll 8
                for (int q = 0; q < tokens; ++q) {
                    const auto operand = Kind::operand(codes[q] + 4 * quad);
#pragma GCC unroll 4
                    for (int r = 0; r < runs; ++r) Kind::add(from[r], operand, sum[q][r]);
                }
            }
#pragma GCC unroll 8
            for (int q = 0; q < tokens; ++q)
#pragma GCC unroll 4
                for (int r = 0; r < runs; ++r)
                    finish_group<Lanes>(sum[q][r], scale[q], less[q],
                                        out + (p + q) * kSlabRows + 16 * (part * runs + r));
        }
    }
    if constexpr (tokens > 1)
        add_many<Lanes, Kind, tokens / 2>(w, cols, group, g, x, p, out);
}

// The kind of operands that is best for these lanes and code bits; void: none is better than
// trellis_product.h, `add_group`.
template <class Lanes, int width, bool bytes, bool crossed>
using BestKind = std::conditional_t<
    bytes && !sums_four_bytes(width) && Lanes::many_tokens != 0, MagnitudeBytes<Lanes, width>,
    std::conditional_t<crossed && Lanes::many_tokens != 0, CrossedWords<Lanes, width, bytes>, void>>;

// Add group g of the slab whose tiles of this group are at `from`, the tiles above at `over`.
template <class Lanes, int width, class Kind>
void add_group_to_many(const uint8_t* over, const uint8_t* from, int64_t cols, int group,
                       int64_t g, const TrellisPanel& x, ManyOperands<Lanes>& w, float* out) {
    for (auto& start : w.start) start = typename Lanes::Pairs();
    each_tile<Lanes, width>(
        over, from, group / kTileColumns,
        [&](const Tile<Lanes, width>& tile, int t) MOEPRESS_INLINE_LAMBDA {
            typename Lanes::Words step[kSteps];
            decode_steps<Lanes, width, std::is_same_v<Kind, MagnitudeBytes<Lanes, width>>>(tile,
                                                                                          step);
#pragma GCC unroll 8
            for (int i = 0; i < kSteps; i += 2)
                Kind::decode(step + i, i / 4, 2 * t + i % 4 / 2, w);
        });
    for (auto& start : w.start) Kind::finish_start(start);
    add_many<Lanes, Kind, Lanes::many_tokens>(w, cols, group, g, x, 0, out);
}

}  // namespace
}  // namespace moepress
