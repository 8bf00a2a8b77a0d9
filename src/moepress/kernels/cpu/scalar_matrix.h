// A scalar matrix in its packed bytes (docs/format.md): blocks of 16 rows. Where they are, and
// single rows of weights.
#pragma once

#include <cstdint>

#include "scalar_format.h"

namespace moepress {

struct ScalarMatrix {
    const uint8_t* bytes;
    int64_t rows, cols;
    int bits, group;

    bool exists() const;    // whether the format has such code bits, group size and shape
    int64_t nbytes() const;  // of all blocks, with the padding at the end
    int64_t blocks() const { return (rows + kBlockRows - 1) / kBlockRows; }
    int64_t bytes_per_block() const { return block_bytes(cols, bits, group); }
    const uint8_t* block(int64_t i) const { return bytes + i * bytes_per_block(); }

    // Decode row n to weights [cols], with each operation of the format rounded to float32.
    void decode_row(int64_t n, float* weights) const;
};

}  // namespace moepress
