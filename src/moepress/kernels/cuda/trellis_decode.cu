// Products of trellis matrices with few tokens. See trellis_code.cuh for the fragments.
#include "trellis_code.cuh"

#ifndef MOEPRESS_TRELLIS_MERGED  // 1: two weights of 1 or 2 bits in a register of A, half as many mma
#define MOEPRESS_TRELLIS_MERGED 0
#endif
#ifndef MOEPRESS_TRELLIS_WARPS
#define MOEPRESS_TRELLIS_WARPS 4
#endif
#ifndef MOEPRESS_TRELLIS_DEPTH  // units of 1- and 2-bit codes that a warp loads ahead
#define MOEPRESS_TRELLIS_DEPTH 2
#endif
#ifndef MOEPRESS_TRELLIS_BLOCKS  // blocks of a multiprocessor
#define MOEPRESS_TRELLIS_BLOCKS 5
#endif

namespace moepress {

constexpr int kWarps = MOEPRESS_TRELLIS_WARPS;
constexpr int kDepth = MOEPRESS_TRELLIS_DEPTH;
constexpr int kUnitColumns = 32;  // four tiles
constexpr int kChunkUnits = 4;    // what a warp takes at a time: the columns of the largest group
constexpr int kTokens = 8;    // columns of an mma: tokens, or two planes of four tokens
constexpr int kPitch = 68;    // floats between the tokens of partial sums, free of bank conflicts
constexpr bool kMerge = MOEPRESS_TRELLIS_MERGED;

struct DecodeCall {
    const int8_t* q;
    const float* scale;
    const int32_t* sum;
    const int32_t* pair;
    float* out;
    int rows, choices, positions, n, k, group, splits;
};

// The tokens of a block.
struct Panel {
    int first;  // position
    int count;
};

// The row of q that token t of a panel reads.
DEVICE int64_t row_of(const DecodeCall& call, const Panel& panel, int t) {
    const int position = panel.first + t;
    return call.pair ? call.pair[position] / call.choices : position;
}

// The partial sums of a warp: rows 16 b + 2 r, + 1 of the slab for each row block b; tokens j,
// j + 4 (one plane), or j (two planes).
template <int planes>
struct Sums {
    static constexpr int tokens = 2 / planes;
    float value[4][2][tokens];
};

// acc[row block] = c + the products of a unit.
template <int bits>
DEVICE void add_unit(const Words<bits>& words, uint2 x, const int (&c)[4][4], int (&acc)[4][4]) {
    using Sum = const int (&)[4];
    uint32_t even[bits + 1], odd[bits + 1];
#pragma unroll
    for (int j = 0; j <= bits; ++j) {
        even[j] = words.word[j].x;
        odd[j] = words.word[j].y;
    }
    const Windows<bits> first = windows<bits>(even), second = windows<bits>(odd);
    if (kMerge && bits <= 2) {
        const uint32_t b[2][2] = {
            {__byte_perm(x.x, 0, 0x1100), __byte_perm(x.x, 0, 0x3322)},
            {__byte_perm(x.y, 0, 0x1100), __byte_perm(x.y, 0, 0x3322)}};
#pragma unroll
        for (int step = 0; step < kSteps / 2; ++step) {
            const int block = step % 4, pair = step / 4;  // row blocks in turn
            const int i = 4 * block + 2 * pair;
            const uint32_t a[4] = {
                merged(product<bits>(first.window[0], i), product<bits>(first.window[1], i)),
                merged(product<bits>(second.window[0], i), product<bits>(second.window[1], i)),
                merged(product<bits>(first.window[0], i + 1),
                       product<bits>(first.window[1], i + 1)),
                merged(product<bits>(second.window[0], i + 1),
                       product<bits>(second.window[1], i + 1))};
            mma_u8s8(acc[block], a, b[pair], pair ? Sum(acc[block]) : Sum(c[block]));
        }
        return;
    }
    const uint32_t b[4][2] = {{__byte_perm(x.x, 0, 0x0000), __byte_perm(x.x, 0, 0x1111)},
                              {__byte_perm(x.x, 0, 0x2222), __byte_perm(x.x, 0, 0x3333)},
                              {__byte_perm(x.y, 0, 0x0000), __byte_perm(x.y, 0, 0x1111)},
                              {__byte_perm(x.y, 0, 0x2222), __byte_perm(x.y, 0, 0x3333)}};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        const int block = step % 4, pair = step / 4;  // row blocks in turn
        const int i = 4 * block + pair;
        const uint32_t a[4] = {
            product<bits>(first.window[0], i), product<bits>(second.window[0], i),
            product<bits>(first.window[1], i), product<bits>(second.window[1], i)};
        mma_u8s8(acc[block], a, b[pair], pair ? Sum(acc[block]) : Sum(c[block]));
    }
}

