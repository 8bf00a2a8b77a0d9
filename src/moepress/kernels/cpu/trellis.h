// The constants of the trellis code (kernels/trellis.py says what it is) and its two inner loops.
#pragma once

#include <cstdint>

namespace moepress {

constexpr int kStateBits = 12;
constexpr int kStates = 1 << kStateBits;
constexpr int kMultiplier[] = {0, 47255, 54641, 44529, 15601};  // by code bits
constexpr int kCenter[] = {0, 255, 255, 386, 379};
constexpr int kUnit[] = {0, 40, 64, 80, 80};  // quantizers/viterbi.py, UNITS
constexpr int kSlabRows = 64;
constexpr int kTileColumns = 8;
constexpr int kSteps = 16;  // weights of a path in a tile
constexpr int kPaths = 32;  // of a tile: 16 lanes, 2 parities

constexpr int code_value(int state, int bits) {
    const uint32_t product = uint32_t(state) * uint32_t(kMultiplier[bits]);
    int sum = int(product & 255) + int(product >> 8 & 255);
    if (bits > 2) sum += int(product >> 16 & 255) + int(product >> 24);
    return sum - kCenter[bits];
}

// One step of Viterbi's algorithm: costs of all states to `next`, and for each group of states with
// the same older bits, [2^(12 - bits)], which predecessor was the best. `values` are in steps.
using ViterbiStep = void (*)(const uint16_t* costs, const int16_t* values, int16_t target,
                             uint16_t* next, uint8_t* origin);

}  // namespace moepress
