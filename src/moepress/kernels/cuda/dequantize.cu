// Rows of packed matrices as bfloat16 matrices, for products that torch makes (grouped.py).
//
// A weight is what reference.dequantize says, computed in float32 and then rounded to bfloat16. The
// weights of trellis codes stay rotated. A warp takes kUnits times 32 columns, and 64 rows (a slab)
// or 16 rows (a block of scalar codes). A lane has 8 neighbouring columns of a row: one store of 16
// bytes.
//
// Limit: writing 2 bytes for each weight. A trellis weight takes about 8 instructions: an H100, which
// writes 3e12 bytes a second at best, can issue those of 3.7e12 weights in that time.
#include "trellis_code.cuh"

namespace moepress {
namespace {

constexpr int kWarps = 4;
constexpr int kUnits = 4;  // neighbouring units of a warp
constexpr int kUnitColumns = 32;
constexpr int kBlockRows = 16;  // of scalar codes

// A small integer plus this one has the bits of the float 1.5 * 2^23 plus that integer.
constexpr int kStart = 0x4B400000;
constexpr float kStartFloat = 12582912.0f;

struct Call {
    const uint8_t* packed;
    int64_t packed_bytes;
    const int64_t* table;  // [experts][2]: first byte and code bits; null: one matrix of `bits`
    int64_t bits;
    const int32_t* panel;  // [panels][3]: expert, first position, count; null: one matrix
    int64_t rows, cols, group;      // of a matrix
    int64_t first, second, count;   // rows: `count` from `first` on, then `count` from `second` on
    int64_t blocks;                 // blocks of rows that the rows from `first` on lie in
    uint16_t* out;                  // [panels][rows that are asked for][cols]
};

// What a block of threads decodes.
struct Work {
    const uint8_t* matrix;
    int width;       // of scalar codes their bits, of trellis codes twice their bits
    int block;       // of block_rows rows of the matrix
    int begin, end;  // rows of the matrix that are asked for
    uint16_t* out;   // of row `begin`
    int64_t cols;

