// The product of a group of columns of a slab and many tokens: the group is decoded once into
// operands that lie in the first-level cache (8 or 16 KB for 128 columns), and then multiplied with
// some tokens at a time.
//
// Dot products limit the speed. A weight's value has 9 bits with its sign up to 2 bits, 10 above,
// so that a plain dot product takes two bytes for each. Two kinds of operands need one dot product
// for 4 columns:
//
//     OneByte        of 8 bits, beside activations of 8 bits (trellis_bytes.h). Above 3 bits and
//                    below 2.5 the last bits of the values are rounded.
//     CrossedWords   of 16 bits, for any values and activations, by Winograd's identity
//                    (t0 + q2) (t2 + q0) = t0 q0 + t2 q2 + t0 t2 + q0 q2. The sum of t0 t2
//                    belongs to the row, that of q0 q2 to the token (isa.h, `crossed`). All is
//                    modulo 2^32, which is exact, since the result is below 2^31. Its integers, and
//                    so its floats, are those of trellis_product.h but for averages (there).
//
// Limits and speed: docs/log.md#trellis-many, #trellis-one-byte.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "isa.h"
#include "trellis_bytes.h"
#include "trellis_code.h"
#include "trellis_tile.h"

namespace moepress {
namespace {

constexpr int kManyTokens = 8;  // from so many tokens on decoding for these operands pays
constexpr int kRuns = kSlabRows / kLaneRows;
constexpr int kQuads = kMaxGroup / 4;  // of columns, in a group

// Some registers for each 4 columns of 16 rows.
template <class Lanes, int registers>
struct ManyOperands {
    typename Lanes::Words at[kRuns / Lanes::many_runs][kQuads][Lanes::many_runs][registers];

    typename Lanes::Words* of(int run, int quad) {
        return at[run / Lanes::many_runs][quad][run % Lanes::many_runs];
    }
};

// A kind has one function for trellis_product.h:
//
//     add_group      add group g of the slab whose tiles of this group are at `from`, the tiles
//                    above at `over`. trellis_many_neon.h has another for OneByte.
//
// The others serve `add_group_to_many`.
template <class Lanes, int width, class Kind>
void add_group_to_many(const uint8_t* over, const uint8_t* from, int64_t cols, int group,
                       int64_t g, const TrellisPanel& x, typename Kind::Operands& w, float* out);

template <class Lanes, int width>
struct OneByte {
    using Code = int8_t;
    using Operands = ManyOperands<Lanes, 1>;

    static void add_group(const uint8_t* over, const uint8_t* from, int64_t cols, int group,
                          int64_t g, const TrellisPanel& x, Operands& w, float* out) {
        add_group_to_many<Lanes, width, OneByte>(over, from, cols, group, g, x, w, out);
    }

    static void begin(Operands&) {}

    static void decode(const Tile<Lanes, width>& tile, int t, Operands& out) {
        decode_bytes<Lanes, width>(tile, [&](int i, const typename Lanes::Words& bytes)
                                             MOEPRESS_INLINE_LAMBDA {
            *out.of(i / 4, 2 * t + i % 4 / 2) = bytes;
        });
    }
    static void end(Operands&) {}
    static typename Lanes::Pairs start(const Operands&, int) { return {}; }

    static void gather(const TrellisTokens& x, int64_t at, int group, int8_t* to) {
        for (int i = 0; i < group; i += 32) std::memcpy(to + i, x.bytes + at + i, 32);
    }
    static int32_t token(const TrellisTokens& x, int64_t at) { return x.sum[at]; }

    struct Operand {
        int32_t four;
    };
    static Operand operand(const int8_t* quad) {
        Operand out;
        std::memcpy(&out.four, quad, 4);
        return out;
    }
    static void add(const typename Lanes::Words* w, const Operand& x, typename Lanes::Pairs& sum) {
        sum.add_bytes(w[0], x.four);
    }
    static void finish(const typename Lanes::Pairs& sum, float a, int32_t q, float* out) {
        finish_bytes<Lanes, width>(sum, a, q, out);
    }
};

template <class Lanes, int width>
struct CrossedWords {
    using Code = int16_t;
    struct Operands : ManyOperands<Lanes, 2> {
        typename Lanes::Pairs start[kRuns];  // minus the sum of t0 t2, for each row
    };

