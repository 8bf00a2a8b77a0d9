// The product of a group of columns of a slab and several tokens with NEON, for activations of 8
// bits: the group is decoded once into bytes that lie in the first-level cache, and then multiplied
// with some tokens at a time. The integers are those of trellis_product.h, so the floats are too.
//
// A weight is two bytes: up to 2 bits those of state * multiplier, whose sum is t, next to each
// other, and each activation is there twice. Above 2 bits they are t div 4 and t mod 4, in two
// planes, one after the other: the sums of the first are multiplied by 4 before those of the second
// are added. A sum of four bytes would take four, or products of 16-bit numbers, of which NEON has
// four in an instruction.
//
//     matrices   i8mm: usmmla multiplies 8 bytes of 2 rows with those of 2 tokens
//     else       sdot multiplies 4 bytes of 4 rows with those of a token, by its place in a register
//
// Sums are kept for a block of 8 or 16 rows, times 8 or 4 tokens: 16 of 32 registers.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "isa.h"
#include "lanes_neon_dotprod.h"
#include "trellis_code.h"
#include "trellis_product.h"
#include "trellis_tile.h"

namespace moepress {
namespace {

template <class Bytes, int width>
struct ManyTokens<NeonLanes<Bytes>, width, true> {
    static constexpr bool exists = true;

    // Add group g of the slab to the products of all tokens of a panel. The tiles of the group are
    // at `from`, the tiles above at `over`.
    static void add_group(const uint8_t* over, const uint8_t* from, int64_t cols, int group,
                          int64_t g, const TrellisPanel& x, float* out) {
        Operands w;
        const int tiles = group / kTileColumns;
        each_tile<Lanes, width>(over, from, tiles, [&](const Tile<Lanes, width>& tile, int t) {
            decode(tile, t, tiles, w);
        });
        add_tokens<kTokens>(w, cols, group, g, x, 0, out);
    }

  private:
    using Lanes = NeonLanes<Bytes>;
    static constexpr bool matrices = Bytes::matrices;
    static constexpr int planes = sums_four_bytes(width) ? 2 : 1;
    static constexpr int kBlockRows = matrices ? 8 : 16;
    static constexpr int kTokens = matrices ? 8 : 4;
    static constexpr int kStepBytes = matrices ? 8 : 4;  // of a row, and of a token
    static constexpr int kMostSteps = 2 * kMaxGroup / kStepBytes;
    // Stored bytes lack an offset, of t div 4 too.
    static constexpr int kCenterOfSums =
        center_of(width) - (sums_four_bytes(width) ? 4 : 2) * Lanes::byte_offset;

    struct Operands {  // by block and step: four registers of 2 or 4 rows
        uint8x16_t at[kSlabRows / kBlockRows][kMostSteps][4];
    };

    // Decode tile t of `tiles`.
    static void decode(const Tile<Lanes, width>& tile, int t, int tiles, Operands& out) {
        typename Lanes::Words step[kSteps];
        if constexpr (planes == 1)
            decode_steps<Lanes, width, true>(tile, step);
        else
            decode_sums(tile, step);
        for (int run = 0; run < 4; ++run)
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) {  // rows 16 run + 4 v on
                const uint16x8_t four[] = {step[4 * run].part[v], step[4 * run + 1].part[v],
                                           step[4 * run + 2].part[v], step[4 * run + 3].part[v]};
                if constexpr (planes == 1) {
                    put_products(four, run, v, t, out);
                } else {
                    put_plane(Bytes::stored(narrow<2>(four[0], four[1])),
                              Bytes::stored(narrow<2>(four[2], four[3])), run, v, t, out);
                    const uint8x16_t mask = vdupq_n_u8(3);
                    put_plane(vandq_u8(narrow<0>(four[0], four[1]), mask),
                              vandq_u8(narrow<0>(four[2], four[3]), mask), run, v, tiles + t, out);
                }
            }
    }

    // Decode steps i to 15 of a tile into t.
    template <int i = 0>
    static void decode_sums(const Tile<Lanes, width>& tile, typename Lanes::Words* out) {
        out[i] = Lanes::template sums_in_order<true>(state_at<Lanes, width, i>(tile),
                                                     kMultiplier[value_bits(width, i)]);
        if constexpr (i + 1 < kSteps) decode_sums<i + 1>(tile, out);
    }

    template <int shift>
    static uint8x16_t narrow(uint16x8_t a, uint16x8_t b) {
        if constexpr (shift == 0)
            return vuzp1q_u8(vreinterpretq_u8_u16(a), vreinterpretq_u8_u16(b));
        else
            return vshrn_high_n_u16(vshrn_n_u16(a, shift), b, shift);
    }