    DEVICE void store(int row, int column, uint4 eight) const {
        if (row >= begin && row < end)
            *reinterpret_cast<uint4*>(out + (row - begin) * cols + column) = eight;
    }
};

template <bool trellis>
DEVICE int64_t matrix_bytes(const Call& call, int64_t bits) {
    if (trellis)
        return (call.rows + kSlabRows - 1) / kSlabRows *
               (4 * call.cols * halves_of(bits) + 2 * kSlabRows);
    const int side = bits >= 2 && bits <= 4 ? 48 : 32;
    return (call.rows + kBlockRows - 1) / kBlockRows *
           (2 * call.cols * bits + side * (call.cols / call.group));
}

// The work of this block; a panel without positions has none: false.
template <bool trellis>
DEVICE bool work_of(const Call& call, Work& work) {
    constexpr int block_rows = trellis ? kSlabRows : kBlockRows;
    const int64_t z = blockIdx.z, y = blockIdx.y;
    int64_t expert = 0, offset = 0, bits = call.bits;
    if (call.panel) {
        if (call.panel[3 * z + 2] <= 0) return false;
        expert = call.panel[3 * z];
    }
    if (call.table) {
        offset = call.table[2 * expert];
        bits = call.table[2 * expert + 1];
    }
    const bool exists = trellis ? halves_of(bits) > 0 : (bits >= 1 && bits <= 4) || bits == 8;
    if (!exists || offset < 0 || offset % 16 != 0 ||
        matrix_bytes<trellis>(call, bits) > call.packed_bytes - offset)
        trap();
    const bool two = gridDim.y > call.blocks, later = y >= call.blocks;
    work.matrix = call.packed + offset;
    work.width = trellis ? halves_of(bits) : int(bits);
    work.begin = int(later ? call.second : call.first);
    work.end = work.begin + int(call.count);
    work.block = work.begin / block_rows + int(later ? y - call.blocks : y);
    work.cols = call.cols;
    work.out = call.out + (z * (two ? 2 : 1) + later) * call.count * call.cols;
    return true;
}

DEVICE int first_unit() { return (int(blockIdx.x) * kWarps + warp_id()) * kUnits; }

// Eight weights, of four pairs of columns.
DEVICE uint4 rounded(const float (&w)[8]) {
    return make_uint4(floats_to_bfloats(w[0], w[1]), floats_to_bfloats(w[2], w[3]),
                      floats_to_bfloats(w[4], w[5]), floats_to_bfloats(w[6], w[7]));
}

template <int halves>
DEVICE void trellis_weights(const Call& call, const Work& work) {
    using W = Width<halves>;
    constexpr int kAhead = halves <= 4 ? 2 : 1;  // units that are loaded at once
    const int r = lane_id() / 4, j = lane_id() % 4, units = int(call.cols) / kUnitColumns;
    const int slabs = (int(call.rows) + kSlabRows - 1) / kSlabRows, s = work.block;
    const int64_t slab_bytes = W::slab_bytes(call.cols);
    const uint8_t* const slab = work.matrix + s * slab_bytes;
    const uint8_t* const above =
        work.matrix + (s ? s - 1 : slabs - 1) * slab_bytes + W::offset(j, W::words - 1);
    const uint8_t* const scales = work.matrix + slabs * slab_bytes + 2 * (s * kSlabRows + 2 * r);
    float scale[4][2];
#pragma unroll
    for (int b = 0; b < 4; ++b) {
        const uint32_t two = __ldg(reinterpret_cast<const uint32_t*>(scales + 32 * b));
        scale[b][0] = __uint_as_float(two << 16);
        scale[b][1] = __uint_as_float(two & 0xFFFF0000u);
    }
#pragma unroll 1
    for (int done = 0; done < kUnits; done += kAhead) {
        const int unit = first_unit() + done;
        Words<halves> words[kAhead];
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
            if (unit + u >= units) break;
            const int at = (unit + u) * W::unit_bytes + 8 * r;
            words[u].word[0] = load_stream_8(above + at);
#pragma unroll
            for (int i = 0; i < W::words; ++i)
                words[u].word[i + 1] = load_stream_8(slab + at + W::offset(j, i));
        }
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
            if (unit + u >= units) break;
            const int column = (unit + u) * kUnitColumns + 8 * j;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                uint32_t word[W::words + 1];
#pragma unroll
                for (int i = 0; i <= W::words; ++i)
                    word[i] = h ? words[u].word[i].y : words[u].word[i].x;
                const Windows<halves> path = windows<halves>(word, j % 2);
#pragma unroll
                for (int b = 0; b < 4; ++b) {
                    float w[8];
#pragma unroll
                    for (int c = 0; c < 8; ++c) {
                        const uint32_t p = product<halves>(path.window[c % 2], 4 * b + c / 2);
                        const int value = dp4a_us(p, 0x01010101u, kStart - W::center);
                        w[c] = (__int_as_float(value) - kStartFloat) * scale[b][h];
                    }
                    work.store(s * kSlabRows + 16 * b + 2 * r + h, column, rounded(w));
                }
            }
        }
    }
}

// The codes of 8 columns, four in the bytes of each word. `tile`: of the group, at the row.
template <int bits>
DEVICE uint2 codes_of(const uint8_t* tile, int group, int field) {
    const auto word = [&](const uint8_t* plane, int width) {
        return __ldg(reinterpret_cast<const uint32_t*>(plane + 64 * (field * width / 8))) >>
               field * width % 8;
    };
    if constexpr (bits == 8) {
        const auto* const at = reinterpret_cast<const uint32_t*>(tile + 64 * field);
        return make_uint2(__ldg(at), __ldg(at + 16));
    } else if constexpr (bits == 3) {
        const uint32_t low = word(tile, 2), high = word(tile + 4 * group, 1);
        return make_uint2((low & 0x03030303u) | (high & 0x01010101u) << 2,
                          (low >> 2 & 0x03030303u) | (high >> 1 & 0x01010101u) << 2);
    } else {
        const uint32_t low = word(tile, bits), mask = 0x01010101u * ((1u << bits) - 1);
        return make_uint2(low & mask, low >> bits & mask);
    }
}

