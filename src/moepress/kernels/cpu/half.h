// The two kinds of 16-bit numbers, and one of them as a float and back. Internal linkage: each
// instruction set compiles its own copy.
#pragma once

#include <cstdint>
#include <cstring>

namespace moepress {

struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {  // IEEE 754: 5 bits of exponent, 10 of mantissa
    uint16_t bits;
};

namespace {

inline float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t as_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float wide(float x) { return x; }
inline float wide(Bfloat16 x) { return as_float(uint32_t(x.bits) << 16); }
inline float wide(Float16 x) {
    const uint32_t size = uint32_t(x.bits & 0x7FFF) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
    const float scaled = as_float(size) * 0x1p112f;  // exact, also where x is denormal
    const uint32_t bits = scaled < 65536 ? as_bits(scaled) : size | 0x7F800000;  // else inf or NaN
    return as_float(bits | sign);
}

// Round to the nearest, halves to even. A NaN stays one.
inline void narrow_to(float x, float& to) { to = x; }
inline void narrow_to(float x, Bfloat16& to) {
    const uint32_t bits = as_bits(x);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    to.bits = uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}
inline void narrow_to(float x, Float16& to) {
    const uint32_t bits = as_bits(x), size = bits & 0x7FFFFFFF;
    // Denormal: the last place of the sum is that of the result.
    const uint32_t small = as_bits(as_float(size) + 0.5f) - as_bits(0.5f);
    const uint32_t usual = (size - (112u << 23) + 0xFFF + (size >> 13 & 1)) >> 13;
    const uint32_t large = size > 0x7F800000 ? 0x7E00 : 0x7C00;
    const uint32_t found = size < 113u << 23 ? small : size < 143u << 23 ? usual : large;
    to.bits = uint16_t(found | (bits >> 16 & 0x8000));
}

}  // namespace
}  // namespace moepress
