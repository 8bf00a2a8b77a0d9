// Rotating and rounding a token's activations for products with trellis matrices (isa.h,
// TrellisTokens). Internal linkage: each instruction set compiles its own copy.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "floats.h"
#include "isa.h"
#include "rounding.h"

namespace moepress {
namespace {

// Each float in the place of the one `half` places away: place i has that of place i xor half.
template <int half>
inline Floats swapped(Floats x) {
#if defined(__clang__)
#define MOEPRESS_SHUFFLE(...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define MOEPRESS_SHUFFLE(...) __builtin_shuffle(x, Ints{__VA_ARGS__})
#endif
#if defined(__AVX2__)
    if constexpr (half == 1) return MOEPRESS_SHUFFLE(1, 0, 3, 2, 5, 4, 7, 6);
    if constexpr (half == 2) return MOEPRESS_SHUFFLE(2, 3, 0, 1, 6, 7, 4, 5);
    if constexpr (half == 4) return MOEPRESS_SHUFFLE(4, 5, 6, 7, 0, 1, 2, 3);
#else
    if constexpr (half == 1) return MOEPRESS_SHUFFLE(1, 0, 3, 2);
    if constexpr (half == 2) return MOEPRESS_SHUFFLE(2, 3, 0, 1);
#endif
#undef MOEPRESS_SHUFFLE
}

// Levels half, 2 half, ... of the sums and differences of a run of vectors, each a + b and a - b.
template <int vectors, int half>
[[gnu::always_inline]] inline void hadamard_levels(Floats* x) {
    if constexpr (half < kFloats) {
        Ints minus;  // the sign bit of the second of each pair
        for (int i = 0; i < kFloats; ++i) minus[i] = i & half ? INT32_MIN : 0;
#pragma GCC unroll 64
        for (int v = 0; v < vectors; ++v) x[v] = swapped<half>(x[v]) + (Floats)((Ints)x[v] ^ minus);
    } else {
        constexpr int step = half / kFloats;
#pragma GCC unroll 64
        for (int v = 0; v < vectors; ++v)
            if (!(v & step)) {
                const Floats a = x[v], b = x[v + step];
                x[v] = a + b;
                x[v + step] = a - b;
            }
    }
    if constexpr (2 * half < vectors * kFloats) hadamard_levels<vectors, 2 * half>(x);
}

// The sign bit of a column that D flips, by its place in a run.
inline int32_t flipped(uint32_t place) {
    uint32_t h = place;
    h = (h ^ h >> 16) * 0x85EBCA6Bu;
    h = (h ^ h >> 13) * 0xC2B2AE35u;
    h ^= h >> 16;
    return int32_t(h << 31);
}

// A D x, or with `back` D A x.
template <int size, bool back>
void rotate_runs(float* x, int64_t cols) {
    constexpr int vectors = size / kFloats;
    const float normal = float(1 / std::sqrt(double(size)));
    Ints sign[vectors];
    for (int i = 0; i < size; ++i) sign[i / kFloats][i % kFloats] = flipped(uint32_t(i));
    for (int64_t start = 0; start < cols; start += size) {
        Floats run[vectors];
#pragma GCC unroll 64
        for (int v = 0; v < vectors; ++v) {
            std::memcpy(&run[v], x + start + v * kFloats, sizeof run[v]);
            if (!back) run[v] = (Floats)((Ints)run[v] ^ sign[v]);
        }
        hadamard_levels<vectors, 1>(run);
#pragma GCC unroll 64
        for (int v = 0; v < vectors; ++v) {
            run[v] *= normal;
            if (back) run[v] = (Floats)((Ints)run[v] ^ sign[v]);
            std::memcpy(x + start + v * kFloats, &run[v], sizeof run[v]);
        }
    }
}

// x <- A D x in place (docs/format.md), or with `back` the inverse, x <- D A x: the operations of
// `rotate` and `rotate_back` in kernels/trellis.py, in the same order, so that the floats are the
// same. A is a Hadamard matrix for each run of columns.
template <bool back>
void trellis_rotate(float* x, int64_t cols) {
    if (cols % 256 == 0) return rotate_runs<256, back>(x, cols);
    if (cols % 128 == 0) return rotate_runs<128, back>(x, cols);
    if (cols % 64 == 0) return rotate_runs<64, back>(x, cols);
    rotate_runs<32, back>(x, cols);  // a group, and so a row, has a multiple of 32 columns
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
        int32_t codes[kMaxGroup];
        for (int i = 0; i < group; ++i) {
            codes[i] = by.code(x[i]);
            to[i] = int16_t(both ? (codes[i] & 255) * 257 : codes[i]);
            sum += codes[i];
        }
        uint32_t crossed = 0;
        for (int i = 0; i < group; i += 4)
            crossed += uint32_t(codes[i] * codes[i + 2]) + uint32_t(codes[i + 1] * codes[i + 3]);
        if (activation_bits == 8) {
            int8_t* bytes = out.bytes + place * cols + g * group;
            for (int i = 0; i < group; i += 4) {
                bytes[i] = int8_t(codes[i]);
                bytes[i + 1] = int8_t(codes[i + 2]);
                bytes[i + 2] = int8_t(codes[i + 1]);
                bytes[i + 3] = int8_t(codes[i + 3]);
            }
        }
        out.scale[place * groups + g] = by.scale;
        out.sum[place * groups + g] = sum;
        out.crossed[place * groups + g] = int32_t(crossed);
    }
}

}  // namespace
}  // namespace moepress
