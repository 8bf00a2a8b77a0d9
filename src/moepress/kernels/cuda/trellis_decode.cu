// Products of trellis matrices with few tokens. See trellis_code.cuh for the fragments.
#include "trellis_code.cuh"

#ifndef MOEPRESS_TRELLIS_MERGED  // 1: two weights of 1 or 2 bits in a register of A, half as many mma
#define MOEPRESS_TRELLIS_MERGED 0
#endif
#ifndef MOEPRESS_TRELLIS_WARPS
#define MOEPRESS_TRELLIS_WARPS 8
#endif
#ifndef MOEPRESS_TRELLIS_RING  // bytes of shared memory for the loads of a warp
#define MOEPRESS_TRELLIS_RING 6144
#endif
#ifndef MOEPRESS_TRELLIS_BLOCKS  // blocks of a multiprocessor
#define MOEPRESS_TRELLIS_BLOCKS 3
#endif

namespace moepress {

constexpr int kWarps = MOEPRESS_TRELLIS_WARPS;
constexpr int kRing = MOEPRESS_TRELLIS_RING;
constexpr int kUnitColumns = 32;     // columns: four tiles
constexpr int kTokens = 8;    // columns of an mma: tokens, or two planes of four tokens
constexpr int kPitch = 68;    // floats between the tokens of partial sums, free of bank conflicts
constexpr bool kMerge = MOEPRESS_TRELLIS_MERGED;

struct DecodeCall {
    float* out;
    const uint8_t* packed;
    const int64_t* table;
    const int8_t* q;
    const float* scale;
    const int32_t* sum;
    const int32_t* pair;
    const int32_t* panel;
    int n, k, group, bits, rows, positions, choices, splits;
};

// The tokens of a block.
struct Panel {
    int first;  // position
    int count;
};

// The row of q that token t of a panel reads.
DEVICE int64_t row_of(const DecodeCall& call, const Panel& panel, int t) {
    const int position = panel.first + t;
    return call.choices ? call.pair[position] / call.choices : position;
}

// Asynchronous copies of one lane. A stage of a warp's ring has bits + 2 parts of 256 bytes: codes
// of 8 tokens, 32 bytes each; the last words of the tiles above; words 0, 1, ... of the four tiles,
// 64 bytes each. A lane copies 16 bytes of every second part. In the tiles 2 and 3 the halves of a
// word are swapped: that avoids bank conflicts.
template <int bits>
struct Loader {
    static constexpr int parts = bits + 2;
    static constexpr int stage_bytes = 256 * parts;
    static constexpr int stages = kRing / stage_bytes;
    static constexpr int copies = (parts + 1) / 2;

    const uint8_t* from[2];  // copy 0; copy 1 (copy 2 is 128 bytes on)
    int to[2];
    int stride;  // bytes of copy 0 between two units
    bool has_first;

    DEVICE Loader(const DecodeCall& call, const Panel& panel, const uint8_t* above,
                  const uint8_t* slab, int planes, int unit) {
        const int lane = lane_id(), part = lane / 16, item = lane % 16;
        const int tile = item / 4, quarter = item % 4;
        const int swapped = 64 * tile + ((16 * quarter) ^ (tile / 2 * 32));
        const int64_t words = int64_t(unit) * 256 * bits + tile * 64 * bits + 16 * quarter;
        if (part == 0) {
            const int column = item / 2;  // of the mma
            has_first = column < panel.count * planes;
            const int64_t plane = planes == 1 ? 0 : column % 2;
            const int64_t row = has_first ? row_of(call, panel, column / planes) : 0;
            from[0] = reinterpret_cast<const uint8_t*>(call.q) +
                      (plane * call.rows + row) * call.k + unit * kUnitColumns + item % 2 * 16;
            to[0] = 16 * item;
            stride = kUnitColumns;
        } else {
            has_first = true;
            from[0] = above + words + 64 * (bits - 1);
            to[0] = 256 + swapped;
            stride = 256 * bits;
        }
        from[1] = slab + words + 64 * part;
        to[1] = 512 + 256 * part + swapped;
    }

