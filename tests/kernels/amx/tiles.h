// The tile instructions of AMX in plain C++, as Intel's manual defines them (Software Developer's
// Manual, volume 2, LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TDPBSUD, TILERELEASE), for tests on
// machines without them. What would be an exception of the processor ends the process.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Tile {
    int lines = 0, line_bytes = 0;
    uint8_t bytes[16][64] = {};
};

struct Tiles {
    bool configured = false;
    Tile tile[8];
};

inline Tiles& tiles() {
    static thread_local Tiles all;
    return all;
}

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "emulated AMX: %s\n", what);
    std::abort();
}

inline Tile& tile(int i) {
    if (!tiles().configured) fail("a tile is used before LDTILECFG or after TILERELEASE");
    Tile& one = tiles().tile[i];
    if (one.lines == 0 || one.line_bytes == 0) fail("a tile that is not configured is used");
    return one;
}

inline void load_config(const void* from) {
    uint8_t config[64];
    std::memcpy(config, from, 64);
    if (config[0] != 1 || config[1] != 0) fail("palette or start row");
    for (int i = 2; i < 16; ++i)
        if (config[i] != 0) fail("a reserved byte is not 0");
    // The kernels release the tiles before they use them again.
    if (tiles().configured) fail("tiles were not released");
    for (int i = 0; i < 16; ++i) {
        uint16_t line_bytes;
        std::memcpy(&line_bytes, config + 16 + 2 * i, 2);
        const int lines = config[48 + i];
        if (i >= 8 && (line_bytes != 0 || lines != 0)) fail("only tiles 0 to 7 exist");
        if (line_bytes > 64 || lines > 16 || (line_bytes == 0) != (lines == 0)) fail("tile size");
        if (i >= 8) continue;
        tiles().tile[i] = Tile();
        tiles().tile[i].lines = lines;
        tiles().tile[i].line_bytes = line_bytes;
    }
    tiles().configured = true;
}

inline void release() { tiles() = Tiles(); }

inline void zero(int i) { std::memset(tile(i).bytes, 0, sizeof tile(i).bytes); }

inline void load(int i, const void* base, int64_t stride) {
    zero(i);
    for (int line = 0; line < tile(i).lines; ++line)
        std::memcpy(tile(i).bytes[line], static_cast<const char*>(base) + line * stride,
                    size_t(tile(i).line_bytes));
}

inline void store(int i, void* base, int64_t stride) {
    for (int line = 0; line < tile(i).lines; ++line)
        std::memcpy(static_cast<char*>(base) + line * stride, tile(i).bytes[line],
                    size_t(tile(i).line_bytes));
}

// c += a b: signed bytes of a times bytes of b.
inline void dpbsud(int c, int a, int b) {
    Tile &sum = tile(c), &left = tile(a), &right = tile(b);
    if (c == a || c == b || a == b) fail("TDPBSUD needs three different tiles");
    if (sum.lines != left.lines || sum.line_bytes != right.line_bytes ||
        left.line_bytes != 4 * right.lines)
        fail("the sizes of the tiles do not match");
    for (int m = 0; m < sum.lines; ++m)
        for (int n = 0; n < sum.line_bytes / 4; ++n) {
            uint32_t all;
            std::memcpy(&all, sum.bytes[m] + 4 * n, 4);
            for (int k = 0; k < right.lines; ++k)
                for (int i = 0; i < 4; ++i)
                    all += uint32_t(int8_t(left.bytes[m][4 * k + i]) * right.bytes[k][4 * n + i]);
            std::memcpy(sum.bytes[m] + 4 * n, &all, 4);
        }
}

}  // namespace emulated

#define _tile_loadconfig(config) emulated::load_config(config)
#define _tile_release() emulated::release()
#define _tile_zero(i) emulated::zero(i)
#define _tile_loadd(i, base, stride) emulated::load(i, base, stride)
#define _tile_stored(i, base, stride) emulated::store(i, base, stride)
#define _tile_dpbsud(c, a, b) emulated::dpbsud(c, a, b)
