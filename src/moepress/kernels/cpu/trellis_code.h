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
constexpr int kUnit[] = {0, 40, 64, 80, 80};                     // by code bits: `unit_of`
constexpr int kSlabRows = 64;
constexpr int kTileColumns = 8;
constexpr int kSteps = 16;  // weights that a path has in a tile
constexpr int kPaths = 32;  // through a tile: 16 lanes, 2 parities

// A width is 1, 2, 3 or 4 bits or, as ten times its bits, a half width: 15, 25 or 35 (`width_number`
// of format/codec.py). Half widths have branches of two widths in turn, by the parity of the step,
// and half a word more than `whole_words` in a tile; two tiles share the word of their halves.
constexpr int kWidthsEnd = 36;  // of tables by width
constexpr bool is_half(int width) { return width > 8; }
constexpr bool is_width(int width) {
    return (width >= 1 && width <= 4) || width == 15 || width == 25 || width == 35;
}
constexpr int whole_words(int width) { return is_half(width) ? width / 10 : width; }
constexpr int branch_bits(int width, int step) {
    return whole_words(width) + (is_half(width) ? step % 2 : 0);
}
// The whole width whose values a step has.
constexpr int value_bits(int width, int step) {
    return width == 15 ? 1 + step % 2 : whole_words(width) + (is_half(width) ? 1 : 0);
}
constexpr bool sums_four_bytes(int width) { return value_bits(width, 1) > 2; }
constexpr int center_of(int width) { return kCenter[value_bits(width, 1)]; }  // of all its values
// Bits of a path in its first `steps` steps.
constexpr int path_bits(int width, int steps) {
    return is_half(width) ? width * steps / 10 : width * steps;
}
// Bytes of tiles, an even number of them at half widths.
constexpr int64_t tiles_bytes(int width, int64_t tiles) {
    return tiles * 4 * path_bits(width, kSteps);
}

// Viterbi's algorithm keeps the costs of every kStride-th step: that suffices to find the way back,
// and is 1 KB for a step or less. Costs of steps lie 64 bytes more than their size apart. At a
// distance of 4096 bytes, a load would wait for a store with the same lower bits of its address.
// 1.5 bits: 2 KB for a step.
constexpr int kStride[] = {0, 4, 2, 1, 1};  // by code bits
constexpr int stride_of(int width) {
    return is_half(width) ? (width == 15 ? 2 : 1) : kStride[width];
}
constexpr int kept_words(int width) { return (kStates >> branch_bits(width, 0)) + 32; }

// Targets and values are rounded to steps of 1 / unit: UNITS of rounding/methods/viterbi.py.
constexpr int unit_of(int width) {
    return is_half(width) ? (width == 15 ? 52 : 80) : kUnit[width];
}

// The sum of the lowest 2 or 4 bytes of state * multiplier, minus the center.
static constexpr int code_value(int state, int bits) {
    const uint32_t product = uint32_t(state) * uint32_t(kMultiplier[bits]);
    int sum = int(product & 255) + int(product >> 8 & 255);
    if (bits > 2) sum += int(product >> 16 & 255) + int(product >> 24);
    return sum - kCenter[bits];
}

}  // namespace moepress
