// What the search for the best paths (viterbi.cpp) does between the steps of Viterbi's algorithm,
// which are in viterbi_tiles.h and viterbi_portable.h. Internal linkage: each instruction set
// compiles its own copy.
#pragma once

#include <algorithm>
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

// The value of a state in steps of 1 / kUnit.
template <int bits>
constexpr int16_t value_in_steps(int state) {
    return int16_t(code_value(state, bits) * kUnit[bits]);
}

// The values of all states in the order of the states.
template <int bits>
struct ValuesByState {
    int16_t at[kStates];
    ValuesByState() {
        for (int s = 0; s < kStates; ++s) at[s] = value_in_steps<bits>(s);
    }
};

// Values in one of the orders of this directory, computed at the first call.
template <class Values>
const Values& constant() {
    static const Values values;
    return values;
}

// Subtract the least cost from all, which keeps their order and leaves room for sums to grow.
inline void subtract_least(uint16_t* costs, int count) {
    uint16_t least = kLargest;
    for (int i = 0; i < count; ++i) least = costs[i] < least ? costs[i] : least;
    for (int i = 0; i < count; ++i) costs[i] = uint16_t(costs[i] - least);
}

// The first of the states with the least cost after a step.
template <int bits>
int best_state(const uint16_t* best, int16_t target) {
    const int16_t* values = constant<ValuesByState<bits>>().at;
    uint16_t costs[kStates];
    for (int q = 0; q < kStates >> bits; ++q)
        for (int s = q << bits; s < (q + 1) << bits; ++s)
            costs[s] = uint16_t(saturated_sum(best[q], square(target, values[s])));
    uint16_t least = kLargest;
    for (int s = 0; s < kStates; ++s) least = costs[s] < least ? costs[s] : least;
    return int(std::find(costs, costs + kStates, least) - costs);
}

// Find the states [depth] of the best path that is in state `end` after `depth` steps with targets
// [depth]. `best` belongs to the first of these steps.
//
// The states that lead to `end` are few: the first has depth * bits free bits, which are its
// oldest, and each step decides the oldest of them. All bits of a path are in one word,
// (free bits) * 4096 + end.
template <int bits, int depth>
void trace(const uint16_t* best, const int16_t* target, int end, uint16_t* states) {
    if constexpr (depth > 0) {
        constexpr int branches = 1 << bits;
        const int16_t* values = constant<ValuesByState<bits>>().at;
        const auto state = [&](int step, int free) {
            return (free << kStateBits | end) >> (depth - step) * bits;
        };
        int least[1 << depth * bits];  // cost before a step, by the bits that are still free
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

// As `trace`, through all steps of a path. `steps` is a multiple of kStride, `kept` holds `best` of
// every kStride-th step, and `end` is the state in the last step.
template <class Search, int bits>
void trace_back(const uint16_t* kept, const int16_t* target, int steps, int end,
                uint16_t* states) {
    constexpr int stride = kStride[bits];
    int first = steps - stride;
    const uint16_t* best = kept + first / stride * kKeptWords<bits>;
    states[steps - 1] = uint16_t(end);
    trace<bits, stride - 1>(best, target + first, end, states + first);
    while (first > 0) {
        end = states[first];
        first -= stride;
        best -= kKeptWords<bits>;
        if (first >= 4 * stride)  // it may have left the second-level cache
            for (int i = 0; i < kStates >> bits; i += 32)
                __builtin_prefetch(best - 4 * kKeptWords<bits> + i);
        Search::template trace<bits>(best, target + first, end, states + first);
    }
}

}  // namespace
}  // namespace moepress
