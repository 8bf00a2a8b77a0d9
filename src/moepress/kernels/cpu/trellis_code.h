// The constants of the trellis code and the value of a state. kernels/trellis.py explains the code.
// Kernels for CUDA include this file too.
#pragma once

#ifndef __CUDACC_RTC__  // NVRTC has no headers of the host: cuda/device.h has the types
#include <cstdint>
#endif

namespace moepress {

constexpr int kStateBits = 12;
constexpr int kStates = 1 << kStateBits;
constexpr int kMultiplier[] = {0, 47255, 54641, 44529, 15601};  // by code bits
constexpr int kCenter[] = {0, 255, 255, 386, 379};              // by code bits
constexpr int kUnit[] = {0, 40, 64, 80, 80};  // by code bits: UNITS of rounding/methods/viterbi.py
constexpr int kSlabRows = 64;
constexpr int kTileColumns = 8;
constexpr int kSteps = 16;  // weights that a path has in a tile
constexpr int kPaths = 32;  // through a tile: 16 lanes, 2 parities

// Viterbi's algorithm keeps the costs of every kStride-th step: that suffices to find the way back,
// and is 1 KB for a step or less. Costs of steps lie 64 bytes more than their size apart. At a
// distance of 4096 bytes, a load would wait for a store with the same lower bits of its address.
constexpr int kStride[] = {0, 4, 2, 1, 1};  // by code bits
template <int bits>
constexpr int kKeptWords = (kStates >> bits) + 32;

// The sum of the lowest 2 or 4 bytes of state * multiplier, minus the center.
static constexpr int code_value(int state, int bits) {
    const uint32_t product = uint32_t(state) * uint32_t(kMultiplier[bits]);
    int sum = int(product & 255) + int(product >> 8 & 255);
    if (bits > 2) sum += int(product >> 16 & 255) + int(product >> 24);
    return sum - kCenter[bits];
}

}  // namespace moepress
