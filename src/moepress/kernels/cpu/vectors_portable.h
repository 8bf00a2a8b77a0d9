// `Vectors` for every machine: the compiler's vectors of 16 bytes. This is the plainest of the
// vectors_*.h, so it says what their members mean.
//
//     width     floats of a register
//     sums      sums that a block of products keeps in registers, a multiple of `width`
//     rows      rows of a block at most; divides `sums` and `width`
//     Float, Word     a register of float, of uint32
//     splat, load, store
//     mul_add         ab + c, rounded once where the machine can
//     widen           `width` numbers of any type as floats
//     widen_some      the first n of them, n < width, reading no more; the others are 0
//     totals          [width] registers: in place i the sum of the i-th
#pragma once

#include <cstdint>
#include <cstring>

#include "number_kinds.h"

namespace moepress {
namespace {

// What instruction sets share that have no loads of a part of a register.
template <class Vectors, class Number>
auto widen_copied(const Number* at, int n) {
    Number copy[Vectors::width] = {};
    std::memcpy(copy, at, size_t(n) * sizeof(Number));
    return Vectors::widen(copy);
}

// The bits of floats, from those of float16 in as many words.
template <class Float, class Word>
Float widened_halves(Word halves) {
    const Word size = (halves & 0x7FFF) << 13, sign = (halves & 0x8000) << 16;
    const Float scaled = (Float)size * 0x1p112f;  // exact, also where a number is denormal
    // Above the largest are infinity and NaN.
    const Word bits = scaled < Float{} + 65536.0f ? (Word)scaled : size | 0x7F800000;
    return (Float)(bits | sign);
}

struct PortableVectors {
    static constexpr int width = 4, sums = 8, rows = 4;
    typedef float Float __attribute__((vector_size(16)));
    typedef uint32_t Word __attribute__((vector_size(16)));

    static Float splat(float x) { return Float{x, x, x, x}; }
    static Float load(const float* at) {
        Float x;
        std::memcpy(&x, at, sizeof x);
        return x;
    }
    static void store(float* at, Float x) { std::memcpy(at, &x, sizeof x); }
    static Float mul_add(Float a, Float b, Float c) { return a * b + c; }

    static Float widen(const float* at) { return load(at); }
    static Float widen(const Bfloat16* at) { return (Float)(words(at) << 16); }
    static Float widen(const Float16* at) { return widened_halves<Float>(words(at)); }
    template <class Number>
    static Float widen_some(const Number* at, int n) {
        return widen_copied<PortableVectors>(at, n);
    }

    static Float totals(const Float* x) {
        Float out;
        for (int i = 0; i < 4; ++i) out[i] = (x[i][0] + x[i][1]) + (x[i][2] + x[i][3]);
        return out;
    }

  private:
    template <class Number>
    static Word words(const Number* at) {
        return Word{at[0].bits, at[1].bits, at[2].bits, at[3].bits};
    }
};

}  // namespace
}  // namespace moepress
