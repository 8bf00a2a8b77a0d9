// The kinds of numbers (MoepressNumbers): floats from them, and floats rounded to them, to the
// nearest, halves to even. NaN stays NaN (Bfloat16::rounded: where it is one of 16 bits). Written so
// that the compiler vectorises loops with them. No step has denormal floats but where they are in
// the input: they count as 0 where torch.set_flush_denormal is on. Internal linkage: each
// instruction set compiles its own copy.
#pragma once

#include <cstdint>
#include <cstring>

#include "moepress.h"

namespace moepress {
namespace {

// A kind has
//     Raw       a number in memory
//     wide      it as a float
//     narrow    a float rounded to it
//     rounded   the same, as a float

struct Float32 {
    using Raw = float;
    static float wide(float x) { return x; }
    static float narrow(float x) { return x; }
    static float rounded(float x) { return x; }
};

struct FloatBits {
    static constexpr int32_t kMagnitude = 0x7FFFFFFF, kInfinity = 0x7F800000;

    static float of(int32_t bits) {
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }
    static int32_t in(float x) {
        int32_t bits;
        std::memcpy(&bits, &x, 4);
        return bits;
    }
};

// The upper half of a float.
struct Bfloat16 {
    uint16_t bits;

    using Raw = uint16_t;
    static float wide(uint16_t x) { return FloatBits::of(int32_t(uint32_t(x) << 16)); }
    static uint16_t narrow(float x) {
        const bool nan = (FloatBits::in(x) & FloatBits::kMagnitude) > FloatBits::kInfinity;
        return uint16_t(nan ? 0x7FC0 : raised(x) >> 16);
    }
    // A NaN stays one if its last 16 bits are 0, as they are where it comes from numbers of 16 bits.
    static float rounded(float x) { return FloatBits::of(int32_t(raised(x) & 0xFFFF0000)); }

  private:
    // Bits of which the upper half is the rounded number.
    static uint32_t raised(float x) {
        const uint32_t bits = uint32_t(FloatBits::in(x));
        return bits + 0x7FFF + (bits >> 16 & 1);
    }
};

// A sign, 5 bits of exponent, 10 of fraction.
struct Float16 {
    uint16_t bits;

    using Raw = uint16_t;

    static float wide(uint16_t x) {
        const int32_t magnitude = x & 0x7FFF, sign = int32_t(uint32_t(x & 0x8000) << 16);
        int32_t bits = (magnitude << 13) + kBias;
        bits = magnitude >= 0x7C00 ? magnitude << 13 | FloatBits::kInfinity : bits;
        bits = magnitude < 0x400 ? FloatBits::in(float(magnitude) * 0x1p-24f) : bits;
        return FloatBits::of(bits | sign);
    }

    static uint16_t narrow(float x) {
        const int32_t bits = FloatBits::in(x), magnitude = bits & FloatBits::kMagnitude;
        int32_t code = (magnitude - kBias + 0xFFF + (magnitude >> 13 & 1)) >> 13;
        // The last place of a float from .5 to 1 is 2^-24, as that of a subnormal number.
        const int32_t half = FloatBits::in(0.5f);
        code = magnitude < kNormal ? FloatBits::in(FloatBits::of(magnitude) + 0.5f) - half : code;
        code = magnitude >= kTooGreat ? 0x7C00 : code;
        code = magnitude > FloatBits::kInfinity ? 0x7E00 : code;
        return uint16_t(uint32_t(code) | (uint32_t(bits) >> 16 & 0x8000));
    }

    // x + 2^13 2^e - 2^13 2^e, with e the exponent of x or of the least normal number: the last
    // place of the sum is that of the result.
    static float rounded(float x) {
        const int32_t bits = FloatBits::in(x), magnitude = bits & FloatBits::kMagnitude;
        const int32_t exponent = magnitude & FloatBits::kInfinity;
        const int32_t least = exponent < kNormal ? kNormal : exponent;
        const float power = FloatBits::of(int32_t(uint32_t(least) + (13 << 23)));
        int32_t result = FloatBits::in(FloatBits::of(magnitude) + power - power);
        result = magnitude >= kTooGreat ? FloatBits::kInfinity : result;
        result = magnitude > FloatBits::kInfinity ? magnitude : result;
        return FloatBits::of(result | (bits & ~FloatBits::kMagnitude));
    }

  private:
    static constexpr int32_t kBias = (127 - 15) << 23;    // what the exponents differ by
    static constexpr int32_t kNormal = (127 - 14) << 23;  // 2^-14, the least normal number
    static constexpr int32_t kTooGreat = 0x477FF000;      // 65520: from there on infinity
};

// A number in memory as a float, and a float rounded to one.
inline float wide(float x) { return x; }
inline float wide(Bfloat16 x) { return Bfloat16::wide(x.bits); }
inline float wide(Float16 x) { return Float16::wide(x.bits); }
inline void narrow_to(float x, float& to) { to = x; }
inline void narrow_to(float x, Bfloat16& to) { to.bits = Bfloat16::narrow(x); }
inline void narrow_to(float x, Float16& to) { to.bits = Float16::narrow(x); }

inline bool is_kind(int32_t numbers) { return numbers >= kFloat32 && numbers <= kFloat16; }

// run(a kind): Float32, Bfloat16 or Float16.
template <class Run>
void with_kind(int32_t numbers, Run run) {
    if (numbers == kBfloat16) return run(Bfloat16{});
    if (numbers == kFloat16) return run(Float16{});
    run(Float32{});
}

template <class Kind>
void widen_numbers(const typename Kind::Raw* __restrict from, int64_t n, float* __restrict to) {
    for (int64_t i = 0; i < n; ++i) to[i] = Kind::wide(from[i]);
}

template <class Kind>
void narrow_numbers(const float* __restrict from, int64_t n, typename Kind::Raw* __restrict to) {
    for (int64_t i = 0; i < n; ++i) to[i] = Kind::narrow(from[i]);
}

}  // namespace
}  // namespace moepress