    // The products of four rows: `four` are columns 0, 1; 2, 3; 4, 5; 6, 7 of the tile.
    static void put_products(const uint16x8_t* four, int run, int v, int t, Operands& out) {
        if constexpr (matrices)
            for (int half = 0; half < 2; ++half)
                put_rows(vreinterpretq_u32_u16(four[2 * half]),
                         vreinterpretq_u32_u16(four[2 * half + 1]), run, v, 2 * t + half, out);
        else
            for (int c = 0; c < 4; ++c) out.at[run][4 * t + c][v] = vreinterpretq_u8_u16(four[c]);
    }

    // A plane of four rows: `low` are bytes [columns 0, 1; 2, 3][4 rows][2], `high` of columns 4, 5;
    // 6, 7. A row's columns come to lie in the order 0, 1, 4, 5, 2, 3, 6, 7.
    static void put_plane(uint8x16_t low, uint8x16_t high, int run, int v, int t, Operands& out) {
        const uint16x8_t a = vreinterpretq_u16_u8(low), b = vreinterpretq_u16_u8(high);
        const uint32x4_t first = vreinterpretq_u32_u16(vzip1q_u16(a, b));
        const uint32x4_t second = vreinterpretq_u32_u16(vzip2q_u16(a, b));
        if constexpr (matrices) {
            put_rows(first, second, run, v, t, out);
        } else {
            out.at[run][2 * t][v] = vreinterpretq_u8_u32(first);
            out.at[run][2 * t + 1][v] = vreinterpretq_u8_u32(second);
        }
    }

    // Four rows of 4 bytes, and their next 4.
    static void put_rows(uint32x4_t first, uint32x4_t second, int run, int v, int step,
                         Operands& out) {
        uint8x16_t* to = &out.at[2 * run + v / 2][step][v % 2 * 2];
        to[0] = vreinterpretq_u8_u32(vzip1q_u32(first, second));
        to[1] = vreinterpretq_u8_u32(vzip2q_u32(first, second));
    }

    // A token's activations in the order of the operands, group * 2 / planes bytes.
    static void gather(const int16_t* codes, int group, int8_t* to) {
        if constexpr (planes == 1) {
            std::memcpy(to, codes, size_t(2 * group));
        } else {
            alignas(16) static constexpr uint8_t order[16] = {0,  2,  8,  10, 4,  6,  12, 14,
                                                              16, 18, 24, 26, 20, 22, 28, 30};
            const uint8x16_t index = vld1q_u8(order);
            const uint8_t* bytes = reinterpret_cast<const uint8_t*>(codes);
            for (int i = 0; i < group; i += 16) {
                const uint8x16x2_t both = {{vld1q_u8(bytes + 2 * i), vld1q_u8(bytes + 2 * i + 16)}};
                vst1q_s8(to + i, vreinterpretq_s8_u8(vqtbl2q_u8(both, index)));
            }
        }
    }

    // Tokens p to count - 1: `tokens` of them at a time, as long as there are so many, then half as
    // many. With matrices the last may be alone.
    template <int tokens>
    static void add_tokens(const Operands& w, int64_t cols, int group, int64_t g,
                           const TrellisPanel& x, int64_t p, float* out) {
        constexpr int least = matrices ? 2 : 1;
        constexpr int needed = tokens == least ? 1 : tokens;
        for (; p + needed <= x.count; p += tokens) {
            const int here = x.count - p < tokens ? int(x.count - p) : tokens;
            alignas(64) int8_t codes[tokens][2 * kMaxGroup];
            float scale[tokens];
            int32_t less[tokens];
            for (int q = 0; q < here; ++q) {
                const int64_t place = x.places[p + q], at = place * (cols / group) + g;
                gather(x.all.codes + place * cols + g * group, group, codes[q]);
                scale[q] = x.all.scale[at];
                less[q] = kCenterOfSums * x.all.sum[at];
            }
            if (here < tokens) std::memset(codes[tokens - 1], 0, sizeof codes[0]);
            float* to = out + p * kSlabRows;
            if constexpr (matrices)
                add_matrices<tokens>(w, codes, group, scale, less, here, to);
            else
                add_dots<tokens>(w, codes, group, scale, less, to);
        }
        if constexpr (tokens > least) add_tokens<tokens / 2>(w, cols, group, g, x, p, out);
    }