// What a lane loads for a unit.
template <int bits>
struct Unit {
    Words<bits> words;
    uint2 x;  // codes of 8 columns of the lane's token
};

// The loads of a lane, unit after unit.
template <int bits>
struct Loader {
    const uint8_t* words;  // its path lanes of word 0
    int64_t above;         // from there to the last word of the tile above
    const uint8_t* x;
    bool has;  // a token

    DEVICE Loader(const DecodeCall& call, const Panel& panel, const uint8_t* over,
                  const uint8_t* slab, int planes, int unit) {
        const int r = lane_id() / 4, j = lane_id() % 4;
        words = slab + int64_t(unit) * 256 * bits + 64 * bits * j + 8 * r;
        above = over - slab + 64 * (bits - 1);
        // Column r of the mma: token r / 2 + 4 (r mod 2), or plane r mod 2 of token r / 2.
        const int token = planes == 1 ? r / 2 + r % 2 * 4 : r / 2;
        has = token < panel.count;
        const int64_t plane = planes == 1 ? 0 : r % 2, row = has ? row_of(call, panel, token) : 0;
        x = reinterpret_cast<const uint8_t*>(call.q) + (plane * call.rows + row) * call.k +
            unit * kUnitColumns + 8 * j;
    }

    // Load the next unit but one, ...: `ahead` units from the current one.
    DEVICE void load(Unit<bits>& unit, int ahead, bool more) {
        const uint8_t* at = words + ahead * 256 * bits;
        if (more) {
            unit.words.word[0] = load_stream_8(at + above);
#pragma unroll
            for (int i = 0; i < bits; ++i) unit.words.word[i + 1] = load_stream_8(at + 64 * i);
        }
        unit.x = make_uint2(0, 0);
        if (has && more)
            unit.x = __ldg(reinterpret_cast<const uint2*>(x + ahead * kUnitColumns));
    }
    DEVICE void advance(int units) {
        words += units * 256 * bits;
        x += units * kUnitColumns;
    }
};

