// The product of a group of columns of a slab and many tokens with NEON, for activations of 8 bits:
// the group is decoded once into bytes that lie in the first-level cache (trellis_bytes.h), and then
// multiplied with some tokens at a time.
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
#include "trellis_bytes.h"
#include "trellis_code.h"
#include "trellis_many.h"
#include "trellis_tile.h"

namespace moepress {
namespace {

template <class Bytes, int width>
struct OneByte<NeonLanes<Bytes>, width> {
  private:
    using Lanes = NeonLanes<Bytes>;
    static constexpr bool matrices = Bytes::matrices;
    static constexpr int kBlockRows = matrices ? 8 : 16;
    static constexpr int kTokens = matrices ? 8 : 4;
    static constexpr int kStepBytes = matrices ? 8 : 4;  // of a row, and of a token
    static constexpr int kMostSteps = kMaxGroup / kStepBytes;

  public:
    struct Operands {  // by block and step: four registers of 2 or 4 rows
        uint8x16_t at[kSlabRows / kBlockRows][kMostSteps][4];
    };

    static void add_group(const uint8_t* over, const uint8_t* from, int64_t cols, int group,
                          int64_t g, const TrellisPanel& x, Operands& w, float* out) {
        each_tile<Lanes, width>(over, from, group / kTileColumns,
                                [&](const Tile<Lanes, width>& tile, int t) { decode(tile, t, w); });
        add_tokens<kTokens>(w, cols, group, g, x, 0, out);
    }

  private:
    static void decode(const Tile<Lanes, width>& tile, int t, Operands& out) {
        typename Lanes::Words step[kSteps];
        if constexpr (sums_four_bytes(width))
            decode_sums(tile, step);
        else
            decode_steps<Lanes, width, Form::kProducts>(tile, step);
        for (int run = 0; run < 4; ++run)
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) {  // rows 16 run + 4 v on
                const uint8x16_t first = bytes_of(step + 4 * run, v);
                const uint8x16_t second = bytes_of(step + 4 * run + 2, v);
                if constexpr (matrices) {
                    uint8x16_t* to = &out.at[2 * run + v / 2][t][v % 2 * 2];
                    const uint32x4_t low = vreinterpretq_u32_u8(first);
                    const uint32x4_t high = vreinterpretq_u32_u8(second);
                    to[0] = vreinterpretq_u8_u32(vzip1q_u32(low, high));
                    to[1] = vreinterpretq_u8_u32(vzip2q_u32(low, high));
                } else {
                    out.at[run][2 * t][v] = first;
                    out.at[run][2 * t + 1][v] = second;
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

    // Four rows of two steps.
    static uint8x16_t bytes_of(const typename Lanes::Words* step, int v) {
        if constexpr (sums_four_bytes(width))
            return Lanes::thirds(step[0].part[v], step[1].part[v]);
        else
            return Lanes::halves(step[0].part[v], step[1].part[v]);
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
            alignas(64) int8_t codes[tokens][kMaxGroup];
            float scale[tokens];
            int32_t activations[tokens];  // their sums
            for (int q = 0; q < here; ++q) {
                const int64_t place = x.places[p + q], at = place * (cols / group) + g;
                std::memcpy(codes[q], x.all.bytes + place * cols + g * group, size_t(group));
                scale[q] = x.all.scale[at];
                activations[q] = x.all.sum[at];
            }
            if (here < tokens) std::memset(codes[tokens - 1], 0, sizeof codes[0]);
            float* to = out + p * kSlabRows;
            if constexpr (matrices)
                add_matrices<tokens>(w, codes, group, scale, activations, here, to);
            else
                add_dots<tokens>(w, codes, group, scale, activations, to);
        }
        if constexpr (tokens > least) add_tokens<tokens / 2>(w, cols, group, g, x, p, out);
    }

    template <int tokens>
    static void add_matrices(const Operands& w, const int8_t (*codes)[kMaxGroup], int group,
                             const float* scale, const int32_t* activations, int here, float* out) {
        const int steps = group / kStepBytes;
        int8x16_t x[kMostSteps][tokens / 2];
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
            for (int k = 0; k < steps; ++k) {
                const auto& a = w.at[block][k];
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j)
#pragma GCC unroll 4
                    for (int q = 0; q < tokens / 2; ++q)
                        sum[j][q] = Bytes::matrix(sum[j][q], a[j], x[k][q]);
            }
#pragma GCC unroll 4
            for (int q = 0; q < tokens / 2; ++q)
#pragma GCC unroll 2
                for (int j = 0; j < 4; j += 2) {
                    float* to = out + 2 * q * kSlabRows + 8 * block + 2 * j;
                    finish(vuzp1q_s32(sum[j][q], sum[j + 1][q]), scale[2 * q],
                           activations[2 * q], to);
                    if (2 * q + 1 < here)
                        finish(vuzp2q_s32(sum[j][q], sum[j + 1][q]), scale[2 * q + 1],
                               activations[2 * q + 1], to + kSlabRows);
                }
        }
    }

    template <int tokens>
    static void add_dots(const Operands& w, const int8_t (*codes)[kMaxGroup], int group,
                         const float* scale, const int32_t* activations, float* out) {
        const int steps = group / kStepBytes;
        for (int block = 0; block < kSlabRows / 16; ++block) {
            int32x4_t sum[4][tokens];  // [4 rows]
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j)
#pragma GCC unroll 4
                for (int q = 0; q < tokens; ++q) sum[j][q] = vdupq_n_s32(0);
            for (int k = 0; k < steps; k += 4) {
                const auto* a = w.at[block] + k;
                int8x16_t x[tokens];
#pragma GCC unroll 4
                for (int q = 0; q < tokens; ++q) x[q] = vld1q_s8(codes[q] + 4 * k);
                add_step<tokens, 0>(a[0], x, sum);
                add_step<tokens, 1>(a[1], x, sum);
                add_step<tokens, 2>(a[2], x, sum);
                add_step<tokens, 3>(a[3], x, sum);
            }
#pragma GCC unroll 4
            for (int q = 0; q < tokens; ++q)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j)
                    finish(sum[j][q], scale[q], activations[q],
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

    // As finish_bytes, for 4 rows. Stored bytes lack an offset.
    static void finish(int32x4_t sum, float a, int32_t q, float* out) {
        constexpr int unit = byte_unit(width);
        constexpr int less = byte_center(width) - unit * Lanes::byte_offset;
        const float32x4_t value = vcvtq_f32_s32(vmlaq_n_s32(vdupq_n_s32(-less * q), sum, unit));
        vst1q_f32(out, vfmaq_f32(vld1q_f32(out), vdupq_n_f32(a * byte_share(width)), value));
    }
};

}  // namespace
}  // namespace moepress
