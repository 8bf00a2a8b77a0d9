// Products of trellis matrices with many tokens. See trellis_code.cuh for the fragments of A.
//
// A block takes two slabs, 128 rows, and a panel of 128 tokens (or the two planes of 64 tokens). Each
// of its eight warps decodes a row block, 16 rows, and multiplies it with the codes of all tokens:
// an activation is multiplied with each byte of a weight's product. Steps of 128 columns go through a
// ring in shared memory. The sums of a group are exact integers in registers; then they are scaled
// and added to sums in float32.
#include "trellis_call.cuh"
#include "trellis_code.cuh"

#ifndef MOEPRESS_TRELLIS_STAGES
#define MOEPRESS_TRELLIS_STAGES 3
#endif

namespace moepress {
namespace {

constexpr int kSlabs = 2;                         // of a block
constexpr int kColumns = 128;  // of the product: tokens times planes
constexpr int kStages = MOEPRESS_TRELLIS_STAGES;

// A stage of the ring.
//   words   [slabs][bits + 1 parts][4 units][4 tiles][64 bytes]; part 0: the last words of the tiles
//           above. In the tiles 2 and 3 the halves are swapped: that avoids bank conflicts.
//   codes   [128 columns of the product][128 bytes, of one token each]; its 16-byte pieces are
//           permuted by the column, see `piece_of`
//   scales  [4 groups][128 tokens] float32
//   sums    the same, int32
constexpr int kWordsBytes = 1024 * 5;  // of a slab
constexpr int kCodesAt = kSlabs * kWordsBytes;
constexpr int kScalesAt = kCodesAt + kColumns * kStep;
constexpr int kSumsAt = kScalesAt + 4 * kStepUnits * kColumns;
constexpr int kStageBytes = kSumsAt + 4 * kStepUnits * kColumns;

DEVICE int swapped(int tile, int byte) { return 64 * tile + (byte ^ (tile / 2 * 32)); }
DEVICE int piece_of(int column, int piece) { return piece ^ (column % 4 * 2); }

// The copies of one thread.
template <int bits, int group_columns, int planes>
struct Loader {
    static constexpr int units = group_columns / kUnitColumns;
    static constexpr int tokens = kColumns / planes;
    static constexpr int parts = (bits + 2) / 2;  // of the words that a thread copies

    const uint8_t* words[2];  // of the slab above (or word 0); of word 1 or 2
    int stride;
    const int8_t* codes[4];
    const uint32_t* group;  // scale or sum
    bool has[4], has_group;
    int groups, cols;

    DEVICE Loader(const Call& call, const Work& work, const uint8_t* above, const uint8_t* slab, int step) {
        const int t = int(threadIdx.x), item = t % 64, part = t % 128 / 64;
        const int64_t at = int64_t(step * kStepUnits + item / 16) * 256 * bits +
                           item / 4 % 4 * 64 * bits + item % 4 * 16;
        words[0] = part == 0 ? above + at + 64 * (bits - 1) : slab + at;
        words[1] = slab + at + 64 * (part + 1);
        cols = call.k;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int column = t / 8 + 32 * i, token = column / planes, plane = column % planes;
            has[i] = token < work.count;
            const int64_t row = has[i] ? row_of(call, work, token) : 0;
            codes[i] = call.q + (int64_t(plane) * call.rows + row) * cols;
        }
        const int token = t % 128;
        has_group = token < work.count && token < tokens;
        groups = call.k / group_columns;
        const void* numbers = t < 128 ? static_cast<const void*>(call.scale) : call.sum;
        group = static_cast<const uint32_t*>(numbers) +
                (has_group ? row_of(call, work, token) : 0) * groups;
    }

