// Products of trellis matrices with many tokens. See trellis_code.cuh for the fragments of A.
//
// A block takes two slabs, 128 rows, and a panel of 128 tokens (or the two planes of 64 tokens). Each
// of its eight warps decodes a row block, 16 rows, and multiplies it with the codes of all tokens:
// an activation is multiplied with each byte of a weight's product. Steps of 128 columns go through a
// ring in shared memory. The sums of a group are exact integers in registers; then they are scaled
// and added to sums in float32. The center of the code is subtracted at the end, from all groups.
//
// On compute capability 9.0, four warps multiply together (wgmma), while they decode the next unit of
// 32 columns. Elsewhere each warp multiplies by itself (mma).
//
// Costs of a step for a warp, 2048 weights and 128 tokens (9.0, SASS of CUDA 13.0, 215 registers,
// nothing spilled): 505 instructions at 2 bits, 254 of them on the ALU; 8 wgmma of 64 clocks. Two warps
// share a quarter of a multiprocessor: 1024 clocks of the tensor cores, 1016 of the ALU. At 3 and 4
// bits: 646 and 594 instructions, 16 wgmma.
#include "trellis_call.cuh"
#include "trellis_code.cuh"

#ifndef MOEPRESS_TRELLIS_WGMMA  // 1: products of warpgroups
#ifdef MOEPRESS_WARPGROUP
#define MOEPRESS_TRELLIS_WGMMA 1
#else
#define MOEPRESS_TRELLIS_WGMMA 0
#endif
#endif

namespace moepress {
namespace {

constexpr int kSlabs = 2;          // of a block, four warps each
constexpr int kColumns = 128;      // of the product: tokens times planes
constexpr int kShared = 99 << 10;  // bytes of the ring: what every card has

// A stage of the ring.
//   codes   [128 columns of the product][128 bytes, of one token each]; the 16-byte pieces of column
//           n are permuted: piece i is at i ^ n % 8
//   words   [slabs][parts][4 units][4 tiles][64 bytes]; part 0: the last words of the tiles above;
//           part w + 1: word w. A word that two tiles share is there for both. In the tiles 2 and 3
//           the upper and lower 32 bytes are swapped: that avoids bank conflicts.
//   scales  [groups][128 tokens] float32
//   sums    the same, int32
template <int halves, int group>
struct Stage {
    static constexpr int groups = kStep / group;
    static constexpr int slab_words = 1024 * (Width<halves>::words + 1);
    static constexpr int words = kColumns * kStep;  // where the words are
    static constexpr int scales = words + kSlabs * slab_words;
    static constexpr int sums = scales + 4 * groups * kColumns;
    static constexpr int bytes = sums + 4 * groups * kColumns;
    static constexpr int count = kShared / bytes < 4 ? kShared / bytes : 4;
    static_assert(bytes % 1024 == 0 && count >= 3);
};

DEVICE int swapped(int tile, int byte) { return 64 * tile + (byte ^ (tile / 2 * 32)); }
DEVICE int piece_of(int column, int piece) { return piece ^ column % 8; }

// The copies of one thread, step after step: 16 bytes of the words of a unit, of every second part; 16
// bytes of the codes of four columns of the product; a token's scales, or its sums.
template <int halves, int group_columns, int planes>
struct Loader {
    using To = Stage<halves, group_columns>;
    using W = Width<halves>;
    static constexpr int tokens = kColumns / planes;

    const uint8_t* words[2];  // of the slab above (or word 0); of word 1 or 2
    const int8_t* codes[4];
    const uint32_t* numbers;                       // scales or sums
    uint32_t words_to, codes_to, numbers_to;       // where, in shared memory
    int words_column, codes_column;                // which, in a step
    int left;                                      // columns that are not copied yet
    bool has[4], has_numbers, has_last;

