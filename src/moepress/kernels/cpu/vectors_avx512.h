// `Vectors` for AVX-512. The members are explained in vectors_portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "number_kinds.h"

namespace moepress {
namespace {

struct Avx512Vectors {
    static constexpr int width = 16, sums = 16, rows = 8;
    using Float = __m512;
    typedef uint32_t Word __attribute__((vector_size(64)));

    static Float splat(float x) { return _mm512_set1_ps(x); }
    static Float load(const float* at) { return _mm512_loadu_ps(at); }
    static void store(float* at, Float x) { _mm512_storeu_ps(at, x); }
    static Float mul_add(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }

    static Float widen(const float* at) { return load(at); }
    static Float widen(const Bfloat16* at) { return shifted(words(at)); }
    static Float widen(const Float16* at) { return _mm512_cvtph_ps(words(at)); }

    static Float widen_some(const float* at, int n) {
        return _mm512_maskz_loadu_ps(first(n), at);
    }
    static Float widen_some(const Bfloat16* at, int n) {
        return shifted(_mm256_maskz_loadu_epi16(first(n), at));
    }
    static Float widen_some(const Float16* at, int n) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), at));
    }

    static Float totals(const Float* x) {
        Float pairs[8], fours[4];  // of each 16 bytes
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const Float a = x[2 * i], b = x[2 * i + 1];
            pairs[i] = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const __m512d a = _mm512_castps_pd(pairs[2 * i]);
            const __m512d b = _mm512_castps_pd(pairs[2 * i + 1]);
            fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) +
                       _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
        return neighbours(neighbours(fours[0], fours[1]), neighbours(fours[2], fours[3]));
    }

  private:
    static __m256i words(const void* at) {
        return _mm256_loadu_si256(static_cast<const __m256i*>(at));
    }
    static Float shifted(__m256i words) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
    }
    static __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
    // Of each register the sums of neighbouring quarters.
    static Float neighbours(Float a, Float b) {
        return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xDD);
    }
};

}  // namespace
}  // namespace moepress