    DEVICE void copy(uint8_t* stage, int step) {
        const int t = int(threadIdx.x), item = t % 64;
        const int left = cols / kUnitColumns - step * kStepUnits;  // units
        uint8_t* to = stage + t / 128 * kWordsBytes + t % 128 / 64 * 1024 + item / 16 * 256 +
                      swapped(item / 4 % 4, item % 4 * 16);
        if (item / 16 < left) {
            cp_async_16(to, words[0]);
#pragma unroll
            for (int i = 1; i < parts; ++i)
                if (2 * i < bits || t % 128 < 64)
                    cp_async_16(to + 2048 * i, words[1] + 128 * (i - 1));
        }
        words[0] += kStepUnits * 256 * bits;
        words[1] += kStepUnits * 256 * bits;
        const int piece = t % 8, column = step * kStep + 16 * piece;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int at = t / 8 + 32 * i;
            if (has[i])
                cp_async_16_or_zero(stage + kCodesAt + at * kStep + 16 * piece_of(at, piece),
                                    codes[i] + (column < cols ? column : 0), column < cols);
        }
        if (has_group)
#pragma unroll
            for (int i = 0; i < kStepUnits / units; ++i) {
                const int g = step * kStepUnits / units + i;
                cp_async_4_or_zero(stage + kScalesAt + (t / 128 * kStepUnits + i) * 4 * kColumns +
                                       t % 128 * 4,
                                   group + (g < groups ? g : 0), g < groups);
            }
    }
};

// The sums of a warp: value[c][2 h + t]: row 2 r + h of its row block; columns 8 c + 2 j + t.
struct Exact {
    int value[kColumns / 8][4];
};
template <int planes>
struct Sums {
    float value[kColumns / 8][4 / planes];
};

// acc = c + A B over a unit of a stage's codes.
template <int count>
DEVICE void multiply(const uint32_t (&a)[count][4], const uint8_t* codes, int unit, bool first,
                     Exact& acc) {
    const int r = lane_id() / 4, j = lane_id() % 4;
    const int none[4] = {};
    const int at = r * kStep + 16 * piece_of(r, 2 * unit + j / 2) + j % 2 * 8;
#pragma unroll
    for (int c = 0; c < kColumns / 8; ++c) {
        const uint2 x = *reinterpret_cast<const uint2*>(codes + at + 8 * kStep * c);
        const uint32_t b[2] = {x.x, x.y};
        if (first)
            mma_u8s8(acc.value[c], a[0], b, none);
        else
            mma_u8s8(acc.value[c], a[0], b, acc.value[c]);
#pragma unroll
        for (int i = 1; i < count; ++i) mma_u8s8(acc.value[c], a[i], b, acc.value[c]);
    }
}

template <int planes>
DEVICE void add_group(const Exact& acc, const float* scales, Sums<planes>& sums) {
    const int j = lane_id() % 4;
#pragma unroll
    for (int c = 0; c < kColumns / 8; ++c) {
        const int* v = acc.value[c];
        if (planes == 1) {
            const float2 a = *reinterpret_cast<const float2*>(scales + 8 * c + 2 * j);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                sums.value[c][i] = fmaf(i % 2 ? a.y : a.x, float(v[i]), sums.value[c][i]);
        } else {
            const float a = scales[4 * c + j];
#pragma unroll
            for (int h = 0; h < 2; ++h)
                sums.value[c][h] =
                    fmaf(a, float(128 * v[2 * h] + v[2 * h + 1]), sums.value[c][h]);
        }
    }
}

