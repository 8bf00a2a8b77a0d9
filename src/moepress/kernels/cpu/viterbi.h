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

// The steps of a path are even or odd, which differ at half widths.
constexpr int phase_of(int width, int step) { return is_half(width) ? step % 2 : 0; }

// The value of a state in steps of 1 / unit.
template <int width, int phase = 0>
constexpr int16_t value_in_steps(int state) {
    return int16_t(code_value(state, value_bits(width, phase)) * unit_of(width));
}

// The values of all states in the order of the states.
template <int width, int phase>
struct ValuesByState {
    int16_t at[kStates];
    ValuesByState() {
        for (int s = 0; s < kStates; ++s) at[s] = value_in_steps<width, phase>(s);
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

// The first of the states with the least cost after the last step, which is odd.
template <int width>
int best_state(const uint16_t* best, int16_t target) {
    constexpr int bits = branch_bits(width, 1);
    const int16_t* values = constant<ValuesByState<width, phase_of(width, 1)>>().at;
    uint16_t costs[kStates];
    for (int q = 0; q < kStates >> bits; ++q)
        for (int s = q << bits; s < (q + 1) << bits; ++s)
            costs[s] = uint16_t(saturated_sum(best[q], square(target, values[s])));
    uint16_t least = kLargest;
    for (int s = 0; s < kStates; ++s) least = costs[s] < least ? costs[s] : least;
    int first = 0;
    while (costs[first] != least) ++first;
    return first;
}

// Find the states [depth] of the best path that is in state `end` after `depth` steps with targets
// [depth]. `best` belongs to the first of these steps, of that phase.
//
// The states that lead to `end` are few: the first has as many free bits, which are its oldest, as
// the steps after it add, and each step decides the oldest of them. All bits of a path are in one
// word, (free bits) * 4096 + end.
template <int width, int phase, int depth>
void trace(const uint16_t* best, const int16_t* target, int end, uint16_t* states) {
    if constexpr (depth > 0) {
        // Free bits in step i: those that steps i + 1 to `depth` add.
        constexpr auto open = [](int i) {
            int bits = 0;
            for (int m = i + 1; m <= depth; ++m) bits += branch_bits(width, phase + m);
            return bits;
        };
        const int16_t* values[] = {constant<ValuesByState<width, 0>>().at,
                                   constant<ValuesByState<width, phase_of(width, 1)>>().at};
        const auto state = [&](int step, int free) {
            return (free << kStateBits | end) >> open(step);
        };
        int least[1 << open(0)];  // cost before a step, by the bits that are still free
        uint8_t from[depth][1 << open(1)];
        for (int free = 0; free < 1 << open(0); ++free)
            least[free] = best[state(0, free) >> branch_bits(width, phase)];
        for (int i = 0; i < depth; ++i) {
            const int left = open(i + 1);  // free bits after the step
            const int branches = 1 << branch_bits(width, phase + i + 1);
            const int16_t* of_states = values[phase_of(width, phase + i)];
            for (int free = 0; free < 1 << left; ++free) {
                int first = INT32_MAX;  // cost * branches + j: of equal costs the smallest j
                for (int j = 0; j < branches; ++j) {
                    const int path = j << left | free;
                    const int added = square(target[i], of_states[state(i, path)]);
                    const int cost = saturated_sum(least[path], added) * branches + j;
                    first = cost < first ? cost : first;
                }
                least[free] = first / branches;
                from[i][free] = uint8_t(first % branches);
            }
        }
        for (int i = depth - 1, free = 0; i >= 0; --i) {
            free |= from[i][free] << open(i + 1);
            states[i] = uint16_t(state(i, free));
        }
    }
}

// `trace` through a stride that starts with step `first`.
template <class Search, int width>
void trace_stride(int first, const uint16_t* best, const int16_t* target, int end,
                  uint16_t* states) {
    if constexpr (!is_half(width))
        Search::template trace<width>(best, target, end, states);
    else if (first % 2 == 0)
        trace<width, 0, stride_of(width)>(best, target, end, states);
    else
        trace<width, 1, stride_of(width)>(best, target, end, states);
}

// As `trace`, through all steps of a path. `steps` is a multiple of the stride, `kept` holds `best`
// of every step that a stride starts with, and `end` is the state in the last step.
template <class Search, int width>
void trace_back(const uint16_t* kept, const int16_t* target, int steps, int end,
                uint16_t* states) {
    constexpr int stride = stride_of(width), words = kept_words(width);
    int first = steps - stride;
    const uint16_t* best = kept + first / stride * words;
    states[steps - 1] = uint16_t(end);
    trace<width, 0, stride - 1>(best, target + first, end, states + first);
    while (first > 0) {
        end = states[first];
        first -= stride;
        best -= words;
        if (first >= 4 * stride)  // it may have left the second-level cache
            for (int i = 0; i < kStates >> branch_bits(width, 0); i += 32)
                __builtin_prefetch(best - 4 * words + i);
        trace_stride<Search, width>(first, best, target + first, end, states + first);
    }
}

}  // namespace
}  // namespace moepress
