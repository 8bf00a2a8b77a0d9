// Numbers of a router (MoepressNumbers) as floats and back. Internal linkage: each instruction set
// compiles its own copy. The loops vectorise.
#pragma once

#include <cstdint>
#include <cstring>

#include "moepress.h"

namespace moepress {
namespace {

inline float float_of_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t bits_of_float(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float of_bfloat16(uint16_t x) { return float_of_bits(uint32_t(x) << 16); }

// Without denormal floats: they count as 0 where torch.set_flush_denormal is on.
inline float of_float16(uint16_t x) {
    const uint32_t sign = uint32_t(x & 0x8000) << 16, exponent = x & 0x7C00;
    const uint32_t normal = (uint32_t(x & 0x7FFF) << 13) + (112u << 23);
    const float small = float_of_bits(normal + (1u << 23)) - 0x1p-14f;
    uint32_t bits = exponent == 0 ? bits_of_float(small) : normal;
    bits = exponent == 0x7C00 ? bits + (112u << 23) : bits;
    return float_of_bits(bits | sign);
}

// To the nearest, halves to even. A NaN stays one.
inline uint16_t to_bfloat16(float x) {
    const uint32_t bits = bits_of_float(x);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

inline uint16_t to_float16(float x) {
    const uint32_t bits = bits_of_float(x), size = bits & 0x7FFFFFFF;
    // The last place of a float from 0.5 to 1 has the value of float16's smallest number.
    const uint32_t small = bits_of_float(float_of_bits(size) + 0.5f) - 0x3F000000;
    const uint32_t normal = (size - (112u << 23) + 0xFFF + (size >> 13 & 1)) >> 13;
    uint32_t result = size < 0x38800000 ? small : normal;  // 2^-14
    result = size >= 0x477FF000 ? 0x7C00 : result;         // 65520 and more: infinity
    result = size > 0x7F800000 ? 0x7E00 : result;
    return uint16_t(result | (bits >> 16 & 0x8000));
}

inline int64_t bytes_of(int32_t numbers) { return numbers == kFloat32 ? 4 : 2; }

inline void widen_numbers(const void* from, int32_t numbers, int64_t n, float* to) {
    const auto* narrow = static_cast<const uint16_t*>(from);
    switch (numbers) {
        case kBfloat16:
            for (int64_t i = 0; i < n; ++i) to[i] = of_bfloat16(narrow[i]);
            return;
        case kFloat16:
            for (int64_t i = 0; i < n; ++i) to[i] = of_float16(narrow[i]);
            return;
        default: std::memcpy(to, from, size_t(4 * n));
    }
}

inline void narrow_numbers(const float* from, int64_t n, int32_t numbers, void* to) {
    auto* narrow = static_cast<uint16_t*>(to);
    switch (numbers) {
        case kBfloat16:
            for (int64_t i = 0; i < n; ++i) narrow[i] = to_bfloat16(from[i]);
            return;
        case kFloat16:
            for (int64_t i = 0; i < n; ++i) narrow[i] = to_float16(from[i]);
            return;
        default: std::memcpy(to, from, size_t(4 * n));
    }
}

// x [n] as if it had been written and read.
inline void round_numbers(float* x, int64_t n, int32_t numbers) {
    if (numbers == kBfloat16)
        for (int64_t i = 0; i < n; ++i) x[i] = of_bfloat16(to_bfloat16(x[i]));
    if (numbers == kFloat16)
        for (int64_t i = 0; i < n; ++i) x[i] = of_float16(to_float16(x[i]));
}

inline float rounded_number(float x, int32_t numbers) {
    round_numbers(&x, 1, numbers);
    return x;
}

}  // namespace
}  // namespace moepress