template <int bits, int group, int planes>
DEVICE void prefill(const Call& call, const Work& work) {
    constexpr int center = kCenter[bits];
    auto* const shared = shared_memory<uint8_t>();
    const int slabs = (call.n + kSlabRows - 1) / kSlabRows;
    const int64_t slab_bytes = int64_t(8) * call.k * bits;
    const uint8_t* const matrix = work.matrix;
    const int s = work.row_block * kSlabs + warp_id() / 4;
    const int mine = s < slabs ? s : slabs - 1;  // a warp without a slab works for nobody
    const int steps = (call.k + kStep - 1) / kStep;
    const int begin = int(int64_t(steps) * work.split / call.splits);
    const int end = int(int64_t(steps) * (work.split + 1) / call.splits);
    constexpr int units = group / kUnitColumns;

    Loader<bits, group, planes> loader(call, work, matrix + (mine ? mine - 1 : slabs - 1) * slab_bytes,
                                matrix + mine * slab_bytes, begin);
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
        if (begin + i < end) loader.copy(shared + i * kStageBytes, begin + i);
        cp_async_commit();
    }

    const RowBlock<bits> block(warp_id() % 4);
    const int r = lane_id() / 4, j = lane_id() % 4;
    const int words_at = warp_id() / 4 * kWordsBytes + block.last * 1024 + swapped(j, 8 * r);
    const int oldest = block.last > 0 ? -1024 : 0;  // of the words; used where it is not 0
    Exact acc;
    Sums<planes> sums = {};
    float correction = 0;  // of token threadIdx.x
    int stage = 0;
    for (int step = begin; step < end; ++step) {
        cp_async_wait<kStages - 2>();
        __syncthreads();
        if (step + kStages - 1 < end)
            loader.copy(shared + (stage ? stage - 1 : kStages - 1) * kStageBytes,
                        step + kStages - 1);
        cp_async_commit();
        const uint8_t* const now = shared + stage * kStageBytes;
        const auto* scales = reinterpret_cast<const float*>(now + kScalesAt);
        if (int(threadIdx.x) < kColumns / planes) {
            const auto* exact = reinterpret_cast<const int32_t*>(now + kSumsAt);
#pragma unroll
            for (int i = 0; i < kStepUnits / units; ++i) {
                const int at = i * kColumns + int(threadIdx.x);
                correction = fmaf(scales[at], float(center * exact[at]), correction);
            }
        }
#pragma unroll
        for (int u = 0; u < kStepUnits; ++u) {
            uint2 word[3];
            const uint8_t* from = now + words_at + 256 * u;
            word[2] = *reinterpret_cast<const uint2*>(from + 1024);
            word[1] = *reinterpret_cast<const uint2*>(from);
            word[0] = make_uint2(0, 0);
            if (bits == 3) word[0] = *reinterpret_cast<const uint2*>(from + oldest);
            uint32_t a[kCounted<bits>][4];
            fragments<bits>(word, block.shift, a);
            multiply(a, now + kCodesAt, u, u % units == 0, acc);
            if ((u + 1) % units == 0) add_group<planes>(acc, scales + u / units * kColumns, sums);
        }
        stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    cp_async_wait<0>();
    __syncthreads();
    auto* const corrections = reinterpret_cast<float*>(shared);
    if (int(threadIdx.x) < kColumns / planes) corrections[threadIdx.x] = correction;
    __syncthreads();
    if (s >= slabs) return;

    const auto* row_scales = reinterpret_cast<const uint16_t*>(matrix + slabs * slab_bytes);
    const int n = s * kSlabRows + warp_id() % 4 * 16 + 2 * r;
    const float scale[2] = {bfloat_to_float(__ldg(row_scales + n)),
                            bfloat_to_float(__ldg(row_scales + n + 1))};
    const int64_t first = work.split * call.positions + work.first;
#pragma unroll
    for (int c = 0; c < kColumns / 8; ++c)
#pragma unroll
        for (int t = 0; t < 2 / planes; ++t) {
            const int token = planes == 1 ? 8 * c + 2 * j + t : 4 * c + j;
            if (token >= work.count) continue;
            float* to = call.out + (first + token) * call.n + n;
            const float less = corrections[token];
            const float2 y =
                make_float2(scale[0] * (sums.value[c][t] - less),
                            scale[1] * (sums.value[c][planes == 1 ? 2 + t : 1] - less));
            if (call.n % 2 == 0 && n < call.n) {
                *reinterpret_cast<float2*>(to) = y;
            } else {
                if (n < call.n) to[0] = y.x;
                if (n + 1 < call.n) to[1] = y.y;
            }
        }
}

}  // namespace
}  // namespace moepress

// Grid: ceil(N / 128) blocks of rows, splits, panels of 128 positions (64 in two planes). Dynamic
// shared memory: kStages kStageBytes.
#define MOEPRESS_TRELLIS_PREFILL(GROUP, PLANES)                                         \
    MOEPRESS_TRELLIS_KERNEL(moepress_trellis_prefill, GROUP, PLANES, 128 * moepress::kSlabs, 1, \
                            kColumns, prefill)

#ifdef MOEPRESS_GROUP
MOEPRESS_TRELLIS_PREFILL(MOEPRESS_GROUP, MOEPRESS_PLANES)
#else
MOEPRESS_TRELLIS_PREFILL(32, 1)
MOEPRESS_TRELLIS_PREFILL(64, 1)
MOEPRESS_TRELLIS_PREFILL(128, 1)
MOEPRESS_TRELLIS_PREFILL(32, 2)
MOEPRESS_TRELLIS_PREFILL(64, 2)
MOEPRESS_TRELLIS_PREFILL(128, 2)
#endif
