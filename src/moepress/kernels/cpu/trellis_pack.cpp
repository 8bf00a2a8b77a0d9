// The branches of trellis paths as stored bytes (docs/format.md). The definition and oracle is
// `pack_codes` of kernels/trellis.py.

#include <cstdint>

#include "moepress.h"
#include "threads.h"
#include "trellis_code.h"

namespace moepress {
namespace {

// What one slab holds of the 32 paths of a tile. A path is a number whose highest bits are its first
// branch: as many whole words of 16 bits as its width, and above them 8 bits of a half.
class Tile {
  public:
    // `branches` [64 rows][cols], at the first column of the tile.
    Tile(int width, const uint8_t* branches, int64_t cols) {
        const int bits[] = {branch_bits(width, 0), branch_bits(width, 1)};
        for (int row = 0; row < kSlabRows; ++row)
            for (int column = 0; column < kTileColumns; ++column) {
                uint64_t& path = paths_[row % 16 * 2 + column % 2];
                path = path << bits[column / 2 % 2] | branches[row * cols + column];
            }
    }

    uint8_t byte(int path, int place) const { return uint8_t(paths_[path] >> 8 * place); }

    // Write the words, the highest first, and return their end.
    uint8_t* write_words(int words, uint8_t* to) const {
        for (int word = words - 1; word >= 0; --word)
            for (int path = 0; path < kPaths; ++path) {
                *to++ = byte(path, 2 * word);
                *to++ = byte(path, 2 * word + 1);
            }
        return to;
    }

  private:
    uint64_t paths_[kPaths] = {};
};

void pack_slab(int width, const uint8_t* branches, int64_t cols, uint8_t* to) {
    const int words = whole_words(width);
    if (!is_half(width)) {
        for (int64_t column = 0; column < cols; column += kTileColumns)
            to = Tile(width, branches + column, cols).write_words(words, to);
        return;
    }
    for (int64_t column = 0; column < cols; column += 2 * kTileColumns) {
        const Tile even(width, branches + column, cols);
        const Tile odd(width, branches + column + kTileColumns, cols);
        for (int path = 0; path < kPaths; ++path) {  // the word of the halves of two tiles
            *to++ = odd.byte(path, 2 * words);
            *to++ = even.byte(path, 2 * words);
        }
        to = odd.write_words(words, even.write_words(words, to));
    }
}

}  // namespace
}  // namespace moepress

using namespace moepress;

int32_t moepress_trellis_pack(const uint8_t* branches, int64_t rows, int64_t cols, int32_t bits,
                              int32_t threads, uint8_t* codes) {
    if (!is_width(bits)) return kBadCodec;
    const int64_t tiles = cols / kTileColumns;
    if (rows < 1 || rows % kSlabRows != 0 || cols < 1 || cols % kTileColumns != 0 ||
        (is_half(bits) && tiles % 2 != 0) || threads < 1)
        return kBadShape;
    parallel(threads, rows / kSlabRows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t slab = begin; slab < end; ++slab)
            pack_slab(bits, branches + slab * kSlabRows * cols, cols,
                      codes + slab * tiles_bytes(bits, tiles));
    });
    return kOk;
}