    // Copy the next unit to a stage.
    DEVICE void copy(uint8_t* stage) {
        if (has_first) cp_async_16(stage + to[0], from[0]);
#pragma unroll
        for (int i = 1; i < copies; ++i)
            if (2 * i + 1 < parts || lane_id() < 16)
                cp_async_16(stage + to[1] + 512 * (i - 1), from[1] + 128 * (i - 1));
        from[0] += stride;
        from[1] += 256 * bits;
    }
};

// The partial sums of a warp: rows 16 b + 2 r, + 1 of the slab for each row block b; tokens 2 j,
// 2 j + 1 (one plane), or j (two planes).
template <int planes>
struct Sums {
    static constexpr int tokens = 2 / planes;
    float value[4][2][tokens];
};

// a of each row block: += the products of a unit.
template <int bits>
DEVICE void add_unit(const Words<bits>& words, uint2 x, int (&acc)[4][4]) {
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
        for (int i = 0; i < kSteps; i += 2) {
            const uint32_t a[4] = {
                merged(product<bits>(first.window[0], i), product<bits>(first.window[1], i)),
                merged(product<bits>(second.window[0], i), product<bits>(second.window[1], i)),
                merged(product<bits>(first.window[0], i + 1),
                       product<bits>(first.window[1], i + 1)),
                merged(product<bits>(second.window[0], i + 1),
                       product<bits>(second.window[1], i + 1))};
            mma_u8s8(acc[i / 4], a, b[i / 2 % 2]);
        }
        return;
    }
    const uint32_t b[4][2] = {{__byte_perm(x.x, 0, 0x0000), __byte_perm(x.x, 0, 0x1111)},
                              {__byte_perm(x.x, 0, 0x2222), __byte_perm(x.x, 0, 0x3333)},
                              {__byte_perm(x.y, 0, 0x0000), __byte_perm(x.y, 0, 0x1111)},
                              {__byte_perm(x.y, 0, 0x2222), __byte_perm(x.y, 0, 0x3333)}};
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
        const uint32_t a[4] = {
            product<bits>(first.window[0], i), product<bits>(second.window[0], i),
            product<bits>(first.window[1], i), product<bits>(second.window[1], i)};
        mma_u8s8(acc[i / 4], a, b[i % 4]);
    }
}

// The sums of a warp over units begin .. end - 1.
template <int bits, int planes>
DEVICE void add_units(const DecodeCall& call, const Panel& panel, const uint8_t* above,
                      const uint8_t* slab, uint8_t* ring, int begin, int end,
                      Sums<planes>& sums) {
    using Load = Loader<bits>;
    constexpr int tokens = Sums<planes>::tokens;
    const int lane = lane_id(), r = lane / 4, j = lane % 4;

    for (int i = 0; i < Load::stages; ++i)  // tokens that do not exist have codes 0
        *reinterpret_cast<uint2*>(ring + i * Load::stage_bytes + 8 * lane) = make_uint2(0, 0);
    __syncwarp();

    Load load(call, panel, above, slab, planes, begin);
    int copied = begin;
#pragma unroll
    for (int i = 0; i < Load::stages - 1; ++i) {
        if (copied < end) load.copy(ring + i * Load::stage_bytes);
        ++copied;
        cp_async_commit();
    }

    // Scales and sums of the lane's tokens.
    const int units = call.group / kUnitColumns;
    const int groups = call.k / call.group;
    const float* scale[tokens];
    const int32_t* sum[tokens];
    bool has[tokens];
#pragma unroll
    for (int t = 0; t < tokens; ++t) {
        const int token = tokens * j + t;
        has[t] = token < panel.count;
        const int64_t row = has[t] ? row_of(call, panel, token) : 0;
        scale[t] = call.scale + row * groups;
        sum[t] = call.sum + row * groups;
    }

    const int words_at = 256 + 64 * j + ((8 * r) ^ (j / 2 * 32));
    int stage = 0, free_stage = Load::stages - 1;
    for (int unit = begin; unit < end;) {
        const int group = unit / units;
        const int stop = min(end, (group + 1) * units);
        const bool whole_start = unit == group * units;
        float a[tokens];
        int correction[tokens];
#pragma unroll
        for (int t = 0; t < tokens; ++t) {
            a[t] = has[t] ? __ldg(scale[t] + group) : 0.0f;
            correction[t] = has[t] && whole_start ? __ldg(sum[t] + group) : 0;
        }
        int acc[4][4] = {};
        for (; unit < stop; ++unit) {
            cp_async_wait<Load::stages - 2>();
            __syncwarp();
            if (copied < end) load.copy(ring + free_stage * Load::stage_bytes);
            ++copied;
            cp_async_commit();
            const uint8_t* at = ring + stage * Load::stage_bytes;
            const uint2 x = *reinterpret_cast<const uint2*>(at + 8 * lane);
            Words<bits> words;
#pragma unroll
            for (int w = 0; w <= bits; ++w)
                words.word[w] = *reinterpret_cast<const uint2*>(at + words_at + 256 * w);
            add_unit<bits>(words, x, acc);
            free_stage = stage;
            stage = stage + 1 == Load::stages ? 0 : stage + 1;
        }
#pragma unroll
        for (int b = 0; b < 4; ++b)
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int t = 0; t < tokens; ++t) {
                    const int* c = acc[b] + 2 * h;
                    const int total = planes == 1 ? c[t] : 128 * c[0] + c[1];
                    const int exact = total - kCenter[bits] * correction[t];
                    sums.value[b][h][t] = fmaf(a[t], float(exact), sums.value[b][h][t]);
                }
    }
    cp_async_wait<0>();
}

