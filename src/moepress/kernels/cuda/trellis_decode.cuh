// Products of trellis matrices with few tokens. See trellis_code.cuh for the fragments.
//
// A warp takes a slab and a range of its columns, 32 columns (a unit) at a time, which come to it
// through shared memory (trellis_feed.cuh). One mma multiplies 16 rows and 2 columns of four tiles with
// up to 8 tokens, or with the two planes of 4. The exact sum of a group is scaled and added to sums in
// float32. The warps of a block share the columns of a slab, and add up their sums in shared memory.
//
// At 2 bits, 8192 weights (4 units of a warp, one group of 128 columns) and up to four tokens take about
// 760 instructions of a warp (compute capability 9.0, CUDA 13.5). A quarter of a multiprocessor issues
// one instruction a clock; ALU and multiplications take two clocks each, beside one another; an mma
// takes about 8 clocks of the tensor core. Variants that were timed: docs/log.md#cuda-few-variants.
#pragma once

#include "trellis_feed.cuh"

#ifndef MOEPRESS_TRELLIS_MERGED  // 1: two weights of 1 or 2 bits in a register of A, half as many mma
#define MOEPRESS_TRELLIS_MERGED 0
#endif
#ifndef MOEPRESS_TRELLIS_WARPS
#define MOEPRESS_TRELLIS_WARPS 4
#endif
#ifndef MOEPRESS_TRELLIS_ROLLED  // 1: the loop of the program has one stage, 0: a group
#define MOEPRESS_TRELLIS_ROLLED 0
#endif
#ifndef MOEPRESS_TRELLIS_BLOCKS  // blocks of a multiprocessor: as many as registers allow
#define MOEPRESS_TRELLIS_BLOCKS 4
#endif

