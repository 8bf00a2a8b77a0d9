// A trellis matrix in its packed bytes (docs/format.md): slabs of 64 rows, then the scales of all
// rows.
#pragma once

#include <cstdint>

#include "trellis_code.h"

namespace moepress {

struct TrellisMatrix {
    const uint8_t* bytes;
    int64_t rows, cols;
    int bits;  // the width (trellis_code.h)
    int group;

    // Whether the format has such code bits, group size and shape. With these limits sizes in bytes
    // stay below 2^63.
    bool exists() const {
        constexpr int64_t most = int64_t(1) << 29;
        return is_width(bits) && (group == 32 || group == 64 || group == 128) && rows > 0 &&
               rows <= 2 * most && cols > 0 && cols <= most && cols % group == 0;
    }
    int64_t slabs() const { return (rows + kSlabRows - 1) / kSlabRows; }
    int64_t bytes_per_slab() const { return tiles_bytes(bits, cols / kTileColumns); }
    int64_t nbytes() const { return slabs() * (bytes_per_slab() + 2 * kSlabRows); }

    const uint8_t* slab(int64_t i) const { return bytes + i * bytes_per_slab(); }
    // The slab that precedes slab i on the paths: before the first comes the last.
    const uint8_t* slab_above(int64_t i) const { return slab(i > 0 ? i - 1 : slabs() - 1); }
    // The scales of the 64 rows of slab i, bfloat16.
    const uint8_t* scales(int64_t i) const { return slab(slabs()) + 2 * kSlabRows * i; }
};

}  // namespace moepress
