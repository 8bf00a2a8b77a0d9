// Scalar codes as operands of the tensor cores' byte products (family int of docs/format.md).
//
// A product of 16 rows and 32 columns takes from lane 4 r + j four codes of each of the rows r and
// r + 8 for two columns' positions j. Which of the 16 rows is r, and which 32 columns of a group
// are multiplied at once, is free, as long as the activations agree. So a thread takes what lies
// together in the packed bytes:
//
//   rows      one warp has 32 rows, two blocks. Lane 4 r + j has the four rows 4 (r % 4) .. + 3 of
//             block r / 4: 16 neighbouring bytes of a chunk, one load. The first two are the rows
//             r and r + 8 of one product, the last two those of a second.
//   columns   of a group, thread j has columns j * group / 4 .. (j + 1) * group / 4 - 1: one or
//             more whole chunks, or a part of one. A field (4 columns in the bytes of a word, at
//             the same bits of each) is one register of the operand.
//
// A field is moved to the top of its bytes and masked: no value moves between threads, and the
// codes are 2^(8 - bits) times as large, which the end of the kernel takes back, exactly.
#pragma once

#include "device.h"

namespace moepress {
namespace {

constexpr int kBlockRows = 16;
constexpr int kWarpRows = 2 * kBlockRows;

// Sums start at this integer: the bits of the float 1.5 * 2^23. The sum of a group is below 2^22
// (at most 255 * 127 * 128), so kSumStart + sum has the bits of the float 1.5 * 2^23 + sum.
constexpr int kSumStart = 0x4B400000;
constexpr float kSumStartFloat = 12582912.0f;

// What a thread has of one group: the codes of four rows (x, y, z, w), their scales and zero codes.
template <int bits, int group>
struct Part {
    static constexpr int kPlane = bits == 3 ? 2 : bits;    // bits of the plane of low bits
    static constexpr int kFields = group / 16;             // of a thread in a group
    static constexpr int kLow = kFields * kPlane / 8 ? kFields * kPlane / 8 : 1;  // words of a row
    static constexpr int kHigh = bits == 3 ? (kFields / 8 ? kFields / 8 : 1) : 0;
    static constexpr bool kHasZero = bits >= 2 && bits <= 4;
    static constexpr int kTile = 2 * group * bits;         // bytes of a block's codes of a group

    uint4 low[kLow];
    uint4 high[kHigh ? kHigh : 1];
    uint2 scale;
    uint32_t zero;
};

// Where a thread's parts are.
template <int bits, int group>
struct Place {
    using P = Part<bits, group>;
    const uint8_t* start;               // of the block
    uint32_t low, high, scale, zero;    // from there, for group 0
    int low_shift, high_shift;  // of the thread's fields in their words, if these have others too

    // Block `block` of a matrix [., cols] at `matrix`.
    DEVICE Place(const uint8_t* matrix, int block, int cols) {
        const uint32_t groups = uint32_t(cols) / group, codes = 2u * uint32_t(cols) * bits;
        const int quad = lane_id() >> 2 & 3, field = (lane_id() & 3) * P::kFields;
        start = matrix + block * int64_t(codes + (P::kHasZero ? 48 : 32) * groups);
        low = 64 * (field * P::kPlane / 8) + 16 * quad;
        low_shift = field * P::kPlane % 8;
        high = 4 * group + 64 * (field / 8) + 16 * quad;
        high_shift = field % 8;
        scale = codes + 8 * quad;
        zero = codes + 32 * groups + 4 * quad;
    }

    DEVICE void load(P& part, int group_index) const {
        const uint32_t g = uint32_t(group_index);
        const uint8_t* codes = start + (low + g * P::kTile);
#pragma unroll
        for (int i = 0; i < P::kLow; ++i) part.low[i] = load_stream_16(codes + 64 * i);
        if constexpr (bits == 3) {
            const uint8_t* bit = start + (high + g * P::kTile);
#pragma unroll
            for (int i = 0; i < P::kHigh; ++i) part.high[i] = load_stream_16(bit + 64 * i);
        }
        part.scale = load_stream_8(start + (scale + 32 * g));
        if constexpr (P::kHasZero) part.zero = load_stream_4(start + (zero + 16 * g));
    }

