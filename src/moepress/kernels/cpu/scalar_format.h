// Sizes in the layout of scalar matrices (docs/format.md, "Blocks"). Internal linkage: files that
// are compiled for different instruction sets must not share a function.
#pragma once

#include <cstdint>

namespace moepress {
namespace {

constexpr int kBlockRows = 16;

// Whether a width stores a zero code for each row and group. 1 and 8 bits have a symmetric grid.
constexpr bool has_zero(int bits) { return bits >= 2 && bits <= 4; }

// The bytes of a block: codes, scales, zero codes.
constexpr int64_t block_bytes(int64_t cols, int bits, int group) {
    return 2 * cols * bits + (has_zero(bits) ? 48 : 32) * (cols / group);
}

}  // namespace
}  // namespace moepress
