// What the kernels of attention share: arguments, masks, the work of a block, and its result.
//
// Rows are the queries that share keys: row h T + t is token t of query head h of a group. A block
// takes some rows of one group and one split of the positions: of every `splits` tiles of 64 one,
// so that the filled part of a long cache is spread over all splits. Each warp takes 16 positions
// of a tile. Scores, their greatest, sums of exponentials and of values are float32.
#pragma once

#include "numbers.h"

namespace moepress {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kKeys = 16, kTile = kKeys * kWarps;  // positions of a warp, of a block
constexpr int64_t kBool = 3;                       // kind of a mask; the others are dtypes
constexpr float kLog2e = 1.44269504088896f;

DEVICE float nothing() { return __uint_as_float(0xFF800000); }  // -inf, the score of a masked key

struct Strides {
    int64_t batch, head, step;  // in numbers; a step is a token or a position
};

// Grid: key heads, splits, batches * groups of rows.
struct AttentionCall {
    const void *q, *k, *v, *mask;  // mask: null for none
    Strides of_q, of_k, of_v, of_mask;
    int64_t mask_position, mask_kind;  // stride; dtype as in numbers.h, or kBool
    int64_t group, tokens, positions, size;  // positions: at most 2^30
    float scale;
    float *parts, *sums;  // [batches, heads, group * tokens, splits, size], [.., splits, 2]
};

struct Query {
    int64_t head, token;
};

struct Rows {
    uint32_t batch, first, tokens;
    int count;

    DEVICE Rows(const AttentionCall& call, int most) : tokens(uint32_t(call.tokens)) {
        const uint32_t all = uint32_t(call.group) * tokens, groups = (all + most - 1) / most;
        batch = blockIdx.z, first = 0;
        if (groups > 1) {
            batch = blockIdx.z / groups;
            first = (blockIdx.z - batch * groups) * most;
        }
        count = int(min(uint32_t(most), all - first));
    }
    // The first number of this head's keys or values.
    template <class T>
    DEVICE const T* head_of(const void* p, const Strides& strides) const {
        return static_cast<const T*>(p) + batch * strides.batch + blockIdx.x * strides.head;
    }
    // A row's query head and token. Those beyond the last are the last one again.
    DEVICE Query query(const AttentionCall& call, int row) const {
        const uint32_t r = first + min(row, count - 1);
        uint32_t head = r, token = 0;
        if (tokens > 1) {
            head = r / tokens;
            token = r - head * tokens;
        }
        return {blockIdx.x * call.group + head, token};
    }
    // Where a row begins, in the queries or in the mask.
    DEVICE int64_t at(const Strides& strides, Query query) const {
        return batch * strides.batch + query.head * strides.head + query.token * strides.step;
    }
};

// What is added to the scores of n positions; `row`: where the mask of a row begins. The loads of
// all are under way together.
template <int n>
DEVICE void read_mask(const AttentionCall& call, int64_t row, const int (&position)[n],
                      float (&added)[n]) {
    uint32_t bits[n];
    const auto each = [&](auto load) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const int inside = min(position[i], int(call.positions) - 1);
            bits[i] = load(row + inside * call.mask_position);
        }
    };
    const auto* p = call.mask;
#pragma unroll
    for (int i = 0; i < n; ++i) added[i] = 0.0f;
    if (p != nullptr && call.mask_kind == kBool) {
        each([&](int64_t at) { return static_cast<const uint8_t*>(p)[at]; });
#pragma unroll
        for (int i = 0; i < n; ++i) added[i] = bits[i] ? 0.0f : nothing();
    } else if (p != nullptr && call.mask_kind == kFloat32) {
        each([&](int64_t at) { return static_cast<const uint32_t*>(p)[at]; });
#pragma unroll
        for (int i = 0; i < n; ++i) added[i] = __uint_as_float(bits[i]);
    } else if (p != nullptr) {
        each([&](int64_t at) { return static_cast<const uint16_t*>(p)[at]; });
#pragma unroll
        for (int i = 0; i < n; ++i)
            added[i] = call.mask_kind == kFloat16 ? half_to_float(uint16_t(bits[i]))
                                                  : bfloat_to_float(uint16_t(bits[i]));
    }
#pragma unroll
    for (int i = 0; i < n; ++i)
        if (position[i] >= call.positions) added[i] = nothing();
}

