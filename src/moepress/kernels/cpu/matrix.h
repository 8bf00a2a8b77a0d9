// A packed matrix of docs/format.md: where its blocks are, whether it fits its bytes, single rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace moepress {

// Whether every expert has both of its matrices or, left out, neither.
template <class M>
bool both_or_neither(const std::vector<M>& gate_up, const std::vector<M>& down) {
    for (size_t e = 0; e < gate_up.size(); ++e)
        if ((gate_up[e].bits == 0) != (down[e].bits == 0)) return false;
    return true;
}

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
