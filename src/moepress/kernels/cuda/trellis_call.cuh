// The arguments of the products of trellis matrices, and the work of a block.
#pragma once

#include "device.h"
#include "trellis_code.cuh"

namespace moepress {
namespace {

constexpr int kUnitColumns = 32;  // a unit: four tiles
constexpr int kStepUnits = 4;
constexpr int kStep = kUnitColumns * kStepUnits;  // columns: of the largest group

struct Call {
    const int8_t* q;       // [planes][rows][K]: 8 bits, or 128 * q[0] + q[1] in two planes
    const float* scale;    // [rows][K / g]
    const int32_t* sum;    // [rows][K / g] of the codes
    const int32_t* pair;   // position p has row pair[p] / choices of q; null: row p
    float* out;            // [splits][positions][stride]: to be summed over the splits
    int64_t rows, positions;
    int choices, n, stride, k, splits;  // the matrix is [n, k]
    bool late;  // wait_for_codes has not been called
};

// See `begin`. Weights can be read before, while the codes are being made, unless the kernel before
// this one may have made the panels too: then there are pairs.
DEVICE void wait_for_codes(bool now) {
    if (now) begin();
}

// What a block computes.
struct Work {
    const uint8_t* matrix;
    int halves;  // twice its code bits
    int row_block, split;
    int first, count;  // positions
};

// The row of q of a block's token.
DEVICE int64_t row_of(const Call& call, const Work& work, int token) {
    const int position = work.first + token;
    return call.pair ? call.pair[position] / call.choices : position;
}

// The work of this block; count 0: none. `size`: positions of a panel. `panel` has the expert, first
// position and count of each panel; null: positions in order. `table` has the first byte and the
// width of each expert's matrix; null: one matrix of width `bits` (both as of `halves_of`).
//
// Blocks that run at the same time share weights: those of up to 16 neighbouring panels, often of
// the same expert, follow each other, and then those of the next rows.
DEVICE Work work_of(int size, const int32_t* panel, const uint8_t* packed, int64_t packed_bytes,
                    const int64_t* table, int64_t bits, const Call& call) {
    Work work;
    const uint32_t panels = gridDim.z, others = gridDim.x * gridDim.y;
    const uint32_t id = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const uint32_t bundle = panels <= 16 ? 0 : id / (16 * others);
    const uint32_t place = id - bundle * (16 * others), width = min(16u, panels - 16 * bundle);
    const uint32_t other = place / width;
    const int at = int(16 * bundle + (place - other * width));
    work.row_block = int(other / gridDim.y);
    work.split = int(other - uint32_t(work.row_block) * gridDim.y);
    int expert = 0;
    if (panel) {
        expert = __ldcg(panel + 3 * at);
        work.first = __ldcg(panel + 3 * at + 1);
        work.count = __ldcg(panel + 3 * at + 2);
    } else {
        work.first = at * size;
        work.count = int(min(int64_t(size), call.positions - work.first));
    }
    work.matrix = packed;
    work.halves = halves_of(bits);
    if (work.count <= 0) {
        work.count = 0;
        return work;
    }
    int64_t offset = 0;
    if (table) {
        offset = table[2 * expert];
        work.halves = halves_of(table[2 * expert + 1]);
        work.matrix += offset;
    }
    const int64_t slabs = (call.n + kSlabRows - 1) / kSlabRows;
    const int64_t bytes = slabs * (int64_t(4) * call.k * work.halves + 2 * kSlabRows);
    if (!work.halves || offset < 0 || offset % 16 != 0 || bytes > packed_bytes - offset) trap();
    return work;
}

}  // namespace
}  // namespace moepress

// The kernels of a file: one for each group size and number of planes, such as
// moepress_trellis_decode_g128_p1. Compiled with MOEPRESS_GROUP and MOEPRESS_PLANES defined, the file
// has only that one. product<halves, group, planes>(call, work) is what a block does.
#define MOEPRESS_TRELLIS_KERNEL(NAME, GROUP, PLANES, THREADS, BLOCKS, SIZE, LATE, PRODUCT)         \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME##_g##GROUP##_p##PLANES(     \
        const int8_t* q, const float* scale, const int32_t* sum, int64_t planes, int64_t rows,     \
        const int32_t* pair, int64_t choices, const int32_t* panel, int64_t positions,             \
        const uint8_t* packed, int64_t packed_bytes, const int64_t* table, int64_t bits, int64_t n, \
        int64_t k, int64_t group, float* out, int64_t splits) {                                    \
        using namespace moepress;                                                                  \
        const bool late = (LATE) && !pair;                                                         \
        wait_for_codes(!late);                                                                     \
        if (planes != PLANES || group != GROUP) trap();                                            \
        const Call call = {q,    scale,     sum,          pair,   out,    rows,                    \
                           positions, int(choices), int(n), int(n), int(k), int(splits), late};    \
        const Work work =                                                                          \
            work_of((SIZE) / PLANES, panel, packed, packed_bytes, table, bits, call);              \
        if (!work.count) return wait_for_codes(late);                                              \
        if (work.halves == 2) PRODUCT<2, GROUP, PLANES>(call, work);                               \
        if (work.halves == 3) PRODUCT<3, GROUP, PLANES>(call, work);                               \
        if (work.halves == 4) PRODUCT<4, GROUP, PLANES>(call, work);                               \
        if (work.halves == 5) PRODUCT<5, GROUP, PLANES>(call, work);                               \
        if (work.halves == 6) PRODUCT<6, GROUP, PLANES>(call, work);                               \
        if (work.halves == 7) PRODUCT<7, GROUP, PLANES>(call, work);                               \
        if (work.halves == 8) PRODUCT<8, GROUP, PLANES>(call, work);                               \
    }
