// One step of Viterbi's algorithm, sixteen states at a time. Costs are unsigned 16-bit integers:
// sums saturate (vpaddusw), a rounded square is one instruction (vpmulhrsw: the square of -2^15
// comes out as 2^15, read as unsigned), and the distance to a target saturates as
// rounding/methods/viterbi.py requires (vpsubsw).
//
// Speed, AMD EPYC (Zen 3), one thread: docs/log.md#trellis-rounding-speed.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "trellis_code.h"

namespace moepress {
namespace {

// Each of the 16 costs of `best` goes to 2^bits successor states: each cost repeated 2^bits times,
// of which this returns the `o`-th 16. First the right 64 bits go to both halves, then words move
// within a half.
template <int bits, int o>
[[gnu::always_inline]] inline __m256i successors(__m256i best) {
    constexpr int words = 16 >> bits;  // costs needed for 16 successors
    constexpr int first = o * words;
    constexpr int quarters[] = {first / 4, first / 4, (first + words / 2) / 4,
                                (first + words / 2) / 4};
    constexpr int low = first % 4, high = (first + words / 2) % 4;
    const __m256i near = _mm256_permute4x64_epi64(
        best, quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6);
    alignas(32) static constexpr struct Index {
        int8_t at[32];
        constexpr Index() : at() {
            for (int i = 0; i < 16; ++i) {
                const int word = (i < 8 ? low : high) + (i % 8 >> bits);
                at[2 * i] = int8_t(2 * word);
                at[2 * i + 1] = int8_t(2 * word + 1);
            }
        }
    } index;
    return _mm256_shuffle_epi8(near, _mm256_load_si256(reinterpret_cast<const __m256i*>(index.at)));
}

// The costs of successors 16 o and later: that of the predecessor, plus the rounded square of the
// distance between target and value.
template <int bits, int o = 0>
[[gnu::always_inline]] inline void add_squares(__m256i best, __m256i target, const int16_t* values,
                                               uint16_t* next) {
    const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 16 * o));
    const __m256i d = _mm256_subs_epi16(target, value);
    const __m256i cost =
        _mm256_adds_epu16(successors<bits, o>(best), _mm256_mulhrs_epi16(d, d));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(next + 16 * o), cost);
    if constexpr (o + 1 < 1 << bits) add_squares<bits, o + 1>(best, target, values, next);
}

struct Avx2Search {
    template <int bits>
    static void step(const uint16_t* costs, const int16_t* values, int16_t target, uint16_t* next,
                     uint8_t* chosen) {
        constexpr int groups = kStates >> bits, branches = 1 << bits;
        const __m256i all = _mm256_set1_epi16(target);
        for (int g = 0; g < groups; g += 16) {
            __m256i best = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(costs + g));
            __m256i from = _mm256_setzero_si256();
#pragma GCC unroll 16
            for (int j = 1; j < branches; ++j) {
                const __m256i cost =
                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(costs + j * groups + g));
                const __m256i least = _mm256_min_epu16(best, cost);
                const __m256i stays = _mm256_cmpeq_epi16(least, best);
                from = _mm256_blendv_epi8(_mm256_set1_epi16(int16_t(j)), from, stays);
                best = least;
            }
            const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(from, from), 0x08);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(chosen + g), _mm256_castsi256_si128(bytes));
            add_squares<bits>(best, all, values + g * branches, next + g * branches);
        }
    }
};

}  // namespace
}  // namespace moepress