template <int bits, int planes>
DEVICE void decode(const DecodeCall& call, const Panel& panel, const uint8_t* matrix) {
    auto* shared = shared_memory<uint8_t>();
    const int slabs = (call.n + kSlabRows - 1) / kSlabRows, s = int(blockIdx.x);
    const int64_t slab_bytes = int64_t(8) * call.k * bits;
    const int units = call.k / kUnitColumns, parts = call.splits * kWarps;
    const int part = int(blockIdx.y) * kWarps + warp_id();

    Sums<planes> sums = {};
    add_units<bits, planes>(call, panel, matrix + (s ? s - 1 : slabs - 1) * slab_bytes,
                            matrix + s * slab_bytes, shared + warp_id() * kRing,
                            int(int64_t(units) * part / parts),
                            int(int64_t(units) * (part + 1) / parts), sums);

    // Sum over the warps.
    constexpr int tokens = Sums<planes>::tokens;
    constexpr int panel_tokens = kTokens / planes;
    __syncthreads();
    auto* partial = reinterpret_cast<float*>(shared);  // [warps][tokens][kPitch]
    const int r = lane_id() / 4, j = lane_id() % 4;
#pragma unroll
    for (int t = 0; t < tokens; ++t) {
        const int token = tokens * j + t;
        float* to = partial + (warp_id() * panel_tokens + token) * kPitch + 2 * r;
        if (token < panel.count)
#pragma unroll
            for (int b = 0; b < 4; ++b)
                *reinterpret_cast<float2*>(to + 16 * b) =
                    make_float2(sums.value[b][0][t], sums.value[b][1][t]);
    }
    __syncthreads();
    const auto* scales = reinterpret_cast<const uint16_t*>(matrix + slabs * slab_bytes);
    for (int i = int(threadIdx.x); i < panel.count * kSlabRows; i += 32 * kWarps) {
        const int token = i / kSlabRows, row = i % kSlabRows, n = s * kSlabRows + row;
        if (n >= call.n) continue;
        float total = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w)
            total += partial[(w * panel_tokens + token) * kPitch + row];
        const int64_t position = int64_t(blockIdx.y) * call.positions + panel.first + token;
        call.out[position * call.n + n] = total * bfloat_to_float(__ldg(scales + n));
    }
}

template <int planes>
DEVICE void decode_panel(const DecodeCall& call) {
    constexpr int size = kTokens / planes;
    Panel panel;
    int expert = 0;
    if (call.panel) {
        const int32_t* entry = call.panel + 3 * blockIdx.z;
        expert = entry[0];
        panel = {entry[1], entry[2]};
    } else {
        panel.first = int(blockIdx.z) * size;
        panel.count = min(size, call.positions - panel.first);
    }
    if (panel.count <= 0) return;
    const int64_t offset = call.table ? call.table[2 * expert] : 0;
    const int bits = call.table ? int(call.table[2 * expert + 1]) : call.bits;
    const uint8_t* matrix = call.packed + offset;
    if (bits == 1) decode<1, planes>(call, panel, matrix);
    if (bits == 2) decode<2, planes>(call, panel, matrix);
    if (bits == 3) decode<3, planes>(call, panel, matrix);
    if (bits == 4) decode<4, planes>(call, panel, matrix);
}

}  // namespace moepress

#define MOEPRESS_TRELLIS_DECODE(name, planes)                                                     \
    extern "C" __global__ void __launch_bounds__(32 * moepress::kWarps, MOEPRESS_TRELLIS_BLOCKS)  \
        name(float* out, const uint8_t* packed, const int64_t* table, const int8_t* q,            \
             const float* scale, const int32_t* sum, const int32_t* pair, const int32_t* panel,   \
             int64_t n, int64_t k, int64_t group, int64_t bits, int64_t rows, int64_t positions,  \
             int64_t choices, int64_t splits) {                                                   \
        moepress::decode_panel<planes>({out, packed, table, q, scale, sum, pair, panel, int(n),   \
                                        int(k), int(group), int(bits), int(rows), int(positions), \
                                        int(choices), int(splits)});                              \
    }

MOEPRESS_TRELLIS_DECODE(moepress_trellis_decode_8, 1)
MOEPRESS_TRELLIS_DECODE(moepress_trellis_decode_16, 2)