    static void add_group(const uint8_t* over, const uint8_t* from, int64_t cols, int group,
                          int64_t g, const TrellisPanel& x, Operands& w, float* out) {
        add_group_to_many<Lanes, width, CrossedWords>(over, from, cols, group, g, x, w, out);
    }

    static void begin(Operands& out) {
        for (auto& start : out.start) start = typename Lanes::Pairs();
    }

    static void decode(const Tile<Lanes, width>& tile, int t, Operands& out) {
        typename Lanes::Words step[kSteps];
        decode_steps<Lanes, width, Form::kSums>(tile, step);
#pragma GCC unroll 8
        for (int i = 0; i < kSteps; i += 2) {
            typename Lanes::Words* to = out.of(i / 4, 2 * t + i % 4 / 2);
            to[0] = step[i];
            to[1] = step[i + 1];
            out.start[i / 4].add_words(step[i], step[i + 1]);
        }
    }
    static void end(Operands& out) {
        for (auto& start : out.start) start.negate();
    }
    static typename Lanes::Pairs start(const Operands& w, int run) { return w.start[run]; }

    static void gather(const TrellisTokens& x, int64_t at, int group, int16_t* to) {
        for (int i = 0; i < group; i += 32) std::memcpy(to + i, x.codes + at + i, 64);
    }
    static int32_t token(const TrellisTokens& x, int64_t at) {
        return int32_t(uint32_t(center_of(width) * x.sum[at]) + uint32_t(x.crossed[at]));
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
    static void finish(const typename Lanes::Pairs& sum, float a, int32_t less, float* out) {
        finish_group<Lanes>(sum, a, less, out);
    }
};

// Tokens p to count - 1 of a panel times a decoded group: `tokens` of them at a time, as long as
// there are so many, then half as many.
template <class Lanes, class Kind, int tokens>
void add_many(const typename Kind::Operands& w, int64_t cols, int group, int64_t g,
              const TrellisPanel& x, int64_t p, float* out) {
    constexpr int runs = Lanes::many_runs;
    const int quads = group / 4;
    for (; p + tokens <= x.count; p += tokens) {
        alignas(64) typename Kind::Code codes[tokens][kMaxGroup];  // at fixed distances
        float scale[tokens];
        int32_t own[tokens];
#pragma GCC unroll 8
        for (int q = 0; q < tokens; ++q) {
            const int64_t place = x.places[p + q], at = place * (cols / group) + g;
            Kind::gather(x.all, place * cols + g * group, group, codes[q]);
            scale[q] = x.all.scale[at];
            own[q] = Kind::token(x.all, at);
        }
        for (int part = 0; part < kRuns / runs; ++part) {
            typename Lanes::Pairs sum[tokens][runs];
#pragma GCC unroll 8
            for (int q = 0; q < tokens; ++q)
#pragma GCC unroll 4
                for (int r = 0; r < runs; ++r) sum[q][r] = Kind::start(w, part * runs + r);
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
                    Kind::finish(sum[q][r], scale[q], own[q],
                                 out + (p + q) * kSlabRows + 16 * (part * runs + r));
        }
    }
    if constexpr (tokens > 1)
        add_many<Lanes, Kind, tokens / 2>(w, cols, group, g, x, p, out);
}

template <class Lanes, int width, class Kind>
void add_group_to_many(const uint8_t* over, const uint8_t* from, int64_t cols, int group,
                       int64_t g, const TrellisPanel& x, typename Kind::Operands& w, float* out) {
    Kind::begin(w);
    each_tile<Lanes, width>(
        over, from, group / kTileColumns,
        [&](const Tile<Lanes, width>& tile, int t) MOEPRESS_INLINE_LAMBDA {
            Kind::decode(tile, t, w);
        });
    Kind::end(w);
    add_many<Lanes, Kind, Lanes::many_tokens>(w, cols, group, g, x, 0, out);
}

// No kind is better than trellis_product.h, `add_group`.
struct NoKind {
    struct Operands {};
};

// The kind of operands for these lanes. `crossed`: whether additions run beside dot products.
template <class Lanes, int width, bool bytes, bool crossed>
using ManyKind =
    std::conditional_t<bytes, OneByte<Lanes, width>,
                       std::conditional_t<crossed, CrossedWords<Lanes, width>, NoKind>>;

}  // namespace
}  // namespace moepress
