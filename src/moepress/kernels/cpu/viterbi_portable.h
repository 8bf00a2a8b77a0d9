// One step of Viterbi's algorithm as viterbi_tiles.h and rounding/methods/viterbi.py define it.
#pragma once

#include <cstdint>
#include <cstring>

#include "trellis_code.h"
#include "viterbi.h"

namespace moepress {
namespace {

struct PortableSearch {
    template <int bits>
    static void order(const int16_t* values, int16_t* ordered) {
        std::memcpy(ordered, values, kStates * sizeof *values);
    }

    template <int bits>
    static bool step(const uint16_t* best, const int16_t* ordered, int16_t target, bool,
                     uint16_t* next) {
        constexpr int groups = kStates >> bits;
        for (int g = 0; g < groups; ++g) {
            int least = kLargest;
            for (int s = g; s < kStates; s += groups) {
                const int cost = saturated_sum(best[s >> bits], square(target, ordered[s]));
                least = cost < least ? cost : least;
            }
            next[g] = uint16_t(least);
        }
        return false;
    }
};

}  // namespace
}  // namespace moepress
