// What the search for the best paths (viterbi.cpp) does with costs between its steps. The steps are
// in viterbi_avx2.h and viterbi_portable.h. Internal linkage: each instruction set compiles its own
// copy.
#pragma once

#include <cstdint>

#include "trellis_code.h"

namespace moepress {
namespace {

// Subtract the least cost from all, which keeps their order and leaves room for sums to grow.
inline void subtract_least(uint16_t* costs) {
    uint16_t least = 65535;
    for (int s = 0; s < kStates; ++s) least = costs[s] < least ? costs[s] : least;
    for (int s = 0; s < kStates; ++s) costs[s] = uint16_t(costs[s] - least);
}

}  // namespace
}  // namespace moepress