    // To be called once for a loaded part: moves the fields of words that threads share.
    DEVICE void align(P& part) const {
        if constexpr (P::kFields * P::kPlane < 8) {
            part.low[0].x >>= low_shift;
            part.low[0].y >>= low_shift;
            part.low[0].z >>= low_shift;
            part.low[0].w >>= low_shift;
        }
        if constexpr (bits == 3 && P::kFields < 8) {
            part.high[0].x >>= high_shift;
            part.high[0].y >>= high_shift;
            part.high[0].z >>= high_shift;
            part.high[0].w >>= high_shift;
        }
    }
};

DEVICE uint32_t shift_left(uint32_t word, int by) { return by < 0 ? word >> -by : word << by; }

// Field `field` (a constant) of a row: four codes, each at the top of its byte.
template <int bits>
DEVICE uint32_t field_of(uint32_t low, uint32_t high, int field) {
    constexpr int plane = bits == 3 ? 2 : bits;
    if constexpr (bits == 8) return low;
    const uint32_t top = 0x01010101u * (((1u << plane) - 1) << (8 - plane));
    const int at = field * plane % 8;
    if constexpr (bits == 3)
        return (shift_left(low, 5 - at) & 0x60606060u) |
               (shift_left(high, 7 - field % 8) & 0x80808080u);
    return shift_left(low, 8 - plane - at) & top;
}

// Operand A of product `m` (a constant) of a group: fields 2 m and 2 m + 1. `first` has the rows x
// and y of the part, `second` z and w.
template <int bits, int group>
DEVICE void operands(const Part<bits, group>& part, int m, uint32_t (&first)[4],
                     uint32_t (&second)[4]) {
    using P = Part<bits, group>;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int field = 2 * m + i;
        const uint4 low = part.low[field * P::kPlane / 8];
        const uint4 high = part.high[P::kHigh ? field / 8 : 0];
        first[2 * i] = field_of<bits>(low.x, high.x, field);
        first[2 * i + 1] = field_of<bits>(low.y, high.y, field);
        second[2 * i] = field_of<bits>(low.z, high.z, field);
        second[2 * i + 1] = field_of<bits>(low.w, high.w, field);
    }
}

// Scales of the part's rows, and their zeros times 2^(8 - bits).
template <int bits, int group>
DEVICE void scales_of(const Part<bits, group>& part, float (&scale)[4], float (&zero)[4]) {
    constexpr float levels = (1 << bits) - 1, gain = 1 << (8 - bits);
    scale[0] = __uint_as_float(part.scale.x << 16);
    scale[1] = __uint_as_float(part.scale.x & 0xFFFF0000u);
    scale[2] = __uint_as_float(part.scale.y << 16);
    scale[3] = __uint_as_float(part.scale.y & 0xFFFF0000u);
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if constexpr (Part<bits, group>::kHasZero)
            zero[i] = float(part.zero >> 8 * i & 255) * (levels * gain / 255.0f);
        else
            zero[i] = levels * gain / 2;
}

// Sums of products over a group: of each plane of the activations, of rows x and y (first) and z
// and w (second) of the part, as the byte products have them.
template <int planes>
struct Sums {
    int first[planes][4], second[planes][4];

    DEVICE Sums() {
#pragma unroll
        for (int i = 0; i < 4 * planes; ++i) first[i / 4][i % 4] = second[i / 4][i % 4] = kSumStart;
    }

    // Operand A of product `m` times the activations `x` of the thread's columns, by planes.
    template <int bits, int group>
    DEVICE void add(const Part<bits, group>& part, int m,
                    const uint32_t (&x)[planes][group / 16]) {
        uint32_t a_first[4], a_second[4];
        operands<bits, group>(part, m, a_first, a_second);
#pragma unroll
        for (int plane = 0; plane < planes; ++plane) {
            const uint32_t b[2] = {x[plane][2 * m], x[plane][2 * m + 1]};
            mma_u8s8(first[plane], a_first, b);
            mma_u8s8(second[plane], a_second, b);
        }
    }