// The sums of a warp over chunks begin .. end - 1. Units beyond the last column have activations 0.
template <int bits, int planes>
DEVICE void add_chunks(const DecodeCall& call, const Panel& panel, const uint8_t* above,
                       const uint8_t* slab, int begin, int end, Sums<planes>& sums) {
    constexpr int depth = bits <= 2 ? kDepth : 1;
    constexpr int tokens = Sums<planes>::tokens, center = kCenter[bits];
    const int j = lane_id() % 4;
    const int units = call.group / kUnitColumns;
    const int groups = call.k / call.group;
    int group = begin * kChunkUnits / units;
    int rest = min(end * kChunkUnits, call.k / kUnitColumns) - begin * kChunkUnits;  // units

    Loader<bits> loader(call, panel, above, slab, planes, begin * kChunkUnits);
    Unit<bits> next[depth] = {};
#pragma unroll
    for (int d = 0; d < depth; ++d) loader.load(next[d], d, d < rest);

    // The scale of the group and the sum of the next one.
    int row[tokens];
    bool has[tokens];
    float a[tokens];
    int sum[tokens];
#pragma unroll
    for (int t = 0; t < tokens; ++t) {
        const int token = j + 4 * t;
        has[t] = token < panel.count;
        row[t] = has[t] ? int(row_of(call, panel, token)) * groups : 0;
        a[t] = has[t] ? __ldg(call.scale + row[t] + group) : 0.0f;
        sum[t] = has[t] ? __ldg(call.sum + row[t] + group) : 0;
    }
    int acc[4][4];
    int start[4][4];  // four times the same
    const auto start_group = [&] {
#pragma unroll
        for (int b = 0; b < 4; ++b) {
            start[b][0] = start[b][2] = planes == 1 ? -center * sum[0] : 0;
            start[b][1] = start[b][3] = -center * sum[tokens - 1];
        }
        ++group;
#pragma unroll
        for (int t = 0; t < tokens; ++t)
            sum[t] = has[t] && group < groups ? __ldg(call.sum + row[t] + group) : 0;
    };
    const auto end_group = [&] {
#pragma unroll
        for (int t = 0; t < tokens; ++t) {
            if (t && panel.count <= 4) break;
#pragma unroll
            for (int b = 0; b < 4; ++b)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int* c = acc[b] + 2 * h;
                    const int total = planes == 1 ? c[t] : 128 * c[0] + c[1];
                    sums.value[b][h][t] = fmaf(a[t], float(total), sums.value[b][h][t]);
                }
            if (has[t] && group < groups) a[t] = __ldg(call.scale + row[t] + group);
        }
    };

    for (; rest > 0; rest -= kChunkUnits) {
        start_group();
#pragma unroll
        for (int u = 0; u < kChunkUnits; ++u) {
            const Unit<bits> now = next[u % depth];
            loader.load(next[u % depth], u + depth, u + depth < rest);
            if (u == 0)
                add_unit<bits>(now.words, now.x, start, acc);
            else
                add_unit<bits>(now.words, now.x, acc, acc);
            if (u == 1 ? units <= 2 : u != 3 && units == 1) {
                end_group();
                start_group();
#pragma unroll
                for (int b = 0; b < 4; ++b)
#pragma unroll
                    for (int c = 0; c < 4; ++c) acc[b][c] = start[b][c];
            }
        }
        end_group();
        loader.advance(kChunkUnits);
    }
}

template <int bits, int planes>
DEVICE void decode(const DecodeCall& call, const Panel& panel, const uint8_t* matrix) {
    const int slabs = (call.n + kSlabRows - 1) / kSlabRows;
    const int64_t slab_bytes = int64_t(8) * call.k * bits;
    // The warps of a block share the columns of 1, 2, 4, .. slabs: as many as the grid needs.
    int slabs_here = 1;
    while (slabs_here * int(gridDim.x) < slabs) slabs_here *= 2;
    const int ranges = kWarps / slabs_here, first_slab = int(blockIdx.x) * slabs_here;
    const int s = first_slab + warp_id() % slabs_here;
    const int chunks = (call.k + kChunkUnits * kUnitColumns - 1) / (kChunkUnits * kUnitColumns);
    const int parts = call.splits * ranges;
    const int part = int(blockIdx.y) * ranges + warp_id() / slabs_here;

    Sums<planes> sums = {};
    if (s < slabs)
        add_chunks<bits, planes>(call, panel, matrix + (s ? s - 1 : slabs - 1) * slab_bytes,
                                 matrix + s * slab_bytes, chunks * part / parts,
                                 chunks * (part + 1) / parts, sums);

    // Sum over the ranges.
    constexpr int tokens = Sums<planes>::tokens;
    constexpr int panel_tokens = kTokens / planes;
    auto* partial = shared_memory<float>();  // [warps][tokens][kPitch]
    const int r = lane_id() / 4, j = lane_id() % 4;
#pragma unroll
    for (int t = 0; t < tokens; ++t) {
        const int token = j + 4 * t;
        float* to = partial + (warp_id() * panel_tokens + token) * kPitch + 2 * r;
        if (token < panel.count)
#pragma unroll
            for (int b = 0; b < 4; ++b)
                *reinterpret_cast<float2*>(to + 16 * b) =
                    make_float2(sums.value[b][0][t], sums.value[b][1][t]);
    }
    __syncthreads();
    const auto* scales = reinterpret_cast<const uint16_t*>(matrix + slabs * slab_bytes);
    const int rows = slabs_here * kSlabRows;
    for (int i = int(threadIdx.x); i < panel.count * rows; i += 32 * kWarps) {
        const int token = i / rows, row = i % rows, n = first_slab * kSlabRows + row;
        if (n >= call.n) continue;
        const int first = row / kSlabRows;  // the warp of the first range
        float total = 0;
        for (int w = first; w < kWarps; w += slabs_here)
            total += partial[(w * panel_tokens + token) * kPitch + row % kSlabRows];
        const int64_t position = int64_t(blockIdx.y) * call.positions + panel.first + token;
        call.out[position * call.n + n] = total * bfloat_to_float(__ldg(scales + n));
    }
}

}  // namespace moepress

