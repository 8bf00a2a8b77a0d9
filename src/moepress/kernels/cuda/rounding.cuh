// Activations as integer codes, one scale for each group of columns: rotated where the weights are
// trellis codes (kernels/trellis.py), then rounded (reference.round_activations). The same floats in
// the same order as there, so the codes are equal too.
//
// A warp takes a unit of 32, 64 or 128 columns of a row, n = 1, 2 or 4 neighbouring ones a lane. A
// group, and a run of the rotation of up to 128 columns, lie within a unit. A block takes one longer
// run, in shared memory.
#pragma once

#include "numbers.h"

namespace moepress {
namespace {

constexpr int kUnit = 128;

// x of a lane <- x of the rotation, for runs inside a warp's unit: steps of halves 1, 2, 4 ..
template <int n>
DEVICE void hadamard(float (&x)[n], int run) {
#pragma unroll
    for (int half = 1; half < n; half *= 2) {
        if (half >= run) return;
        float y[n];
#pragma unroll
        for (int j = 0; j < n; ++j) y[j] = j & half ? x[j ^ half] - x[j] : x[j] + x[j ^ half];
#pragma unroll
        for (int j = 0; j < n; ++j) x[j] = y[j];
    }
    const int lane = lane_id();
#pragma unroll 1
    for (int step = 1; step * n < run; step *= 2)
#pragma unroll
        for (int j = 0; j < n; ++j) {
            const float other = __shfl_xor_sync(~0u, x[j], step);
            x[j] = lane & step ? other - x[j] : x[j] + other;
        }
}

DEVICE float with_sign(float x, uint32_t column) {
    uint32_t h = column;
    h = (h ^ h >> 16) * 0x85EBCA6Bu;
    h = (h ^ h >> 13) * 0xC2B2AE35u;
    h ^= h >> 16;
    return __uint_as_float(__float_as_uint(x) ^ h << 31);
}

// Where the codes go, and how they are made. Sizes are powers of two where a shift is kept.
struct Codes {
    int8_t* q;       // [planes][rows][K]
    float* scale;    // [rows][K / g]
    int32_t* sum;    // [rows][K / g]
    int planes;
    int group_shift;
    bool halves;
    int rows, cols;
};

// Where the code of a column is. With halves, the codes of 32 columns are those of the first 4
// columns of each 8, then the others: a lane's 4 bytes of two registers of trellis_code.cuh.
DEVICE int place_of(int column, bool halves) {
    if (!halves) return column;
    return (column & ~31) | (column & 4) << 2 | (column >> 1 & 12) | (column & 3);
}

template <int n>
DEVICE void store_codes(int8_t* to, const int (&code)[n]) {
    if (n == 4) {
        uint32_t word = 0;
#pragma unroll
        for (int j = 0; j < n; ++j) word |= (uint32_t(code[j]) & 255) << 8 * j;
        *reinterpret_cast<uint32_t*>(to) = word;
    } else {
#pragma unroll
        for (int j = 0; j < n; ++j) to[j] = int8_t(code[j]);
    }
}

// Round a lane's n numbers, which begin at `column`, together with those of the group's other lanes.
template <int n>
DEVICE void round_unit(const float (&x)[n], int row, int column, const Codes& out) {
    uint32_t largest = 0;  // bits of the largest |x|: they order as the floats do, NaN last
#pragma unroll
    for (int j = 0; j < n; ++j) largest = max(largest, __float_as_uint(x[j]) & 0x7FFFFFFFu);
    const int lanes = (1 << out.group_shift) / n;
    if (lanes == 32)
        largest = __reduce_max_sync(~0u, largest);
    else
        for (int step = 1; step < lanes; step *= 2)
            largest = max(largest, __shfl_xor_sync(~0u, largest, step));
    const float amax = __uint_as_float(largest), range = out.planes == 1 ? 127.0f : 16256.0f;
    const bool finite = largest < 0x7F800000u, counts = finite && amax >= 0x1p-100f;
    const float inverse = counts ? range / amax : 0.0f;
    int code[n], sum = 0;
#pragma unroll
    for (int j = 0; j < n; ++j) {
        code[j] = counts ? __float2int_rn(x[j] * inverse) : 0;
        sum += code[j];
    }
    if (lanes == 32)
        sum = __reduce_add_sync(~0u, sum);
    else
        for (int step = 1; step < lanes; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    int8_t* to = out.q + int64_t(row) * out.cols + place_of(column, out.halves);
    if (out.planes == 2) {
        int low[n];
#pragma unroll
        for (int j = 0; j < n; ++j) {
            const int high = (code[j] + 64) >> 7;
            low[j] = code[j] - 128 * high;
            code[j] = high;
        }
        store_codes(to + int64_t(out.rows) * out.cols, low);
    }
    store_codes(to, code);
    if ((lane_id() & (lanes - 1)) == 0) {
        const int64_t groups = out.cols >> out.group_shift;
        const int64_t at = row * groups + (column >> out.group_shift);
        out.scale[at] = counts ? amax / range : finite ? 0.0f : __uint_as_float(0x7FC00000u);
        out.sum[at] = sum;
    }
}

// The unit of 32 n columns with a number, among those of `rows` rows: `source` gives its inputs.
// run = 0: not rotated.
template <int n, class Source>
DEVICE void unit(const Source& source, uint32_t index, int rows, int run, float normal,
                 const Codes& out) {
    const uint32_t units = uint32_t(out.cols) / (32 * n), row = index / units;
    if (row >= uint32_t(rows)) return;
    const int column = int(index - row * units) * (32 * n) + lane_id() * n;
    float x[n];
    source.template load<n>(int(row), column, x);
    if (run) {
#pragma unroll
        for (int j = 0; j < n; ++j) x[j] = with_sign(x[j], uint32_t(column + j) & (run - 1));
        hadamard(x, run);
#pragma unroll
        for (int j = 0; j < n; ++j) x[j] *= normal;
    }
    round_unit(x, int(row), column, out);
}

// One run of more than 128 columns, by a block. Shared memory: the run in float32.
template <class Source>
DEVICE void long_run(const Source& source, uint32_t index, int rows, int run, float normal,
                     const Codes& out) {
    auto* const buffer = shared_memory<float>();
    const uint32_t runs = uint32_t(out.cols) / uint32_t(run), row = index / runs;
    if (row >= uint32_t(rows)) return;
    const int first = int(index - row * runs) * run, threads = int(blockDim.x);
    float x[4];
    for (int at = int(threadIdx.x) * 4; at < run; at += threads * 4) {
        source.template load<4>(int(row), first + at, x);
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j] = with_sign(x[j], uint32_t(at + j));
        hadamard(x, kUnit);
#pragma unroll
        for (int j = 0; j < 4; ++j) buffer[at + j] = x[j];
    }
    __syncthreads();
    for (int half = kUnit; half < run; half *= 2) {
        for (int pair = int(threadIdx.x); pair < run / 2; pair += threads) {
            const int low = 2 * (pair & ~(half - 1)) | (pair & (half - 1));
            const float a = buffer[low], b = buffer[low + half];
            buffer[low] = a + b;
            buffer[low + half] = a - b;
        }
        __syncthreads();
    }
    for (int at = int(threadIdx.x) * 4; at < run; at += threads * 4) {
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j] = buffer[at + j] * normal;
        round_unit(x, int(row), first + at, out);
    }
}

// The work of block `block`: a long run, or a unit for each of its warps. `rows` may be fewer than
// those that the grid is made for.
template <class Source>
DEVICE void round_rows(const Source& source, int block, int rows, int run, float normal,
                       const Codes& out) {
    if (run > kUnit) return long_run(source, uint32_t(block), rows, run, normal, out);
    const uint32_t index = uint32_t(block) * (blockDim.x / 32) + uint32_t(warp_id());
    if (out.cols % 128 == 0)
        unit<4>(source, index, rows, run, normal, out);
    else if (out.cols % 64 == 0)
        unit<2>(source, index, rows, run, normal, out);
    else
        unit<1>(source, index, rows, run, normal, out);
}

}  // namespace
}  // namespace moepress
