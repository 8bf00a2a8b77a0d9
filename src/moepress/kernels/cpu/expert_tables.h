// The matrices of a layer's experts, found through their tables. M is ScalarMatrix or
// TrellisMatrix.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "moepress.h"
#include "trellis_code.h"

namespace moepress {

// Append to `out` the matrices that `table` [experts][2] lists: first byte, width (trellis_code.h). A matrix of
// 0 bits has no bytes. Fails where there is no such codec, or where a matrix reaches outside
// `bytes`.
template <class M>
Result read_table(const uint8_t* bytes, int64_t size, const int64_t* table, int64_t experts,
                  int64_t rows, int64_t cols, int group, std::vector<M>& out) {
    for (int64_t e = 0; e < experts; ++e) {
        const int64_t offset = table[2 * e], bits = table[2 * e + 1];
        if (bits < 0 || bits >= kWidthsEnd) return kBadCodec;
        M matrix{nullptr, rows, cols, int(bits), group};
        if (bits > 0) {
            if (!matrix.exists()) return kBadCodec;
            if (offset < 0 || offset > size || matrix.nbytes() > size - offset) return kBadBytes;
            matrix.bytes = bytes + offset;
        }
        out.push_back(matrix);
    }
    return kOk;
}

// Whether every expert has both of its matrices or, if it is left out, neither.
template <class M>
bool both_or_neither(const std::vector<M>& gate_up, const std::vector<M>& down) {
    for (size_t e = 0; e < gate_up.size(); ++e)
        if ((gate_up[e].bits == 0) != (down[e].bits == 0)) return false;
    return true;
}

}  // namespace moepress
