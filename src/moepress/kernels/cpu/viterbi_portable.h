// One step of Viterbi's algorithm as viterbi_tiles.h and rounding/methods/viterbi.py define it.
#pragma once

#include <cstdint>

#include "trellis_code.h"
#include "viterbi.h"

namespace moepress {
namespace {

struct PortableSearch {
    template <int width, int phase>
    static bool step(const uint16_t* best, int16_t target, bool, uint16_t* next) {
        constexpr int bits = branch_bits(width, phase), next_bits = branch_bits(width, phase + 1);
        constexpr int branches = 1 << bits, apart = kStates >> (bits + next_bits);
        const int16_t* values = constant<ValuesByState<width, phase>>().at;
        for (int r = 0; r < apart; ++r) {
            int least[branches];
            for (int& cost : least) cost = kLargest;
            for (int q = r; q < apart << next_bits; q += apart)
                for (int b = 0; b < branches; ++b) {
                    const int added = square(target, values[q * branches + b]);
                    const int cost = saturated_sum(best[q], added);
                    least[b] = cost < least[b] ? cost : least[b];
                }
            for (int b = 0; b < branches; ++b) next[r * branches + b] = uint16_t(least[b]);
        }
        return false;
    }

    template <int bits>
    static void trace(const uint16_t* best, const int16_t* target, int end, uint16_t* states) {
        moepress::trace<bits, 0, kStride[bits]>(best, target, end, states);
    }
};

}  // namespace
}  // namespace moepress
