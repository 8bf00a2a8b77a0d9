// The vectors of Viterbi's algorithm (viterbi_tiles.h) with NEON: 8 costs. viterbi_avx512.h says
// which instructions there are on x86.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "trellis_code.h"
#include "viterbi.h"
#include "viterbi_tiles.h"

namespace moepress {
namespace {

// `far`: whether a distance may be -2^15.
template <bool far>
struct NeonCosts {
    static constexpr int width = 8;

    static uint16x8_t splat(int16_t target) { return vdupq_n_u16(uint16_t(target)); }

    // `count` costs, repeated until the vector is full.
    template <int count>
    static uint16x8_t repeat(const uint16_t* at) {
        if constexpr (count == 8) return vld1q_u16(at);
        if constexpr (count == 4) {
            const uint16x4_t four = vld1_u16(at);
            return vcombine_u16(four, four);
        }
        if constexpr (count == 2) {
            uint32_t pair;
            std::memcpy(&pair, at, sizeof pair);
            return vreinterpretq_u16_u32(vdupq_n_u32(pair));
        }
        if constexpr (count == 1) return vld1q_dup_u16(at);
    }

    static uint16x8_t load(const int16_t* at) { return vreinterpretq_u16_s16(vld1q_s16(at)); }
    static uint16x8_t minus_to_limit(uint16x8_t a, uint16x8_t b) {
        return vreinterpretq_u16_s16(
            vqsubq_s16(vreinterpretq_s16_u16(a), vreinterpretq_s16_u16(b)));
    }
    // The rounded square. That of -2^15 should be 2^15, but saturates 1 below.
    static uint16x8_t square(uint16x8_t distance) {
        const int16x8_t d = vreinterpretq_s16_u16(distance);
        const uint16x8_t rounded = vreinterpretq_u16_s16(vqrdmulhq_s16(d, d));
        if constexpr (!far) return rounded;
        return vsubq_u16(rounded, vceqq_s16(d, vdupq_n_s16(INT16_MIN)));
    }
    static uint16x8_t plus(uint16x8_t a, uint16x8_t b) { return vaddq_u16(a, b); }
    static uint16x8_t plus_to_limit(uint16x8_t a, uint16x8_t b) { return vqaddq_u16(a, b); }
    static uint16x8_t least(uint16x8_t a, uint16x8_t b) { return vminq_u16(a, b); }
    static uint16x8_t any(uint16x8_t a, uint16x8_t b, uint16x8_t c) {
        return vorrq_u16(a, vorrq_u16(b, c));
    }
    static bool no_high_bit(uint16x8_t a) { return vmaxvq_u16(a) < 1 << 15; }

    // Store the 16 sums of a tile by c, then by branch. Branches 2 i and 2 i + 1 are neighbours
    // after the first interleaving. With p the pairs of branches, `low` and `high` hold
    //
    //     bits 1   c 0 to 3                    c 4 to 7
    //     bits 2   p 0, c 0 to 3               p 1, c 0 to 3
    //     bits 3   p 0, c 0, 1; p 1, c 0, 1    p 2, c 0, 1; p 3, c 0, 1
    //     bits 4   p 0 to 3                    p 4 to 7
    template <int bits>
    static void store(uint16x8_t even, uint16x8_t odd, uint16_t* next) {
        uint32x4_t low = vreinterpretq_u32_u16(vzip1q_u16(even, odd));
        uint32x4_t high = vreinterpretq_u32_u16(vzip2q_u16(even, odd));
        if constexpr (bits == 2) {
            const uint32x4_t first = vzip1q_u32(low, high);
            high = vzip2q_u32(low, high);
            low = first;
        }
        if constexpr (bits == 3) {
            const uint32x4_t first = vuzp1q_u32(low, high);
            high = vuzp2q_u32(low, high);
            low = first;
        }
        vst1q_u16(next, vreinterpretq_u16_u32(low));
        vst1q_u16(next + 8, vreinterpretq_u16_u32(high));
    }
};

struct NeonSearch {
    // Half of all targets are so large that no value is 2^15 above them.
    template <int width, int phase>
    static bool step(const uint16_t* best, int16_t target, bool small, uint16_t* next) {
        return target > largest_value<width, phase>() + INT16_MIN
                   ? TileSearch<NeonCosts<false>>::step<width, phase>(best, target, small, next)
                   : TileSearch<NeonCosts<true>>::step<width, phase>(best, target, small, next);
    }

    template <int bits>
    static void trace(const uint16_t* best, const int16_t* target, int end, uint16_t* states) {
        moepress::trace<bits, 0, kStride[bits]>(best, target, end, states);
    }

  private:
    template <int width, int phase>
    static constexpr int largest_value() {
        constexpr int largest = [] {
            int most = INT16_MIN;
            for (int s = 0; s < kStates; ++s)
                if (const int v = value_in_steps<width, phase>(s); v > most) most = v;
            return most;
        }();
        return largest;
    }
};

}  // namespace
}  // namespace moepress