    // The sum of row `row` (0 to 3) of the part and column `column` (0 or 1) of the thread. 15-bit
    // activations are 128 * high + low; the high plane comes first.
    DEVICE float value(int row, int column) const {
        const int at = row % 2 * 2 + column;
        const float high = __int_as_float(row < 2 ? first[0][at] : second[0][at]) - kSumStartFloat;
        if constexpr (planes == 1) return high;
        constexpr int last = planes - 1;
        return fmaf(128.0f, high, __int_as_float(row < 2 ? first[last][at] : second[last][at]) -
                                      kSumStartFloat);
    }
};

// Reads the activations of a thread's columns in a group from shared memory.
template <int words>
DEVICE void read_activations(const int8_t* from, uint32_t (&x)[words]) {
    if constexpr (words == 2) {
        const uint2 two = *reinterpret_cast<const uint2*>(from);
        x[0] = two.x, x[1] = two.y;
    } else {
#pragma unroll
        for (int i = 0; i < words; i += 4) {
            const uint4 four = *reinterpret_cast<const uint4*>(from + 4 * i);
            x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
        }
    }
}

// Adds a group's products of four rows and column `column` of the thread, whose activations have
// the scale `a` and the sum `sum` in that group.
template <int column, int planes>
DEVICE void add_group(float (&y)[4], const Sums<planes>& sums, const float (&scale)[4],
                      const float (&zero)[4], float a, int sum) {
    const float total = float(sum);
#pragma unroll
    for (int i = 0; i < 4; ++i)
        y[i] = fmaf(a, scale[i] * fmaf(-zero[i], total, sums.value(i, column)), y[i]);
}

// Writes the products of rows row .. row + 3 of `rows`, whose codes were 2^(8 - bits) as large.
template <int bits>
DEVICE void store_rows(float* out, int row, int rows, const float (&y)[4]) {
    constexpr float gain = 1.0f / (1 << (8 - bits));
    if (rows % 4 == 0) {
        if (row < rows)
            *reinterpret_cast<float4*>(out + row) =
                make_float4(y[0] * gain, y[1] * gain, y[2] * gain, y[3] * gain);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (row + i < rows) out[row + i] = y[i] * gain;
}

// What the kernels for scalar products are called with: their parameters, as they use them.
struct Call {
    const int8_t* q;
    const float* scale;
    const int32_t* sum;
    int64_t inputs;  // rows of q
    const int32_t* pair;
    int k;
    float* out;
    int64_t positions;
    int rows, cols, groups_per_split;  // of the matrices

    // The row of q that belongs to a position.
    DEVICE int64_t input_of(int position) const { return pair ? pair[position] / k : position; }
};

// What a block of threads computes.
struct Work {
    int row_block, split;
    const uint8_t* matrix;
    int bits;
    int first, count;  // positions; count is 0 where there is nothing to do
};

// Blocks of threads that run at the same time share weights: those of up to 16 neighbouring panels,
// often of the same expert, follow each other, and then those of the next rows.
DEVICE Work work_of(int size, const int32_t* panel, int64_t positions, const uint8_t* packed,
                    int64_t packed_bytes, const int64_t* table, int64_t bits, int64_t rows,
                    int64_t cols, int64_t group) {
    Work work;
    const uint32_t panels = gridDim.z, others = gridDim.x * gridDim.y;
    const uint32_t id = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const uint32_t bundle = id / (16 * others), place = id - bundle * (16 * others);
    const uint32_t width = panels - 16 * bundle < 16 ? panels - 16 * bundle : 16;
    const uint32_t other = place / width, at = 16 * bundle + (place - other * width);
    work.row_block = int(other / gridDim.y);
    work.split = int(other % gridDim.y);
    int64_t offset = 0, expert = 0;
    if (panel) {
        expert = __ldcg(panel + 3 * at);
        work.first = __ldcg(panel + 3 * at + 1);
        work.count = __ldcg(panel + 3 * at + 2);
    } else {
        const int64_t left = positions - int64_t(at) * size;
        work.first = int(at) * size;
        work.count = int(left < size ? left : size);
    }
    work.matrix = packed;
    work.bits = int(bits);
    if (work.count <= 0) {
        work.count = 0;
        return work;
    }
    if (table) {
        offset = table[2 * expert];
        work.bits = int(table[2 * expert + 1]);
        work.matrix += offset;
    }
    const int side = work.bits >= 2 && work.bits <= 4 ? 48 : 32;
    const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
    const int64_t bytes = blocks * (2 * cols * work.bits + side * (cols / group));
    if (offset < 0 || offset % 16 != 0 || bytes > packed_bytes - offset) trap();
    return work;
}

}  // namespace
}  // namespace moepress
