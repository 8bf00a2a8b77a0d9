// `Lanes` for 64-bit ARM with i8mm (Apple since M2, AWS Graviton3, Arm Neoverse V1 and N2): those of
// lanes_neon_dotprod.h with dot products of unsigned bytes and signed activations, as on x86.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "lanes_neon_dotprod.h"

namespace moepress {
namespace {

struct UnsignedBytes {
    static constexpr int offset = 0;
    static constexpr bool matrices = true;
    static uint8x16_t stored(uint8x16_t bytes) { return bytes; }
    static uint8x16_t averages(uint8x16_t a, uint8x16_t b) { return vrhaddq_u8(a, b); }
    static int32x4_t dot(int32x4_t sum, uint8x16_t bytes, int8x16_t x) {
        return vusdotq_s32(sum, bytes, x);
    }
    // Sums [2 rows][2 tokens] += bytes [2 rows][8] times activations [2 tokens][8].
    static int32x4_t matrix(int32x4_t sum, uint8x16_t bytes, int8x16_t x) {
        return vusmmlaq_s32(sum, bytes, x);
    }
};

using NeonI8mmLanes = NeonLanes<UnsignedBytes>;

}  // namespace
}  // namespace moepress
