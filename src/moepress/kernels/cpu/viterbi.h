// What the search for the best paths (viterbi.cpp) does between the steps of Viterbi's algorithm,
// which are in viterbi_tiles.h and viterbi_portable.h. Internal linkage: each instruction set
// compiles its own copy.
#pragma once

#include <cstdint>

#include "trellis_code.h"

namespace moepress {
namespace {

constexpr int kLargest = 65535;  // cost

// The rounded square of the distance between a target and a value: at most 2^15.
inline int square(int target, int value) {
    int d = target - value;
    d = d < -32768 ? -32768 : d > 32767 ? 32767 : d;
    return (d * d + (1 << 14)) >> 15;
}
inline int saturated_sum(int cost, int square) {
    return cost + square > kLargest ? kLargest : cost + square;
}

// Subtract the least cost from all, which keeps their order and leaves room for sums to grow.
inline void subtract_least(uint16_t* costs, int count) {
    uint16_t least = kLargest;
    for (int i = 0; i < count; ++i) least = costs[i] < least ? costs[i] : least;
    for (int i = 0; i < count; ++i) costs[i] = uint16_t(costs[i] - least);
}

// The first of the states with the least cost. `best` as in viterbi_tiles.h.
template <int bits>
int best_state(const uint16_t* best, const int16_t* values, int16_t target) {
    int least = kLargest + 1, state = 0;
    for (int s = 0; s < kStates; ++s) {
        const int cost = saturated_sum(best[s >> bits], square(target, values[s]));
        if (cost < least) least = cost, state = s;
    }
    return state;
}

// Find the states [depth] of the best path that is in state `end` after `depth` steps with targets
// [depth]. `best` belongs to the first of these steps.
//
// The states that lead to `end` are few: the first has depth * bits free bits, which are its oldest,
// and the oldest of them are decided in each step. All bits of a path are in one word,
// (free bits) * 4096 + end.
template <int bits, int depth>
void trace(const uint16_t* best, const int16_t* values, const int16_t* target, int end,
           uint16_t* states) {
    if constexpr (depth > 0) {
        constexpr int branches = 1 << bits;
        const auto state = [&](int step, int free) {
            return (free << kStateBits | end) >> (depth - step) * bits;
        };
        int least[1 << depth * bits];  // cost before the step, by free bits
        uint8_t from[depth][1 << (depth - 1) * bits];
        for (int free = 0; free < 1 << depth * bits; ++free)
            least[free] = best[state(0, free) >> bits];
        for (int i = 0; i < depth; ++i) {
            const int left = (depth - i - 1) * bits;  // free bits after the step
            for (int free = 0; free < 1 << left; ++free) {
                int first = INT32_MAX;  // cost * branches + j: of equal costs the smallest j
                for (int j = 0; j < branches; ++j) {
                    const int path = j << left | free;
                    const int added = square(target[i], values[state(i, path)]);
                    const int cost = saturated_sum(least[path], added) * branches + j;
                    first = cost < first ? cost : first;
                }
                least[free] = first / branches;
                from[i][free] = uint8_t(first % branches);
            }
        }
        for (int i = depth - 1, free = 0; i >= 0; --i) {
            free |= from[i][free] << (depth - i - 1) * bits;
            states[i] = uint16_t(state(i, free));
        }
    }
}

// As `trace` through all steps, which are a multiple of kStride: `kept` holds `best` of every
// kStride-th step, and `end` is the state of the last step.
template <int bits>
void trace_back(const uint16_t* kept, const int16_t* values, const int16_t* target, int steps,
                int end, uint16_t* states) {
    constexpr int stride = kStride[bits], groups = kStates >> bits;
    int first = steps - stride;
    states[steps - 1] = uint16_t(end);
    trace<bits, stride - 1>(kept + first / stride * groups, values, target + first, end,
                            states + first);
    for (first -= stride; first >= 0; first -= stride)
        trace<bits, stride>(kept + first / stride * groups, values, target + first,
                            states[first + stride], states + first);
}

}  // namespace
}  // namespace moepress
