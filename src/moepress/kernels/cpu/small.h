// Small operations of decoding, as the C functions (small.cpp) give them to an instruction set.
#pragma once

#include <cstdint>

namespace moepress {

// What a norm does with its weight w and the normed numbers n, which are floats: FORMULAS of
// kernels/small_reference.py.
enum NormFormula { kRoundedNorm, kWideNorm, kCenteredNorm, kFormulas };

struct NormCall {
    const void* x;
    int32_t x_numbers;
    int64_t rows, outer_stride, row_stride;  // rows: after how many the next outer one begins
    int64_t size;
    const void* weight;  // or null
    int32_t weight_numbers;
    float epsilon;
    NormFormula formula;
    void* y;  // floats where the formula is kRoundedNorm and the weight has other numbers than x
};

// Heads of queries or of keys, and where they go.
struct Heads {
    const void* from;
    int64_t batch, head, token;  // strides
    int64_t count;
    void* to;
    int64_t to_batch, to_head, to_token;
};

struct RotaryCall {
    Heads heads[2];
    int32_t numbers;
    const void *cos, *sin;
    int64_t angle_batch, angle_token;
    int32_t angle_numbers;
    int64_t tokens, size, rotated;
    bool neighbours_in, neighbours_out, of_pairs, wide;
};

}  // namespace moepress
