// What the two halves of attention share: attention.cpp cuts the work into pieces, and an
// instruction set computes a piece (attention_chunk.h).
#pragma once

#include <cstdint>

namespace moepress {

constexpr int kAttentionSize = 512;   // numbers of a head at most
constexpr int kAttentionChunk = 256;  // positions of a chunk
constexpr int kAttentionRows = 8;     // queries of a piece at most
constexpr int kAttentionBlock = 16;   // positions that are multiplied together at most

// Some queries over the visible positions of one chunk.
struct AttentionPiece {
    int32_t numbers;  // MoepressNumbers of q, k and v
    int size;         // numbers of a head, D
    float scale;
    int rows;
    const void* q[kAttentionRows];  // [rows], each [D]
    const void *k, *v;              // the chunk's first position
    int64_t k_stride, v_stride;     // from position to position, in numbers
    // [count] positions in the chunk that the queries see, at least one; behind them is room for
    // kAttentionBlock more.
    int32_t* positions;
    int count;
    const float* bias;  // [count], added to scores; null: none
    // The result for each row, with w = exp(score - max): the sum of w v, at row * out_stride, D
    // rounded up to a multiple of 16 numbers; max and the sum of w, at row * sums_stride.
    float* out;
    int64_t out_stride;
    float* sums;  // [2]
    int64_t sums_stride;
};
using Attend = void (*)(const AttentionPiece& piece);

// The results of all chunks for one query, one after another.
struct AttentionParts {
    const float* out;   // [chunks][padded]; of a chunk whose sum is 0 not read
    float* sums;        // [chunks][2]; overwritten
    int64_t chunks;
    int size, padded;
};
// y [D] in `numbers`; zeros if all sums are 0.
using AttentionMerge = void (*)(const AttentionParts& parts, int32_t numbers, void* y);

}  // namespace moepress
