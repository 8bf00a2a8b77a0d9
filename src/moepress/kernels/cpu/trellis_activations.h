// Rotating and rounding a token's activations for products with trellis matrices (isa.h,
// TrellisTokens). Internal linkage: each instruction set compiles its own copy.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "isa.h"
#include "rounding.h"

namespace moepress {
namespace {

// x <- A D x in place (docs/format.md): the operations of `rotate` in kernels/trellis.py, in the
// same order, so that the floats are the same. D flips the signs of columns whose hash is odd; A is
// a Hadamard matrix for each run of `size` columns, the largest power of two that divides `cols`.
inline void trellis_rotate(float* x, int64_t cols) {
    for (int64_t c = 0; c < cols; ++c) {
        uint32_t h = uint32_t(c);
        h = (h ^ h >> 16) * 0x85EBCA6Bu;
        h = (h ^ h >> 13) * 0xC2B2AE35u;
        h ^= h >> 16;
        uint32_t bits;
        std::memcpy(&bits, x + c, 4);
        bits ^= h << 31;
        std::memcpy(x + c, &bits, 4);
    }
    const int64_t size = cols & -cols;
    for (int64_t half = 1; half < size; half *= 2)
        for (int64_t start = 0; start < cols; start += 2 * half)
            for (int64_t i = start; i < start + half; ++i) {
                const float a = x[i], b = x[i + half];
                x[i] = a + b;
                x[i + half] = a - b;
            }
    const float normal = float(1 / std::sqrt(double(size)));
    for (int64_t c = 0; c < cols; ++c) x[c] *= normal;
}

// Round a rotated token to codes from -127 to 127 or, with activation bits 16, from -16256 (128 *
// 127) to 16256, one scale for each group. `twice`: write an 8-bit code to both bytes.
template <bool twice>
void trellis_round(const float* x, int64_t cols, int group, int activation_bits,
                   const TrellisTokens& out, int64_t place) {
    const float range = activation_bits == 8 ? 127.0f : 16256.0f;
    const bool both = twice && activation_bits == 8;
    const int64_t groups = cols / group;
    int16_t* to = out.codes + place * cols;
    for (int64_t g = 0; g < groups; ++g, x += group, to += group) {
        const GroupScale by = group_scale(x, group, range);
        int32_t sum = 0;
        for (int i = 0; i < group; ++i) {
            const int32_t code = by.code(x[i]);
            to[i] = int16_t(both ? (code & 255) * 257 : code);
            sum += code;
        }
        out.scale[place * groups + g] = by.scale;
        out.sum[place * groups + g] = sum;
    }
}

}  // namespace
}  // namespace moepress
