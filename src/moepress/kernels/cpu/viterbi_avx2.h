// The vectors of Viterbi's algorithm (viterbi_tiles.h) with AVX2: 16 costs. viterbi_avx512.h says
// why these instructions.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "viterbi_tiles.h"
#include "viterbi_trace_avx2.h"

namespace moepress {
namespace {

struct Avx2Costs {
    static constexpr int width = 16;

    static __m256i splat(int16_t target) { return _mm256_set1_epi16(target); }

    // `count` costs, repeated until the vector is full.
    template <int count>
    static __m256i repeat(const uint16_t* at) {
        if constexpr (count == 16)
            return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
        if constexpr (count == 8)
            return _mm256_broadcastsi128_si256(
                _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
        if constexpr (count == 4)
            return _mm256_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
        if constexpr (count == 2) {
            int32_t pair;
            std::memcpy(&pair, at, sizeof pair);
            return _mm256_set1_epi32(pair);
        }
    }

    static __m256i load(const int16_t* at) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    }
    static __m256i minus_to_limit(__m256i a, __m256i b) { return _mm256_subs_epi16(a, b); }
    static __m256i square(__m256i d) { return _mm256_mulhrs_epi16(d, d); }
    static __m256i plus(__m256i a, __m256i b) { return _mm256_add_epi16(a, b); }
    static __m256i plus_to_limit(__m256i a, __m256i b) { return _mm256_adds_epu16(a, b); }
    static __m256i least(__m256i a, __m256i b) { return _mm256_min_epu16(a, b); }
    static __m256i any(__m256i a, __m256i b, __m256i c) {
        return _mm256_or_si256(a, _mm256_or_si256(b, c));
    }
    static bool no_high_bit(__m256i a) {
        return (_mm256_movemask_epi8(a) & int(0xAAAAAAAA)) == 0;
    }

    // Store the 32 sums of a tile by c, then by branch. Branches 2 i and 2 i + 1 are neighbours
    // after the first interleaving, which works within halves of a vector. With p the pairs of
    // branches, the halves of `low` and `high` hold
    //
    //     bits 1   c 0 to 3 | c 8 to 11               c 4 to 7 | c 12 to 15
    //     bits 2   p 0, c 0 to 3 | p 1, c 0 to 3      p 0, c 4 to 7 | p 1, c 4 to 7
    //     bits 3   p 0, c 0 to 3 | p 2, c 0 to 3      p 1, c 0 to 3 | p 3, c 0 to 3
    //     bits 4   p 0, 1 of c 0, 1 | p 4, 5          p 2, 3 of c 0, 1 | p 6, 7
    template <int bits>
    static void store(__m256i even, __m256i odd, uint16_t* next) {
        const __m256i low = _mm256_unpacklo_epi16(even, odd);
        const __m256i high = _mm256_unpackhi_epi16(even, odd);
        __m256i first, second;
        if constexpr (bits == 1) {
            first = _mm256_permute2x128_si256(low, high, 0x20);
            second = _mm256_permute2x128_si256(low, high, 0x31);
        }
        if constexpr (bits == 2) {
            const __m256i halves = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            first = _mm256_permutevar8x32_epi32(low, halves);
            second = _mm256_permutevar8x32_epi32(high, halves);
        }
        if constexpr (bits == 3) {
            first = _mm256_permute4x64_epi64(_mm256_unpacklo_epi32(low, high), 0xD8);
            second = _mm256_permute4x64_epi64(_mm256_unpackhi_epi32(low, high), 0xD8);
        }
        if constexpr (bits == 4) {
            const __m256 a = _mm256_castsi256_ps(low), b = _mm256_castsi256_ps(high);
            first = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));
            second = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xDD));
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(next), first);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(next + 16), second);
    }
};

struct Avx2Search : TileSearch<Avx2Costs> {
    template <int bits>
    static void trace(const uint16_t* best, const int16_t* target, int end, uint16_t* states) {
        trace_paths<bits>(best, target, end, states);
    }
};

}  // namespace
}  // namespace moepress
