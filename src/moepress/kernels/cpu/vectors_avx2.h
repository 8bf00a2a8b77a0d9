// `Vectors` for AVX2 and FMA. The members are explained in vectors_portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "number_kinds.h"
#include "vectors_portable.h"

namespace moepress {
namespace {

struct Avx2Vectors {
    static constexpr int width = 8, sums = 8, rows = 4;
    using Float = __m256;
    typedef uint32_t Word __attribute__((vector_size(32)));

    static Float splat(float x) { return _mm256_set1_ps(x); }
    static Float load(const float* at) { return _mm256_loadu_ps(at); }
    static void store(float* at, Float x) { _mm256_storeu_ps(at, x); }
    static Float mul_add(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }

    static Float widen(const float* at) { return load(at); }
    static Float widen(const Bfloat16* at) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(words(at), 16));
    }
    static Float widen(const Float16* at) { return widened_halves<Float>((Word)words(at)); }
    template <class Number>
    static Float widen_some(const Number* at, int n) {
        return widen_copied<Avx2Vectors>(at, n);
    }

    static Float totals(const Float* x) {
        const Float low = fours(x), high = fours(x + 4);
        return _mm256_permute2f128_ps(low, high, 0x20) + _mm256_permute2f128_ps(low, high, 0x31);
    }

  private:
    static __m256i words(const void* at) {
        return _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(at)));
    }
    // The sums of both halves of four registers.
    static Float fours(const Float* x) {
        return _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
    }
};

}  // namespace
}  // namespace moepress