// The parameters of all products:
//   q          [planes][rows][K]: codes of 8 bits, or codes 128 * q[0] + q[1] in two planes
//   scale, sum [rows][K / g] of the codes
//   pair       position p has row pair[p] / choices of q; null: row p
//   panel      [gridDim.z][3]: expert, first position, count; null: positions in order
//   table      [E][2]: first byte and code bits of each expert's matrix; null: one matrix of `bits`
//   out        [splits][positions][N]: to be summed over the splits
extern "C" __global__ void __launch_bounds__(32 * moepress::kWarps, MOEPRESS_TRELLIS_BLOCKS)
    moepress_trellis_decode(const int8_t* q, const float* scale, const int32_t* sum,
                            int64_t planes, int64_t rows, const int32_t* pair, int64_t choices,
                            const int32_t* panel, int64_t positions, const uint8_t* packed,
                            int64_t packed_bytes, const int64_t* table, int64_t bits, int64_t n,
                            int64_t k, int64_t group, float* out, int64_t splits) {
    using namespace moepress;
    const DecodeCall call = {q,         scale,  sum,    pair,       out,       int(rows), int(choices),
                             int(positions), int(n), int(k), int(group), int(splits)};
    const int size = kTokens / int(planes);
    int expert = 0;
    Panel tokens;
    if (panel) {
        const int32_t* entry = panel + 3 * blockIdx.z;
        expert = entry[0];
        tokens = {entry[1], entry[2]};
    } else {
        tokens.first = int(blockIdx.z) * size;
        tokens.count = min(size, call.positions - tokens.first);
    }
    if (tokens.count <= 0) return;
    const int64_t offset = table ? table[2 * expert] : 0;
    const int width = int(table ? table[2 * expert + 1] : bits);
    const int64_t bytes = (n + kSlabRows - 1) / kSlabRows * (8 * k * width + 2 * kSlabRows);
    if (width < 1 || width > 4 || offset < 0 || offset + bytes > packed_bytes) trap();
    const uint8_t* matrix = packed + offset;
    if (planes == 1) {
        if (width == 1) decode<1, 1>(call, tokens, matrix);
        if (width == 2) decode<2, 1>(call, tokens, matrix);
        if (width == 3) decode<3, 1>(call, tokens, matrix);
        if (width == 4) decode<4, 1>(call, tokens, matrix);
    } else {
        if (width == 1) decode<1, 2>(call, tokens, matrix);
        if (width == 2) decode<2, 2>(call, tokens, matrix);
        if (width == 3) decode<3, 2>(call, tokens, matrix);
        if (width == 4) decode<4, 2>(call, tokens, matrix);
    }
}
