// A packed matrix of docs/format.md: where its blocks are, whether it fits its bytes, single rows.
#pragma once

#include <cstdint>

namespace moepress {

struct Matrix {
    const uint8_t* bytes;
    int64_t rows, cols;
    int bits, group;

    bool exists() const;          // whether there is such a codec, and rows of this length
    int64_t block_bytes() const;  // of 16 rows
    int64_t nbytes() const;       // of all, padding included
    int64_t blocks() const { return (rows + 15) / 16; }
    const uint8_t* block(int64_t i) const { return bytes + i * block_bytes(); }

    // The weights of one row, each operation of the format rounded to float32.
    void row(int64_t n, float* weights) const;
};

}  // namespace moepress