namespace moepress {
namespace {

constexpr int kWarps = MOEPRESS_TRELLIS_WARPS;
constexpr bool kRolled = MOEPRESS_TRELLIS_ROLLED;
constexpr int kTokens = 8;    // columns of an mma: tokens, or two planes of four tokens
constexpr int kPitch = 68;    // floats between the tokens of partial sums, free of bank conflicts
constexpr bool kMerge = MOEPRESS_TRELLIS_MERGED;

// The partial sums of a warp: rows 16 b + 2 r, + 1 of the slab for each row block b; token j, and j + 4
// where a panel has more than four.
template <int tokens>
struct Sums {
    float value[4][2][tokens];
};

// acc[row block] = c + the products of a unit.
template <int halves>
DEVICE void add_unit(const Words<halves>& words, uint2 x, const int (&c)[4][4], int (&acc)[4][4]) {
    using Sum = const int (&)[4];
    constexpr int count = Width<halves>::words;
    uint32_t even[count + 1], odd[count + 1];  // path lanes 2 r and 2 r + 1
#pragma unroll
    for (int j = 0; j <= count; ++j) {
        even[j] = words.word[j].x;
        odd[j] = words.word[j].y;
    }
    const int tile = lane_id() % 2;
    const Windows<halves> first = windows<halves>(even, tile), second = windows<halves>(odd, tile);
    if (kMerge && halves <= 4) {
        const uint32_t b[2][2] = {
            {__byte_perm(x.x, 0, 0x1100), __byte_perm(x.x, 0, 0x3322)},
            {__byte_perm(x.y, 0, 0x1100), __byte_perm(x.y, 0, 0x3322)}};
#pragma unroll
        for (int step = 0; step < kSteps / 2; ++step) {
            const int block = step % 4, pair = step / 4;  // row blocks in turn
            const int i = 4 * block + 2 * pair;
            const uint32_t a[4] = {
                merged(product<halves>(first.window[0], i), product<halves>(first.window[1], i)),
                merged(product<halves>(second.window[0], i), product<halves>(second.window[1], i)),
                merged(product<halves>(first.window[0], i + 1),
                       product<halves>(first.window[1], i + 1)),
                merged(product<halves>(second.window[0], i + 1),
                       product<halves>(second.window[1], i + 1))};
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
            product<halves>(first.window[0], i), product<halves>(second.window[0], i),
            product<halves>(first.window[1], i), product<halves>(second.window[1], i)};
        mma_u8s8(acc[block], a, b[pair], pair ? Sum(acc[block]) : Sum(c[block]));
    }
}

// The sums of a warp over chunks of 128 columns, begin .. end - 1; the last one of a matrix may have
// fewer columns. `ring`: kRingBytes of shared memory of this warp's own.
template <int halves, int group_columns, int planes, int tokens>
DEVICE void add_chunks(const Call& call, const Work& work, const uint8_t* above,
                       const uint8_t* slab, int begin, int end, uint8_t* ring,
                       Sums<tokens>& sums) {
    using S = Stage<halves, group_columns>;
    constexpr int center = Width<halves>::center;
    constexpr int parts = group_columns / kUnitColumns / S::units;  // stages of a group
    constexpr bool fixed = parts == S::stages && !kRolled;  // a part is always in the same stage
    const int j = lane_id() % 4;
    int rest = min(end * kStepUnits, call.k / kUnitColumns) - begin * kStepUnits;  // units

    Feed<halves, group_columns, planes> feed(call, work, above, slab, begin * kStepUnits);
#pragma unroll
    for (int s = 0; s < S::stages; ++s)
        if (s * S::units < rest) feed.copy_words(ring + s * S::bytes, s * S::units);
    wait_for_codes(call.late);
#pragma unroll
    for (int s = 0; s < S::stages; ++s) {
        if (s * S::units < rest) {
            feed.copy_codes(ring + s * S::bytes, s * S::units);
            if (s % parts == 0) feed.copy_numbers(ring + s * S::bytes, s * S::units);
        }
        cp_async_commit();
    }

    int stage = 0;
    while (rest > 0) {
        int acc[4][4];
        int start[4][4];  // four times the same
        float scale[tokens];
#pragma unroll kRolled ? 1 : parts
        for (int part = 0; part < parts; ++part) {
            uint8_t* const at = ring + (fixed ? part : stage) * S::bytes;
            stage = (stage + 1) % S::stages;
            cp_async_wait<S::stages - 1>();
            __syncwarp();
            if (part == 0) {
                int sum[tokens];
#pragma unroll
                for (int t = 0; t < tokens; ++t) {
                    const bool has = j + 4 * t < work.count;
                    const Numbers numbers = feed.number(at, has ? j + 4 * t : 0);
                    scale[t] = has ? numbers.scale : 0.0f;
                    sum[t] = has ? numbers.sum : 0;
                }
#pragma unroll
                for (int b = 0; b < 4; ++b) {
                    start[b][0] = start[b][2] = planes == 1 ? -center * sum[0] : 0;
                    start[b][1] = start[b][3] = tokens == planes ? 0 : -center * sum[tokens - 1];
                    if (kRolled)
#pragma unroll
                        for (int c = 0; c < 4; ++c) acc[b][c] = start[b][c];
                }
            }
            const int ahead = (fixed ? part * S::units : 0) + kRingUnits;
#pragma unroll
            for (int u = 0; u < S::units; ++u) {
                const Unit<halves> now = feed.unit(at, u);
                if (u + 1 == S::units) {
                    __syncwarp();
                    if (ahead < rest) {
                        feed.copy_words(at, ahead);
                        feed.copy_codes(at, ahead);
                        if (part == 0) feed.copy_numbers(at, ahead);
                    }
                    cp_async_commit();
                }
                if (!kRolled && part == 0 && u == 0)
                    add_unit<halves>(now.words, now.x, start, acc);
                else
                    add_unit<halves>(now.words, now.x, acc, acc);
            }
            if (!fixed) {
                feed.advance(S::units, part + 1 == parts);
                rest -= S::units;
            }
        }
        if (fixed) {
            feed.advance(parts * S::units, 1);
            rest -= parts * S::units;
        }
#pragma unroll
        for (int t = 0; t < tokens; ++t)
#pragma unroll
            for (int b = 0; b < 4; ++b)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int* c = acc[b] + 2 * h;
                    const int total = planes == 1 ? c[t] : 128 * c[0] + c[1];
                    sums.value[b][h][t] = fmaf(scale[t], float(total), sums.value[b][h][t]);
                }
    }
}

// slabs_here: the warps of a block share the columns of 1, 2 or 4 slabs.
template <int halves, int group, int planes, int tokens>
DEVICE void decode_some(const Call& call, const Work& work, int slabs_here) {
    const int slabs = (call.n + kSlabRows - 1) / kSlabRows;
    const int64_t slab_bytes = Width<halves>::slab_bytes(call.k);
    const int ranges = kWarps / slabs_here, first_slab = work.row_block * slabs_here;
    const int s = first_slab + warp_id() % slabs_here;
    const int chunks = (call.k + kStep - 1) / kStep;
    const int parts = call.splits * ranges;
    const int part = work.split * ranges + warp_id() / slabs_here;

    uint8_t* const ring = shared_memory<uint8_t>() + warp_id() * kRingBytes;
    Sums<tokens> sums = {};
    if (s < slabs)
        add_chunks<halves, group, planes, tokens>(
            call, work, work.matrix + (s ? s - 1 : slabs - 1) * slab_bytes,
            work.matrix + s * slab_bytes, chunks * part / parts, chunks * (part + 1) / parts, ring,
            sums);
    else
        wait_for_codes(call.late);

    // Sum over the ranges.
    __syncwarp();
    auto* const own = reinterpret_cast<float*>(ring);  // [tokens][kPitch], of each warp
    const int r = lane_id() / 4, j = lane_id() % 4;
#pragma unroll
    for (int t = 0; t < tokens; ++t) {
        const int token = j + 4 * t;
        float* to = own + token * kPitch + 2 * r;
        if (token < work.count)
#pragma unroll
            for (int b = 0; b < 4; ++b)
                *reinterpret_cast<float2*>(to + 16 * b) =
                    make_float2(sums.value[b][0][t], sums.value[b][1][t]);
    }
    __syncthreads();
    const auto* partial = shared_memory<float>();
    const auto* scales = reinterpret_cast<const uint16_t*>(work.matrix + slabs * slab_bytes);
    const int rows = slabs_here * kSlabRows;
    for (int i = int(threadIdx.x); i < work.count * rows; i += 32 * kWarps) {
        const int token = i / rows, row = i % rows, n = first_slab * kSlabRows + row;
        if (n >= call.n) continue;
        float total = 0;
        for (int w = row / kSlabRows; w < kWarps; w += slabs_here)
            total += partial[w * (kRingBytes / 4) + token * kPitch + row % kSlabRows];
        const int64_t position = work.split * call.positions + work.first + token;
        call.out[position * call.stride + n] = total * bfloat_to_float(__ldg(scales + n));
    }
}

template <int halves, int group, int planes>
DEVICE void decode(const Call& call, const Work& work, int slabs_here) {
    if (planes == 1 && work.count > 4)
        decode_some<halves, group, planes, 2>(call, work, slabs_here);
    else
        decode_some<halves, group, planes, 1>(call, work, slabs_here);
}

}  // namespace
}  // namespace moepress
