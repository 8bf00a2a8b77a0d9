// Activations as integer codes, one scale for each group of columns: rotated where the weights are
// trellis codes (kernels/trellis.py), then rounded (reference.round_activations). The same floats in
// the same order as there, so the codes are equal too. Or as bfloat16 numbers.
//
// A warp takes a unit of a row: a run of the rotation, 32, 64, 128 or 256 columns, or up to 128 columns
// that are not rotated. A lane has n = 1, 2, 4 or 8 neighbouring ones. A group lies within a unit.
#pragma once

#include "numbers.h"

namespace moepress {
namespace {

// The rotation of a unit: signs, then sums and differences of columns 1, 2, 4 .. apart.
template <int n>
DEVICE void rotate(float (&x)[n]) {
    const int lane = lane_id();
#pragma unroll
    for (int j = 0; j < n; ++j) {
        uint32_t h = uint32_t(lane * n + j);
        h = (h ^ h >> 16) * 0x85EBCA6Bu;
        h = (h ^ h >> 13) * 0xC2B2AE35u;
        h ^= h >> 16;
        x[j] = __uint_as_float(__float_as_uint(x[j]) ^ h << 31);
    }
#pragma unroll
    for (int half = 1; half < n; half *= 2) {
        float y[n];
#pragma unroll
        for (int j = 0; j < n; ++j) y[j] = j & half ? x[j ^ half] - x[j] : x[j] + x[j ^ half];
#pragma unroll
        for (int j = 0; j < n; ++j) x[j] = y[j];
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2)
#pragma unroll
        for (int j = 0; j < n; ++j) {
            const float other = __shfl_xor_sync(~0u, x[j], step);
            x[j] = lane & step ? other - x[j] : x[j] + other;
        }
    constexpr float normal = n == 1   ? 0.17677669529663689f
                             : n == 2 ? 0.125f
                             : n == 4 ? 0.08838834764831845f
                                      : 0.0625f;
#pragma unroll
    for (int j = 0; j < n; ++j) x[j] *= normal;  // 1 / sqrt(32 n)
}

// Numbers in memory, to be rounded as they are.
struct Inputs {
    const void* x;  // [rows][K]
    int64_t dtype, cols;

    template <int n>
    DEVICE void load(int row, int column, float (&out)[n]) const {
        load_numbers(x, row * cols + column, dtype, out);
    }
};

// The columns of a unit: the largest power of two up to `most` that divides `cols`.
DEVICE int largest_unit(int cols, int most) { return min(cols & -cols, most); }

// Where the codes go, and how they are made. Sizes are powers of two where a shift is kept.
struct Codes {
    int8_t* q;       // [planes][rows][K]
    float* scale;    // [rows][K / g]
    int32_t* sum;    // [rows][K / g]
    int planes;
    int group_shift;
    bool rotates, halves;
    int rows, cols;

    DEVICE bool rotated() const { return rotates; }
    DEVICE int unit() const { return largest_unit(cols, rotates ? 256 : 128); }
};

// Where rounded numbers go: the columns first .. first + cols - 1 of matrices of `stride` columns.
struct Bfloats {
    uint16_t* out;            // [..][stride]
    const int32_t* position;  // [rows][copies]: rows of `out`, or -1; null: the same row
    int copies;
    int64_t stride;
    int first, cols;
    int run;  // of the rotation; 0: not rotated

    DEVICE bool rotated() const { return run > 0; }
    DEVICE int unit() const { return run ? run : largest_unit(cols, 128); }
};

// Where the code of a column is. With halves, the codes of 32 columns are those of the first 4
// columns of each 8, then the others: a lane's 4 bytes of two registers of trellis_code.cuh.
DEVICE int place_of(int column, bool halves) {
    if (!halves) return column;
    return (column & ~31) | (column & 4) << 2 | (column >> 1 & 12) | (column & 3);
}

template <int n>
DEVICE void store_codes(int8_t* to, const int (&code)[n], bool halves) {
    if (n >= 4) {
        uint32_t word[(n + 3) / 4] = {};
#pragma unroll
        for (int j = 0; j < n; ++j) word[j / 4] |= (uint32_t(code[j]) & 255) << 8 * (j % 4);
#pragma unroll
        for (int j = 0; j < n / 4; ++j)
            *reinterpret_cast<uint32_t*>(to + (halves ? 16 * j : 4 * j)) = word[j];
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
        store_codes(to + int64_t(out.rows) * out.cols, low, out.halves);
    }
    store_codes(to, code, out.halves);
    if ((lane_id() & (lanes - 1)) == 0) {
        const int64_t groups = out.cols >> out.group_shift;
        const int64_t at = row * groups + (column >> out.group_shift);
        out.scale[at] = counts ? amax / range : finite ? 0.0f : __uint_as_float(0x7FC00000u);
        out.sum[at] = sum;
    }
}

template <int n>
DEVICE void round_unit(const float (&x)[n], int row, int column, const Bfloats& out) {
    uint32_t words[(n + 1) / 2];
#pragma unroll
    for (int j = 0; j < n; j += 2) words[j / 2] = floats_to_bfloats(x[j], x[n == 1 ? 0 : j + 1]);
    for (int i = 0; i < out.copies; ++i) {
        const int64_t at = out.position ? out.position[int64_t(row) * out.copies + i] : row;
        if (at < 0) continue;
        uint16_t* const to = out.out + at * out.stride + (out.first + column);
        if constexpr (n == 8)
            *reinterpret_cast<uint4*>(to) =
                make_uint4(words[0], words[1], words[2], words[3]);
        else if constexpr (n == 4)
            *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
        else if constexpr (n == 2)
            *reinterpret_cast<uint32_t*>(to) = words[0];
        else
            *to = uint16_t(words[0]);
    }
}

// The unit of 32 n columns with a number, among those of `rows` rows: `source` gives its inputs.
template <int n, class Source, class Sink>
DEVICE void round_numbered(const Source& source, uint32_t index, int rows, const Sink& out) {
    const uint32_t units = uint32_t(out.cols) / (32 * n), row = index / units;
    if (row >= uint32_t(rows)) return;
    const int column = int(index - row * units) * (32 * n) + lane_id() * n;
    float x[n];
    source.template load<n>(int(row), column, x);
    if (out.rotated()) rotate(x);
    round_unit(x, int(row), column, out);
}

// The work of block `block`: a unit for each of its warps. `rows` may be fewer than those that the
// grid is made for.
template <class Source, class Sink>
DEVICE void round_rows(const Source& source, int block, int rows, const Sink& out) {
    const uint32_t index = uint32_t(block) * (blockDim.x / 32) + uint32_t(warp_id());
    const int unit = out.unit();
    if (unit == 256)
        round_numbered<8>(source, index, rows, out);
    else if (unit == 128)
        round_numbered<4>(source, index, rows, out);
    else if (unit == 64)
        round_numbered<2>(source, index, rows, out);
    else
        round_numbered<1>(source, index, rows, out);
}

}  // namespace
}  // namespace moepress
