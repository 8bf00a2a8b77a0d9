// The vectors of Viterbi's algorithm (viterbi_tiles.h) with AVX-512BW: 32 costs. Costs are unsigned
// 16-bit integers: sums saturate (vpaddusw), a rounded square is one instruction (vpmulhrsw: the
// square of -2^15 comes out as 2^15, read as unsigned), and the distance to a target saturates as
// rounding/methods/viterbi.py requires (vpsubsw).
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "viterbi_tiles.h"
#include "viterbi_trace_avx2.h"

namespace moepress {
namespace {

struct Avx512Costs {
    static constexpr int width = 32;

    static __m512i splat(int16_t target) { return _mm512_set1_epi16(target); }

    // `count` costs, repeated until the vector is full.
    template <int count>
    static __m512i repeat(const uint16_t* at) {
        if constexpr (count == 32) return _mm512_loadu_si512(at);
        if constexpr (count == 16)
            return _mm512_broadcast_i64x4(
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
        if constexpr (count == 8)
            return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
        if constexpr (count == 4)
            return _mm512_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
    }

    static __m512i load(const int16_t* at) { return _mm512_loadu_si512(at); }
    static __m512i minus_to_limit(__m512i a, __m512i b) { return _mm512_subs_epi16(a, b); }
    static __m512i square(__m512i d) { return _mm512_mulhrs_epi16(d, d); }
    static __m512i plus(__m512i a, __m512i b) { return _mm512_add_epi16(a, b); }
    static __m512i plus_to_limit(__m512i a, __m512i b) { return _mm512_adds_epu16(a, b); }
    static __m512i least(__m512i a, __m512i b) { return _mm512_min_epu16(a, b); }
    static __m512i any(__m512i a, __m512i b, __m512i c) {
        return _mm512_ternarylogic_epi32(a, b, c, 0xFE);
    }
    static bool no_high_bit(__m512i a) { return _mm512_movepi16_mask(a) == 0; }

    // Store the 64 sums of a tile by c, then by branch.
    template <int bits>
    static void store(__m512i even, __m512i odd, uint16_t* next) {
        alignas(64) static constexpr struct Index {
            int16_t at[2][32];
            constexpr Index() : at() {
                for (int i = 0; i < 64; ++i) {
                    const int c = i >> bits, branch = i & ((1 << bits) - 1);
                    at[i / 32][i % 32] = int16_t(branch % 2 * 32 + branch / 2 * (64 >> bits) + c);
                }
            }
        } index;
        for (int half = 0; half < 2; ++half)
            _mm512_storeu_si512(
                next + 32 * half,
                _mm512_permutex2var_epi16(even, _mm512_load_si512(index.at[half]), odd));
    }
};

struct Avx512Search : TileSearch<Avx512Costs> {
    template <int bits>
    static void trace(const uint16_t* best, const int16_t* target, int end, uint16_t* states) {
        trace_paths<bits>(best, target, end, states);
    }
};

}  // namespace
}  // namespace moepress
