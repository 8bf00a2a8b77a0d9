// The values that branches of trellis codes choose, kernels/trellis.py's `code_matrix`.
//
// A thread has the two paths through a lane of a tile: rows lane, lane + 16, + 32 and + 48 of a slab
// of 64 rows, and 8 columns. Their states begin with the branches of the last three rows in the slab
// above, of 12 steps: 12 bits or more. Above the first slab is the last one. Neighbouring threads
// have neighbouring tiles. Limit: writing 4 bytes for each weight.
#include "device.h"

namespace {

constexpr int kThreads = 128;
constexpr int kSlabRows = 64;
constexpr int kLanes = 16;
constexpr uint32_t kStates = 4096;

// Of even or of odd steps.
struct Code {
    int width;            // of branches
    uint32_t multiplier;  // of the states
    uint32_t bytes;       // of the product that are summed
    int center;
};

DEVICE float value_of(uint32_t state, const Code& code) {
    const uint32_t product = state * code.multiplier & code.bytes;
    const uint32_t sum =
        (product & 255) + (product >> 8 & 255) + (product >> 16 & 255) + (product >> 24);
    return float(int(sum) - code.center);
}

DEVICE uint32_t after(uint32_t state, uint32_t branch, const Code& code) {
    return (state << code.width | branch) & (kStates - 1);
}

DEVICE uint32_t byte_of(const uint2& eight, int column) {
    return (column < 4 ? eight.x : eight.y) >> 8 * (column % 4) & 255;
}

}  // namespace

// out [rows][columns] float32 = the values of branches [rows][columns]; `rows` is a multiple of 64,
// `columns` of 8. `bytes`: a mask of the bytes that are summed.
//
// Grid: (columns / 8 / 128 rounded up, 16 lanes, rows / 64). Threads: 128.
extern "C" __global__ void __launch_bounds__(kThreads)
moepress_values(const uint8_t* branches, int64_t rows, int64_t columns, int64_t even_width,
                int64_t even_multiplier, int64_t even_bytes, int64_t even_center,
                int64_t odd_width, int64_t odd_multiplier, int64_t odd_bytes, int64_t odd_center,
                float* out) {
    begin();
    const int64_t tile = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (tile >= columns / 8) return;
    const Code codes[2] = {
        {int(even_width), uint32_t(even_multiplier), uint32_t(even_bytes), int(even_center)},
        {int(odd_width), uint32_t(odd_multiplier), uint32_t(odd_bytes), int(odd_center)}};
    const int64_t slabs = rows / kSlabRows, slab = blockIdx.z;
    const int64_t above = slab ? slab - 1 : slabs - 1;
    const auto place = [&](int64_t of_slab, int row) {
        return (of_slab * kSlabRows + kLanes * row + blockIdx.y) * columns + 8 * tile;
    };
    uint32_t state[2] = {0, 0};
#pragma unroll
    for (int row = 1; row < 4; ++row) {
        const uint2 eight = *reinterpret_cast<const uint2*>(branches + place(above, row));
#pragma unroll
        for (int column = 0; column < 8; ++column)
            state[column % 2] =
                after(state[column % 2], byte_of(eight, column), codes[column / 2 % 2]);
    }
#pragma unroll
    for (int row = 0; row < 4; ++row) {
        const uint2 eight = *reinterpret_cast<const uint2*>(branches + place(slab, row));
        float value[8];
#pragma unroll
        for (int column = 0; column < 8; ++column) {
            const Code& code = codes[column / 2 % 2];
            uint32_t& path = state[column % 2];
            path = after(path, byte_of(eight, column), code);
            value[column] = value_of(path, code);
        }
        float4* const to = reinterpret_cast<float4*>(out + place(slab, row));
        to[0] = make_float4(value[0], value[1], value[2], value[3]);
        to[1] = make_float4(value[4], value[5], value[6], value[7]);
    }
}