// Which of 8 tiles some row sees, as bits; start(i): the first of this warp's positions in tile i.
template <class Start>
DEVICE uint32_t seen_tiles(const AttentionCall& call, const Rows& rows, Start start) {
    const int tokens = min(rows.count, int(rows.tokens));
    const int different = call.of_mask.head ? rows.count : tokens;
    bool seen[4] = {};
    int position[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) position[i] = start(2 * i + lane_id() / kKeys) + lane_id() % kKeys;
    for (int row = 0; row < different; ++row) {
        float added[4];
        read_mask(call, rows.at(call.of_mask, rows.query(call, row)), position, added);
#pragma unroll
        for (int i = 0; i < 4; ++i) seen[i] |= added[i] != nothing();
    }
    uint32_t tiles = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t lanes = __ballot_sync(~0u, seen[i]);
        tiles |= uint32_t((lanes & 0xFFFF) != 0) << 2 * i | uint32_t(lanes >> 16 != 0) << (2 * i + 1);
    }
    return tiles;
}

// add(start) for each 16 positions of this warp that some row sees. Where there is one tile, its
// mask is not read first: that would take as long as the tile itself.
template <class Add>
DEVICE void each_tile(const AttentionCall& call, const Rows& rows, Add add) {
    const int tiles = (int(call.positions) + kTile - 1) / kTile, splits = int(gridDim.y);
    const int split = int(blockIdx.y);
    for (int tile = split; tile < tiles; tile += 8 * splits) {
        const auto start = [&](int i) { return (tile + i * splits) * kTile + warp_id() * kKeys; };
        uint32_t seen = 1;
        if (split + splits < tiles) seen = seen_tiles(call, rows, start);
        for (; seen; seen &= seen - 1) add(start(__ffs(int(seen)) - 1));
    }
}

// exp(x - most), where a row that has seen nothing has most = -inf.
DEVICE float weight(float x, float most) {
    return exp2f((x - (most == nothing() ? 0.0f : most)) * kLog2e);
}

// What a block knows of its rows: for each warp the greatest scores, sums of weights, and sums of
// weighted values [rows][width].
template <int rows>
struct Shared {
    float most[kWarps][rows], sum[kWarps][rows];
    float values[4];  // [kWarps][rows][width], in fact
};

// The sums of all warps, to `parts` and `sums`.
template <int most_rows>
DEVICE void write_part(const AttentionCall& call, const Rows& rows, const Shared<most_rows>* shared,
                       int width) {
    __syncthreads();
    const int columns = int(call.size) / 4;
    for (int item = int(threadIdx.x); item < rows.count * columns; item += kThreads) {
        const int row = item / columns, column = item % columns * 4;
        float most = nothing(), sum = 0, y[4] = {};
#pragma unroll
        for (int w = 0; w < kWarps; ++w) most = fmaxf(most, shared->most[w][row]);
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            const float f = weight(shared->most[w][row], most);
            const float4 x = *reinterpret_cast<const float4*>(
                shared->values + (w * most_rows + row) * width + column);
            sum += f * shared->sum[w][row];
            y[0] += f * x.x, y[1] += f * x.y, y[2] += f * x.z, y[3] += f * x.w;
        }
        const int64_t head = int64_t(rows.batch) * gridDim.x + blockIdx.x;
        const int64_t index = head * (call.group * call.tokens) + rows.first + row;
        const int64_t part = index * gridDim.y + blockIdx.y;
        *reinterpret_cast<float4*>(call.parts + part * call.size + column) =
            make_float4(y[0], y[1], y[2], y[3]);
        if (column == 0) reinterpret_cast<float2*>(call.sums)[part] = make_float2(most, sum);
    }
}

}  // namespace
}  // namespace moepress

// A kernel with the arguments of AttentionCall, which runs body(call). `blocks`: how many a
// multiprocessor can hold at least, by their registers.
#define MOEPRESS_ATTENTION_KERNEL(name, blocks, body)                                             \
    extern "C" __global__ void __launch_bounds__(moepress::kThreads, blocks) name(                \
        const void* q, int64_t q_batch, int64_t q_head, int64_t q_token, const void* k,           \
        int64_t k_batch, int64_t k_head, int64_t k_position, const void* v, int64_t v_batch,      \
        int64_t v_head, int64_t v_position, const void* mask, int64_t mask_kind,                  \
        int64_t mask_batch, int64_t mask_head, int64_t mask_token, int64_t mask_position,         \
        int64_t group, int64_t tokens, int64_t positions, int64_t size, float scale,              \
        float* parts, float* sums) {                                                              \
        begin();                                                                                  \
        body(moepress::AttentionCall{                                                             \
            q, k, v, mask, {q_batch, q_head, q_token}, {k_batch, k_head, k_position},             \
            {v_batch, v_head, v_position}, {mask_batch, mask_head, mask_token}, mask_position,    \
            mask_kind, group, tokens, positions, size, scale, parts, sums});                      \
    }
