// One step of Viterbi's algorithm as rounding/methods/viterbi.py defines it.
#pragma once

#include <cstdint>

#include "trellis_code.h"

namespace moepress {
namespace {

struct PortableSearch {
    template <int bits>
    static void step(const uint16_t* costs, const int16_t* values, int16_t target, uint16_t* next,
                     uint8_t* chosen) {
        constexpr int groups = kStates >> bits, branches = 1 << bits;
        for (int g = 0; g < groups; ++g) {
            int best = costs[g], from = 0;
            for (int j = 1; j < branches; ++j) {
                const int cost = costs[j * groups + g];
                if (cost < best) best = cost, from = j;
            }
            chosen[g] = uint8_t(from);
            for (int s = g * branches; s < (g + 1) * branches; ++s) {
                int d = int(target) - values[s];
                d = d < -32768 ? -32768 : d > 32767 ? 32767 : d;
                const int cost = best + ((d * d + (1 << 14)) >> 15);
                next[s] = uint16_t(cost > 65535 ? 65535 : cost);
            }
        }
    }
};

}  // namespace
}  // namespace moepress