    DEVICE Loader(const Call& call, const Work& work, const uint8_t* above, const uint8_t* slab,
                  int step, const uint8_t* shared) {
        const int t = int(threadIdx.x), part = t % 128 / 64;
        const int unit = t % 64 / 16, tile = t / 4 % 4, quarter = t % 4;
        const int64_t at = int64_t(step * kStepUnits + unit) * W::unit_bytes + quarter * 16;
        const uint32_t base = kept_shared_address(shared);
        words[0] = part == 0 ? above + at + W::offset(tile, W::words - 1)
                             : slab + at + W::offset(tile, 0);
        words[1] = slab + at + W::offset(tile, part + 1);
        words_to = base + To::words + t / 128 * To::slab_words + part * 1024 + unit * 256 +
                   swapped(tile, quarter * 16);
        words_column = kUnitColumns * unit;
        has_last = part == 0;

        const int column = t / 8, piece = t % 8;
        codes_to = base + column * kStep + 16 * piece_of(column, piece);
        codes_column = 16 * piece;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = (column + 32 * i) / planes, plane = (column + 32 * i) % planes;
            has[i] = token < work.count;
            const int64_t row = has[i] ? row_of(call, work, token) : 0;
            codes[i] = call.q + (plane * call.rows + row) * call.k + step * kStep + codes_column;
        }

        const int token = t % 128;
        has_numbers = token < work.count && token < tokens;
        const int64_t row = has_numbers ? row_of(call, work, token) : 0;
        const void* all = t < 128 ? static_cast<const void*>(call.scale) : call.sum;
        numbers = static_cast<const uint32_t*>(all) + row * (call.k / group_columns) +
                  step * To::groups;
        numbers_to = base + (t < 128 ? To::scales : To::sums) + 4 * token;
        left = call.k - step * kStep;
    }

