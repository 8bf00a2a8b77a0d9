// The values that the branches of trellis paths choose. The definition and oracle is
// kernels/trellis.py.

#include <cstdint>

#include "moepress.h"
#include "threads.h"
#include "trellis_code.h"

namespace moepress {
namespace {

struct Values {  // by state
    float at[kStates];
    explicit Values(int bits) {
        for (int s = 0; s < kStates; ++s) at[s] = float(code_value(s, bits));
    }
};

const Values& values_of(int bits) {
    static const Values values[] = {Values(1), Values(2), Values(3), Values(4)};
    return values[bits - 1];
}

// The 32 paths of a tile, and the states they have reached. A row belongs to the two paths of its
// lane: even columns to one, odd columns to the other.
class Tile {
  public:
    Tile(int width, int64_t cols) : cols_(cols) {
        for (int step : {0, 1}) {
            bits_[step] = branch_bits(width, step);
            values_[step] = values_of(value_bits(width, step)).at;
        }
    }

    // Pass the rows first .. last - 1 of `branches` and, where `out` is not null, write values.
    void pass(const uint8_t* branches, int64_t first, int64_t last, float* out) {
        for (int64_t row = first; row < last; ++row) {
            uint32_t* state = states_[row % 16];
            const uint8_t* from = branches + row * cols_;
            for (int column = 0; column < kTileColumns; ++column) {
                const int step = column / 2 % 2;  // its parity
                uint32_t& reached = state[column % 2];
                reached = (reached << bits_[step] | from[column]) & (kStates - 1);
                if (out) out[row * cols_ + column] = values_[step][reached];
            }
        }
    }

  private:
    int bits_[2];
    int64_t cols_;
    const float* values_[2];
    uint32_t states_[16][2] = {};
};

}  // namespace
}  // namespace moepress

using namespace moepress;

int32_t moepress_trellis_values(const uint8_t* branches, int64_t rows, int64_t cols, int32_t bits,
                                int32_t threads, float* values) {
    if (!is_width(bits)) return kBadCodec;
    if (rows < 1 || rows % kSlabRows != 0 || cols < 1 || cols % kTileColumns != 0 || threads < 1)
        return kBadShape;
    constexpr int64_t kTilesPerLine = 8;  // of 64 bytes of branches
    parallel(threads, cols / kTileColumns, kTilesPerLine, [&](int64_t begin, int64_t end) {
        for (int64_t column = begin * kTileColumns; column < end * kTileColumns;
             column += kTileColumns) {
            Tile tile(bits, cols);
            // The end of a path precedes its start, and a state spans less than a slab.
            tile.pass(branches + column, rows - kSlabRows, rows, nullptr);
            tile.pass(branches + column, 0, rows, values + column);
        }
    });
    return kOk;
}