    template <int tokens>
    static void add_matrices(const Operands& w, const int8_t (*codes)[2 * kMaxGroup], int group,
                             const float* scale, const int32_t* less, int here, float* out) {
        const int steps = group / (4 * planes);  // of a plane
        int8x16_t x[kMostSteps / planes][tokens / 2];
        for (int k = 0; k < steps; ++k)
            for (int q = 0; q < tokens / 2; ++q)
                x[k][q] = vcombine_s8(vld1_s8(codes[2 * q] + 8 * k),
                                      vld1_s8(codes[2 * q + 1] + 8 * k));
        for (int block = 0; block < kSlabRows / 8; ++block) {
            int32x4_t sum[4][tokens / 2];  // [2 rows][2 tokens]
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j)
#pragma GCC unroll 4
                for (int q = 0; q < tokens / 2; ++q) sum[j][q] = vdupq_n_s32(0);
            for (int plane = 0; plane < planes; ++plane) {
                if (plane == 1)
#pragma GCC unroll 4
                    for (auto& row : sum)
#pragma GCC unroll 4
                        for (int q = 0; q < tokens / 2; ++q) row[q] = vshlq_n_s32(row[q], 2);
                for (int k = 0; k < steps; ++k) {
                    const auto& a = w.at[block][plane * steps + k];
#pragma GCC unroll 4
                    for (int j = 0; j < 4; ++j)
#pragma GCC unroll 4
                        for (int q = 0; q < tokens / 2; ++q)
                            sum[j][q] = Bytes::matrix(sum[j][q], a[j], x[k][q]);
                }
            }
#pragma GCC unroll 4
            for (int q = 0; q < tokens / 2; ++q)
#pragma GCC unroll 2
                for (int j = 0; j < 4; j += 2) {
                    float* to = out + 2 * q * kSlabRows + 8 * block + 2 * j;
                    finish(vuzp1q_s32(sum[j][q], sum[j + 1][q]), scale[2 * q], less[2 * q], to);
                    if (2 * q + 1 < here)
                        finish(vuzp2q_s32(sum[j][q], sum[j + 1][q]), scale[2 * q + 1],
                               less[2 * q + 1], to + kSlabRows);
                }
        }
    }

    template <int tokens>
    static void add_dots(const Operands& w, const int8_t (*codes)[2 * kMaxGroup], int group,
                         const float* scale, const int32_t* less, float* out) {
        const int steps = group / (2 * planes);  // of a plane
        for (int block = 0; block < kSlabRows / 16; ++block) {
            int32x4_t sum[4][tokens];  // [4 rows]
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j)
#pragma GCC unroll 4
                for (int q = 0; q < tokens; ++q) sum[j][q] = vdupq_n_s32(0);
            for (int plane = 0; plane < planes; ++plane) {
                if (plane == 1)
#pragma GCC unroll 4
                    for (auto& row : sum)
#pragma GCC unroll 4
                        for (int q = 0; q < tokens; ++q) row[q] = vshlq_n_s32(row[q], 2);
                for (int k = 0; k < steps; k += 4) {
                    const auto* a = w.at[block] + plane * steps + k;
                    int8x16_t x[tokens];
#pragma GCC unroll 4
                    for (int q = 0; q < tokens; ++q) x[q] = vld1q_s8(codes[q] + 4 * k);
                    add_step<tokens, 0>(a[0], x, sum);
                    add_step<tokens, 1>(a[1], x, sum);
                    add_step<tokens, 2>(a[2], x, sum);
                    add_step<tokens, 3>(a[3], x, sum);
                }
            }
#pragma GCC unroll 4
            for (int q = 0; q < tokens; ++q)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j)
                    finish(sum[j][q], scale[q], less[q],
                           out + q * kSlabRows + 16 * block + 4 * j);
        }
    }

    template <int tokens, int lane>
    static void add_step(const uint8x16_t* a, const int8x16_t* x, int32x4_t (*sum)[tokens]) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
#pragma GCC unroll 4
            for (int q = 0; q < tokens; ++q)
                sum[j][q] =
                    vdotq_laneq_s32(sum[j][q], vreinterpretq_s8_u8(a[j]), x[q], lane);
    }

    // out [4] += a (sum - less)
    static void finish(int32x4_t sum, float a, int32_t less, float* out) {
        const float32x4_t value = vcvtq_f32_s32(vsubq_s32(sum, vdupq_n_s32(less)));
        vst1q_f32(out, vfmaq_f32(vld1q_f32(out), vdupq_n_f32(a), value));
    }
};

}  // namespace
}  // namespace moepress
