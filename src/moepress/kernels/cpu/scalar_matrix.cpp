// Sizes of a scalar matrix, and the decoding of single rows, for embeddings: the definition in
// docs/format.md, "Where to find w[n, k]", without regard to speed.

#include "scalar_matrix.h"

#include <cstring>

namespace moepress {
namespace {

constexpr int64_t kMost = int64_t(1) << 31;  // rows or columns: sizes in bytes stay below 2^63

// The value of row r and column c of a plane of `bits` bits.
unsigned plane_value(const uint8_t* plane, int bits, int r, int c) {
    const int per_chunk = 32 / bits;  // columns
    const uint8_t byte = plane[c / per_chunk * 64 + r * 4 + c % 4];
    return byte >> (bits * (c % per_chunk / 4)) & ((1u << bits) - 1);
}

}  // namespace

bool ScalarMatrix::exists() const {
    return (bits == 1 || bits == 2 || bits == 3 || bits == 4 || bits == 8) &&
           (group == 32 || group == 64 || group == 128) && rows > 0 && rows < kMost && cols > 0 &&
           cols < kMost && cols % group == 0;
}

int64_t ScalarMatrix::nbytes() const { return (blocks() * bytes_per_block() + 63) / 64 * 64; }

void ScalarMatrix::decode_row(int64_t n, float* weights) const {
    const int r = int(n % kBlockRows);
    const int64_t groups = cols / group;
    const uint8_t* start = block(n / kBlockRows);
    const uint8_t* scales = start + 2 * cols * bits;
    const uint8_t* zeros = scales + 32 * groups;
    const float levels = float((1 << bits) - 1);
    for (int64_t g = 0; g < groups; ++g) {
        const uint8_t* tile = start + g * 2 * group * bits;
        const uint8_t* two = scales + (g * 16 + r) * 2;
        const uint32_t scale_bits = uint32_t(two[0]) << 16 | uint32_t(two[1]) << 24;
        float scale;
        std::memcpy(&scale, &scale_bits, 4);
        const float zero = has_zero(bits) ? zeros[g * 16 + r] * levels / 255 : levels / 2;
        for (int c = 0; c < group; ++c) {
            const unsigned code =
                bits == 3 ? plane_value(tile, 2, r, c) | plane_value(tile + 4 * group, 1, r, c) << 2
                          : plane_value(tile, bits, r, c);
            weights[g * group + c] = scale * (float(code) - zero);
        }
    }
}

}  // namespace moepress
