// The way back along the best path (`trace` of viterbi.h), all paths at a time: SSE 4.1, which AVX2
// and AVX-512 include.
//
// A stride of steps has 2^(stride * bits) paths that lead to its end: 16, or 8 at 3 bits. Path n is
// the one whose predecessors j_i in its steps i are the digits of n, j_0 the lowest. The costs of
// all paths are one or two vectors of eight, and vphminposuw finds the first least one: of paths
// with equal costs the one with the smallest last digit, then the smallest before, as step by step.
// Only a cost that saturates can hide differences between paths; then `trace` decides.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "trellis_code.h"
#include "viterbi.h"

namespace moepress {
namespace {

template <int bits>
struct Paths {
    static constexpr int stride = kStride[bits];
    static constexpr int count = 1 << stride * bits;
    static constexpr int vectors = count / 8;
    static constexpr int at_step(int i) { return count >> i * bits; }  // that differ in step i on

    // The free bits of a path (viterbi.h) from `digits` digits: the lowest is the oldest.
    static constexpr int free_bits(int n, int digits = stride) {
        int free = 0;
        for (int i = 0; i < digits; ++i)
            free = free << bits | ((n >> i * bits) & ((1 << bits) - 1));
        return free;
    }
};

// For each step of a stride: the values of the states in which the paths are that lead to an end,
// [what the states have in common with it][paths].
template <int bits>
struct alignas(64) ValuesByEnd {
    int16_t at[kStride[bits]][kStates];
    ValuesByEnd() {
        using P = Paths<bits>;
        for (int i = 0; i < P::stride; ++i)
            for (int s = 0; s < kStates; ++s) {
                const int common = s / P::at_step(i), n = s % P::at_step(i);
                const int free = P::free_bits(n, P::stride - i);
                const int above = kStateBits - (P::stride - i) * bits;
                at[i][s] = value_in_steps<bits>(free << above | common);
            }
    }
};

// The index of `_mm_shuffle_epi8` that repeats words: word w of the result is word w >> shift.
template <int shift>
struct alignas(16) Repeated {
    int8_t at[2][16];
    constexpr Repeated() : at() {
        for (int i = 0; i < 32; ++i)
            at[i / 16][i % 16] = int8_t((i / 2 >> shift) * 2 + i % 2);
    }
};

// Add the squares of the steps from i on to the costs of all paths.
template <int bits, int i>
[[gnu::always_inline]] inline void add_squares(__m128i* costs, const int16_t* target, int end) {
    using P = Paths<bits>;
    if constexpr (i < P::stride) {
        const int common = end >> (P::stride - i) * bits;
        const int16_t* values = constant<ValuesByEnd<bits>>().at[i] + common * P::at_step(i);
        const __m128i x = _mm_set1_epi16(target[i]);
        alignas(16) static constexpr Repeated<i * bits> repeated;
        __m128i square{};
        for (int v = 0; v < P::vectors; ++v) {
            if (i == 0 || v == 0) {
                const auto* at = reinterpret_cast<const __m128i*>(values + 8 * v);
                __m128i value;
                if constexpr (P::at_step(i) >= 8) value = _mm_loadu_si128(at);
                if constexpr (P::at_step(i) == 4) value = _mm_loadl_epi64(at);
                if constexpr (P::at_step(i) == 2)
                    value = _mm_setr_epi16(values[0], values[1], 0, 0, 0, 0, 0, 0);
                const __m128i d = _mm_subs_epi16(x, value);
                square = _mm_mulhrs_epi16(d, d);
            }
            const __m128i index =
                _mm_load_si128(reinterpret_cast<const __m128i*>(repeated.at[v]));
            costs[v] = _mm_adds_epu16(costs[v], i == 0 ? square : _mm_shuffle_epi8(square, index));
        }
        add_squares<bits, i + 1>(costs, target, end);
    }
}

template <int bits>
void trace_paths(const uint16_t* best, const int16_t* target, int end, uint16_t* states) {
    using P = Paths<bits>;
    constexpr int apart = kStates >> (P::stride + 1) * bits;  // words of `best` between free bits
    const uint16_t* at = best + (end >> (P::stride + 1) * bits);
    const auto cost = [&](int n) { return int16_t(at[P::free_bits(n) * apart]); };
    __m128i costs[P::vectors];
    for (int v = 0, n = 0; v < P::vectors; ++v, n += 8)
        costs[v] = _mm_setr_epi16(cost(n), cost(n + 1), cost(n + 2), cost(n + 3), cost(n + 4),
                                  cost(n + 5), cost(n + 6), cost(n + 7));
    add_squares<bits, 0>(costs, target, end);
    uint32_t first = UINT32_MAX;  // cost * 16 + n
    for (int v = 0; v < P::vectors; ++v) {
        const uint32_t found = uint32_t(_mm_cvtsi128_si32(_mm_minpos_epu16(costs[v])));
        const uint32_t one = (found & 0xFFFF) << 4 | (found >> 16) | uint32_t(8 * v);
        first = one < first ? one : first;
    }
    if (first >> 4 == kLargest) return trace<bits, 0, P::stride>(best, target, end, states);
    const int path = P::free_bits(int(first & 15)) << kStateBits | end;
    for (int i = 0; i < P::stride; ++i)
        states[i] = uint16_t((path >> (P::stride - i) * bits) % kStates);
}

}  // namespace
}  // namespace moepress
