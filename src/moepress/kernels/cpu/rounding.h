// Rounding a group of activations to integer codes with one scale: x = scale * code. Both families
// use it. Internal linkage: each instruction set compiles its own copy.
#pragma once

#include <cstdint>
#include <cstring>

namespace moepress {
namespace {

// Round half to even, for |x| < 2^22: the sum is a float whose last place has the value 1.
inline int32_t round_to_int(float x) {
    const float sum = x + 12582912.0f;  // 1.5 * 2^23
    int32_t bits;
    std::memcpy(&bits, &sum, 4);
    return bits - 0x4B400000;
}

// The scale of a group of activations, and 1 / scale, which turns activations into codes.
struct GroupScale {
    bool counts;  // false: all codes of the group are 0
    float inverse, scale;

    int32_t code(float x) const { return counts ? round_to_int(x * inverse) : 0; }
};

// The scale with which the largest |x| of x [n] gets the code `range`.
inline GroupScale group_scale(const float* x, int n, float range) {
    constexpr int32_t infinity = 0x7F800000;
    int32_t largest = 0;  // bits of the largest |x|: they order as the floats do, NaN last
    for (int i = 0; i < n; ++i) {
        int32_t bits;
        std::memcpy(&bits, x + i, 4);
        bits &= 0x7FFFFFFF;
        largest = bits > largest ? bits : largest;
    }
    float amax;
    std::memcpy(&amax, &largest, 4);
    // A group below 2^-100 counts as 0, since its inverse would overflow. Infinity and NaN must
    // reach the output, so the scale is then NaN.
    const bool counts = amax >= 0x1p-100f && largest < infinity;
    float scale = counts ? amax / range : 0.0f;
    if (largest >= infinity) std::memcpy(&scale, "\0\0\xC0\x7F", 4);
    return {counts, counts ? range / amax : 0.0f, scale};
}

}  // namespace
}  // namespace moepress