    // Copy the next step to a stage of the ring.
    DEVICE void copy(int stage) {
        constexpr int parts = (W::words + 2) / 2;
        const uint32_t place = uint32_t(stage * To::bytes);
        const bool has_words = words_column < left, has_codes = codes_column < left;
        if (has_words) cp_async_16(words_to + place, words[0]);
#pragma unroll
        for (int i = 1; i < parts; ++i)
            if (has_words && (2 * i < W::words || has_last))
                cp_async_16(words_to + place + 2048 * i, words[1] + 128 * (i - 1));
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (has[i])
                cp_async_16_or_zero(codes_to + place + 32 * kStep * i, codes[i], has_codes);
#pragma unroll
        for (int i = 0; i < To::groups; ++i)
            if (has_numbers)
                cp_async_4_or_zero(numbers_to + place + 4 * kColumns * i, numbers + i,
                                   group_columns * i < left);
#pragma unroll
        for (int i = 0; i < 2; ++i) words[i] += kStepUnits * W::unit_bytes;
#pragma unroll
        for (int i = 0; i < 4; ++i) codes[i] += kStep;
        numbers += To::groups;
        left -= kStep;
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

// acc = A B over a unit of a stage's codes; added to acc unless it is the `first` of a group. The
// result is there after `finished`.
template <int count>
DEVICE void multiply(const uint32_t (&a)[count][4], const uint8_t* codes, int unit, bool first,
                     Exact& acc) {
#if MOEPRESS_TRELLIS_WGMMA
    const uint64_t b = warpgroup_columns(codes, unit * kUnitColumns);
    warpgroup_begin();
#pragma unroll
    for (int i = 0; i < count; ++i) warpgroup_u8s8(acc.value, a[i], b, i > 0 || !first);
    warpgroup_commit();
#else
    if (first) acc = {};
    // Each load brings both halves of a unit for 16 columns.
    const int row = lane_id() % 8 + lane_id() / 16 * 8;
    const uint8_t* at = codes + row * kStep + 16 * piece_of(row, 2 * unit + lane_id() / 8 % 2);
#pragma unroll
    for (int c = 0; c < kColumns / 8; c += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, at + 8 * kStep * c);
        const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
        for (int i = 0; i < count; ++i) mma_u8s8(acc.value[c], a[i], left, acc.value[c]);
#pragma unroll
        for (int i = 0; i < count; ++i) mma_u8s8(acc.value[c + 1], a[i], right, acc.value[c + 1]);
    }
#endif
}
// Wait until at most `pending` of this warp's calls of `multiply` are under way.
template <int pending>
DEVICE void finished() {
#if MOEPRESS_TRELLIS_WGMMA
    warpgroup_wait<pending>();
#endif
}

// After waiting for copies, before the barrier: products of warpgroups will see them.
DEVICE void see_copies() {
#if MOEPRESS_TRELLIS_WGMMA
    warpgroup_see_shared();
#endif
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

template <int halves, int group, int planes>
DEVICE void prefill(const Call& call, const Work& work) {
    using Ring = Stage<halves, group>;
    constexpr int center = Width<halves>::center, units = group / kUnitColumns;
    constexpr int ahead = Ring::count - 2;  // steps
    auto* const shared = shared_memory<uint8_t>();
    const uint8_t* const matrix = work.matrix;
    const int slabs = (call.n + kSlabRows - 1) / kSlabRows;
    const int64_t slab_bytes = Width<halves>::slab_bytes(call.k);
    const int warps = warp_id() / 4;  // which four: they take a slab
    const int s = work.row_block * kSlabs + warps;
    const int mine = s < slabs ? s : slabs - 1;  // warps without a slab work for nobody
    const int steps = (call.k + kStep - 1) / kStep;
    const int begin = int(int64_t(steps) * work.split / call.splits);
    const int end = int(int64_t(steps) * (work.split + 1) / call.splits);

    Loader<halves, group, planes> loader(call, work,
                                       matrix + (mine ? mine - 1 : slabs - 1) * slab_bytes,
                                       matrix + mine * slab_bytes, begin, shared);
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
        if (begin + i < end) loader.copy(i);
        cp_async_commit();
    }

    const int r = lane_id() / 4, j = lane_id() % 4;
    const RowBlock<halves> block(warp_id() % 4, j % 2);
    const int words_at =
        Ring::words + warps * Ring::slab_words + block.last * 1024 + swapped(j, 8 * r);
    const int oldest = block.last > 0 ? -1024 : 0;  // of the words; used where it is not 0
    Exact acc;
    Sums<planes> sums = {};
    float correction = 0;  // of token threadIdx.x
    // The two fours of warps are up to a step apart, so that the tensor cores have work while one of
    // them adds up a group. Each copies half of a step. To begin a step, a four needs the other's word
    // that its copies for this step are there, and that it has finished the step before the last one,
    // whose place in the ring is filled next. The other gives it when it is in the step before this
    // one: early, if its copies had a step's time.
    const auto barrier = [&](int whose, int step) { return 1 + 2 * whose + step % 2; };
    const auto give_word = [&](int step) {
        cp_async_wait<ahead - 1>();
        see_copies();
        if (step < end) barrier_arrive(barrier(1 - warps, step), 2 * 128);
    };
    give_word(begin);
    int stage = 0, free_stage = ahead;  // of the current step; of the next copy
    for (int step = begin; step < end; ++step) {
        barrier_sync(barrier(warps, step), 2 * 128);
        if (step + ahead < end) loader.copy(free_stage);
        cp_async_commit();
        if (ahead > 1) give_word(step + 1);
        free_stage = free_stage + 1 == Ring::count ? 0 : free_stage + 1;
        const uint8_t* const now = shared + stage * Ring::bytes;
        const auto* scales = reinterpret_cast<const float*>(now + Ring::scales);
        if (int(threadIdx.x) < kColumns / planes) {
            const auto* exact = reinterpret_cast<const int32_t*>(now + Ring::sums);
#pragma unroll
            for (int i = 0; i < Ring::groups; ++i) {
                const int at = i * kColumns + int(threadIdx.x);
                correction = fmaf(scales[at], float(center * exact[at]), correction);
            }
        }
        uint32_t a[2][Width<halves>::counted][4];
#pragma unroll
        for (int u = 0; u < kStepUnits; ++u) {
            const uint8_t* from = now + words_at + 256 * u;
            uint2 word[3];
            word[2] = *reinterpret_cast<const uint2*>(from + 1024);
            word[1] = *reinterpret_cast<const uint2*>(from);
            word[0] = make_uint2(0, 0);
            if (halves % 2 || halves == 6)
                word[0] = *reinterpret_cast<const uint2*>(from + oldest);
            fragments<halves>(word, block, a[u % 2]);
            multiply(a[u % 2], now, u, u % units == 0, acc);
            if (ahead == 1 && u + 1 == kStepUnits) give_word(step + 1);
            if ((u + 1) % units == 0) {
                finished<0>();
                add_group<planes>(acc, scales + u / units * kColumns, sums);
            } else {
                finished<1>();
            }
        }
        stage = stage + 1 == Ring::count ? 0 : stage + 1;
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
// shared memory: kShared.
#define MOEPRESS_TRELLIS_PREFILL(GROUP, PLANES)                                         \
    MOEPRESS_TRELLIS_KERNEL(moepress_trellis_prefill, GROUP, PLANES, 128 * moepress::kSlabs, 1, \
                            kColumns, 0, prefill)

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
