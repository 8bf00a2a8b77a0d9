// What a search does to all costs beside the steps (viterbi_*.h): loops that vectorise.
#pragma once

#include <cstdint>

#include "trellis.h"

namespace {

// Subtract the least cost from all. Which is which stays the same.
void subtract_least(uint16_t* costs) {
    uint16_t least = 65535;
    for (int s = 0; s < moepress::kStates; ++s) least = costs[s] < least ? costs[s] : least;
    for (int s = 0; s < moepress::kStates; ++s) costs[s] = uint16_t(costs[s] - least);
}

}  // namespace
