// The product of a slab of a trellis matrix and many tokens with AMX, whose tiles are matrices of
// bytes: C [16][16] int32 += A [16][64] int8 times B [64][16] uint8.
//
//     A   16 tokens, 64 columns of codes, as the panel holds them
//     B   16 rows of the matrix and 64 columns: a register of decoded bytes (trellis_bytes.h),
//         [16 rows][4 columns], is a line of it as it lies
//     C   [16 tokens][16 rows], of a group of columns
//
// 32 tokens and 32 rows are multiplied together, in four C: each tile that is loaded serves two
// products. The tiles are configured for the thread at the start of a call and released at its end:
// tiles in use make every change of threads slower.
//
// The instructions are those of <immintrin.h>. A test defines them in plain C++ instead, in a header
// of its own, MOEPRESS_TILES (tests/kernels/amx/tiles.h).
#pragma once

#include <cstdint>
#include <cstring>

#ifdef MOEPRESS_TILES
#include MOEPRESS_TILES
#else
#include <immintrin.h>
#endif

#include "isa.h"
#include "trellis_bytes.h"
#include "trellis_code.h"
#include "trellis_many.h"
#include "trellis_product.h"
#include "trellis_tile.h"

namespace moepress {
namespace {

constexpr int kTileLines = 16;
constexpr int kTileBytes = 64;  // of a line
constexpr int kTileDepth = 64;  // columns of the matrix
constexpr int kAmxTokens = 32;  // in two A

// The tiles' configuration, palette 1: all eight have 16 lines of 64 bytes.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t line_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);
// Not on the stack: GCC believes that loading a configuration reads 8 bytes of it.
constexpr TileConfig kTileConfig;

// Compilers do not know that tiles are loaded from memory and stored to it.
inline void memory_barrier() { asm volatile("" ::: "memory"); }

// A group of columns: the B of each run of 16 rows and 64 columns; the A of 32 tokens; four C. Groups
// of 32 columns leave half of A and B zero.
template <class Lanes>
struct AmxOperands {
    alignas(64) typename Lanes::Words b[kRuns][kMaxGroup / kTileDepth][kTileLines];
    alignas(64) int8_t a[kAmxTokens][kMaxGroup];
    alignas(64) int32_t c[4][kTileLines][16];
};

// C = A B for runs `run` and run + 1; `both`: for 32 tokens, else for 16, in tiles 0 and 1.
template <class Lanes>
void multiply_tiles(AmxOperands<Lanes>& w, int run, int group, bool both) {
    memory_barrier();
    _tile_zero(0);
    _tile_zero(1);
    if (both) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int k = 0; k < group; k += kTileDepth) {
        _tile_loadd(4, w.a[0] + k, kMaxGroup);
        _tile_loadd(6, w.b[run][k / kTileDepth], kTileBytes);
        _tile_loadd(7, w.b[run + 1][k / kTileDepth], kTileBytes);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        if (both) {
            _tile_loadd(5, w.a[kTileLines] + k, kMaxGroup);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
    }
    _tile_stored(0, w.c[0], kTileBytes);
    _tile_stored(1, w.c[1], kTileBytes);
    if (both) {
        _tile_stored(2, w.c[2], kTileBytes);
        _tile_stored(3, w.c[3], kTileBytes);
    }
    memory_barrier();
}

// Add a decoded group times all tokens of the panel to out [count][64].
template <class Lanes, int width>
void add_amx(AmxOperands<Lanes>& w, int64_t cols, int group, int64_t g,
             const TrellisPanel& x, float* out) {
    for (int64_t p = 0; p < x.count; p += kAmxTokens) {
        const int count = int(x.count - p < kAmxTokens ? x.count - p : kAmxTokens);
        for (int q = 0; q < count; ++q) {
            const int8_t* from = x.all.bytes + x.places[p + q] * cols + g * group;
            for (int i = 0; i < group; i += 32) std::memcpy(w.a[q] + i, from + i, 32);
        }
        for (int run = 0; run < kRuns; run += 2) {
            multiply_tiles(w, run, group, count > kTileLines);
            for (int q = 0; q < count; ++q) {
                const int64_t at = x.places[p + q] * (cols / group) + g;
                for (int r = 0; r < 2; ++r) {
                    typename Lanes::Pairs sum;
                    static_assert(sizeof sum == sizeof w.c[0][0]);
                    std::memcpy(&sum, w.c[q / kTileLines * 2 + r][q % kTileLines], sizeof sum);
                    finish_bytes<Lanes, width>(sum, x.all.scale[at], x.all.sum[at],
                                               out + (p + q) * kSlabRows + 16 * (run + r));
                }
            }
        }
    }
}

// As trellis_dot, for many tokens. Not inlined, for its operands would be on the stack of products
// with few tokens too.
template <class Lanes, int width>
[[gnu::noinline]] void many_with_amx(const uint8_t* above, const uint8_t* slab, int64_t cols,
                                     int group, const TrellisPanel& x, float* out) {
    const int tiles = group / kTileColumns;
    for (int64_t i = 0; i < x.count * kSlabRows; ++i) out[i] = 0;
    AmxOperands<Lanes> w;
    std::memset(w.a, 0, sizeof w.a);  // of tokens beyond the last
    if (group < kTileDepth) std::memset(w.b, 0, sizeof w.b);
    _tile_loadconfig(&kTileConfig);
    for (int64_t g = 0; g < cols / group; ++g) {
        const int64_t at = tiles_bytes(width, g * tiles);
        each_tile<Lanes, width>(
            above + at, slab + at, tiles,
            [&](const Tile<Lanes, width>& tile, int t) MOEPRESS_INLINE_LAMBDA {
                decode_bytes<Lanes, width>(
                    tile, [&](int i, const typename Lanes::Words& bytes) MOEPRESS_INLINE_LAMBDA {
                        const int line = t * (kTileColumns / 4) + i % 4 / 2;
                        w.b[i / 4][line / kTileLines][line % kTileLines] = bytes;
                    });
            });
        add_amx<Lanes, width>(w, cols, group, g, x, out);
    }
    _tile_release();
}

// As trellis_dot, for 8-bit activations.
template <class Lanes, int width>
void trellis_dot_amx(const uint8_t* above, const uint8_t* slab, int64_t cols, int group,
                     const TrellisPanel& panel, const uint8_t* scales, float* out) {
    static_assert(Lanes::sums_any_byte && Lanes::byte_offset == 0);
    const TrellisPanel x = panel;  // a copy: stores to `out` might alias the reference
    if (x.count < kManyTokens)
        return trellis_dot<Lanes, width, false, false>(above, slab, cols, group, x, scales, out);
    many_with_amx<Lanes, width>(above, slab, cols, group, x, out);
    scale_rows<Lanes>(scales, x.count, out);
}

template <class Lanes, int... width>
constexpr void set_trellis_amx(Isa& isa, std::integer_sequence<int, width...>) {
    ((isa.trellis_dot[0][width] = trellis_dot_amx<Lanes, width>), ...);
}

}  // namespace
}  // namespace moepress