template <int bits>
DEVICE void scalar_weights(const Call& call, const Work& work) {
    constexpr bool has_zero = bits >= 2 && bits <= 4;
    constexpr float levels = (1 << bits) - 1;
    const int r = lane_id() / 4, j = lane_id() % 4;
    const int cols = int(call.cols), group = int(call.group), groups = cols / group;
    const int codes = 2 * cols * bits, shift = __ffs(group) - 1;
    const uint8_t* const start =
        work.matrix + work.block * int64_t(codes + (has_zero ? 48 : 32) * groups);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
        const int column = (first_unit() + u) * kUnitColumns + 8 * j;
        if (column >= cols) break;
        const int q = column >> shift, field = (column & (group - 1)) / 4;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = r + 8 * h;
            const uint2 eight =
                codes_of<bits>(start + q * 2 * group * bits + 4 * row, group, field);
            const uint8_t* const side = start + codes + 2 * (16 * q + row);
            const float scale = bfloat_to_float(__ldg(reinterpret_cast<const uint16_t*>(side)));
            float zero = levels / 2;
            if (has_zero) {
                // zero_code * levels / 255: the quotient, and its rest divided once more, is what a
                // division gives.
                const float x = float(__ldg(start + codes + 32 * groups + 16 * q + row)) * levels;
                const float about = x * (1.0f / 255.0f);
                zero = fmaf(fmaf(-about, 255.0f, x), 1.0f / 255.0f, about);
            }
            float w[8];
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                // A byte as the lowest one of the float 2^23.
                const uint32_t bits_of = __byte_perm(c < 4 ? eight.x : eight.y, 0x4B000000u,
                                                     0x7440u + uint32_t(c % 4));
                w[c] = (__uint_as_float(bits_of) - 8388608.0f - zero) * scale;
            }
            work.store(work.block * kBlockRows + row, column, rounded(w));
        }
    }
}

}  // namespace
}  // namespace moepress

// The rows `first` .. first + count - 1 of a matrix, and then those from `second` on, of each panel's
// expert (panel null: of one matrix), as out [panels][rows][cols] in bfloat16. The grid says whether
// there are rows from `second` on.
//
// Grid: ceil(cols / 512); blocks of 64 rows (trellis) or 16 rows (scalar) that the rows lie in, first
// `blocks` for those from `first` on; panels, or 1. Threads: 128.
extern "C" __global__ void __launch_bounds__(128, 7)
    moepress_dequantize_trellis(const uint8_t* packed, int64_t packed_bytes, const int64_t* table,
                                int64_t bits, const int32_t* panel, int64_t rows, int64_t cols,
                                int64_t group, int64_t first, int64_t second, int64_t count,
                                int64_t blocks, uint16_t* out) {
    using namespace moepress;
    begin();
    const Call call = {packed, packed_bytes, table,  bits,  panel,  rows, cols,
                       group,  first,        second, count, blocks, out};
    Work work;
    if (!work_of<true>(call, work)) return;
    if (work.width == 2) trellis_weights<2>(call, work);
    if (work.width == 3) trellis_weights<3>(call, work);
    if (work.width == 4) trellis_weights<4>(call, work);
    if (work.width == 5) trellis_weights<5>(call, work);
    if (work.width == 6) trellis_weights<6>(call, work);
    if (work.width == 7) trellis_weights<7>(call, work);
    if (work.width == 8) trellis_weights<8>(call, work);
}

extern "C" __global__ void __launch_bounds__(128, 8)
    moepress_dequantize_scalar(const uint8_t* packed, int64_t packed_bytes, const int64_t* table,
                               int64_t bits, const int32_t* panel, int64_t rows, int64_t cols,
                               int64_t group, int64_t first, int64_t second, int64_t count,
                               int64_t blocks, uint16_t* out) {
    using namespace moepress;
    begin();
    const Call call = {packed, packed_bytes, table,  bits,  panel,  rows, cols,
                       group,  first,        second, count, blocks, out};
    Work work;
    if (!work_of<false>(call, work)) return;
    if (work.width == 1) scalar_weights<1>(call, work);
    if (work.width == 2) scalar_weights<2>(call, work);
    if (work.width == 3) scalar_weights<3>(call, work);
    if (work.width == 4) scalar_weights<4>(call, work);
    if (work.width == 8) scalar_weights<8>(call, work);
}
