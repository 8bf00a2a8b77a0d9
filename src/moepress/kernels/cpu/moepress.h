// The C interface of the library.
//
// Functions that return int32_t results return a Result. On any but kOk nothing is written, except
// after kNoMemory, when some of the outputs may be. All memory belongs to the caller. Sizes are
// checked here, and no packed byte outside the given ranges is ever read.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define MOEPRESS_API extern "C" __declspec(dllexport)
#else
#define MOEPRESS_API extern "C" __attribute__((visibility("default")))
#endif

enum Result : int32_t {  // in words: RESULTS in __init__.py
    kOk = 0,
    kBadCodec,       // code bits, group size or row length that no codec has
    kBadBytes,       // a matrix reaches outside its packed bytes
    kBadShape,       // a size or the number of threads is out of range
    kBadActivation,  // unknown activation function
    kBadId,          // an embedding id outside the table
    kBadPrecision,   // activation bits other than 8 and 16
    kNoMemory,
};

// The version of this interface; __init__.py refuses another.
MOEPRESS_API int32_t moepress_interface();

// The instruction sets that were compiled and that this CPU has, best first, separated by blanks.
MOEPRESS_API const char* moepress_instruction_sets();

// Run on one of them from now on. Returns 1, or 0 if it is not among them.
MOEPRESS_API int32_t moepress_use(const char* instruction_set);

// Lend a team of threads (threads.h), or null.
MOEPRESS_API void moepress_lend_team(void* gomp_parallel);

// ---- Scalar matrices (scalar.cpp): activations are rounded to activation_bits, 8 or 16 ----------

// y [tokens][rows] = x [tokens][cols] W^T + bias [rows]; bias may be null.
MOEPRESS_API int32_t moepress_scalar_linear(const float* x, int64_t tokens, int64_t cols,
                                            const uint8_t* packed, int64_t packed_bytes,
                                            int64_t rows, int32_t bits, int32_t group,
                                            const float* bias, int32_t activation_bits,
                                            int32_t threads, float* y);

// What lies between the two products of an expert. kernels/gate.py says what the fields mean, and
// which values they may have.
struct MoepressGate {
    int32_t activation;            // Activation (isa.h)
    int32_t gated, limits_output;  // 0 or 1
    float limit, alpha, up_offset, gate_softcap, up_softcap;
};

// The biases of the experts' two products.
struct MoepressBiases {
    const void* gate_up;  // [experts][rows], or null: none. Rows: 2 * intermediate if gated
    const void* down;     // [experts][hidden], or null: none
    int32_t bfloat16;     // 1: numbers are bfloat16; 0: float
};

// y [tokens][hidden]: y_t = sum over k of weight[t][k] * down_e(act(gate_e x_t) * up_e x_t), with
// e = index[t][k], and with the biases and the gate given. An index outside 0 .. experts - 1 adds
// nothing. Tables [experts][2]: first byte, code bits. An expert whose matrices both have 0 bits is
// left out and adds nothing.
MOEPRESS_API int32_t moepress_scalar_experts(
    const float* x, int64_t tokens, int64_t hidden, const int64_t* index, const float* weight,
    int64_t k, const uint8_t* gate_up, int64_t gate_up_bytes, const int64_t* gate_up_table,
    int32_t gate_up_group, const uint8_t* down, int64_t down_bytes, const int64_t* down_table,
    int32_t down_group, int64_t experts, int64_t intermediate, const MoepressGate* gate,
    const MoepressBiases* biases, int32_t activation_bits, int32_t threads, float* y);

// y [n][cols] = the rows ids [n] of a packed [rows][cols] matrix.
MOEPRESS_API int32_t moepress_scalar_embedding(const int64_t* ids, int64_t n,
                                               const uint8_t* packed, int64_t packed_bytes,
                                               int64_t rows, int64_t cols, int32_t bits,
                                               int32_t group, float* y);

// ---- Trellis matrices (trellis.cpp): activations are rotated and rounded -----------------------

// As moepress_scalar_linear and moepress_scalar_experts. `bits`, in tables too, are 1 to 4 or, for
// half widths, ten times the bits: 15, 25, 35 (trellis_code.h).
MOEPRESS_API int32_t moepress_trellis_linear(const float* x, int64_t tokens, int64_t cols,
                                             const uint8_t* packed, int64_t packed_bytes,
                                             int64_t rows, int32_t bits, int32_t group,
                                             const float* bias, int32_t activation_bits,
                                             int32_t threads, float* y);
MOEPRESS_API int32_t moepress_trellis_experts(
    const float* x, int64_t tokens, int64_t hidden, const int64_t* index, const float* weight,
    int64_t k, const uint8_t* gate_up, int64_t gate_up_bytes, const int64_t* gate_up_table,
    int32_t gate_up_group, const uint8_t* down, int64_t down_bytes, const int64_t* down_table,
    int32_t down_group, int64_t experts, int64_t intermediate, const MoepressGate* gate,
    const MoepressBiases* biases, int32_t activation_bits, int32_t threads, float* y);

// branches [8][rows]: the best trellis paths for target [8][rows], eight columns of a matrix in
// units of code values (rounding/methods/viterbi.py). `feedback` [8][rows] may be null. Else the
// paths are for t = target + feedback; then target becomes t - values, and feedback the errors
// target - values. viterbi.cpp.
MOEPRESS_API int32_t moepress_trellis_search(float* target, float* feedback, int64_t rows,
                                             int32_t bits, int32_t threads, uint8_t* branches);

// values [rows][cols]: what `branches` [rows][cols] choose (kernels/trellis.py). rows is a multiple
// of 64, cols of 8. trellis_values.cpp.
MOEPRESS_API int32_t moepress_trellis_values(const uint8_t* branches, int64_t rows, int64_t cols,
                                             int32_t bits, int32_t threads, float* values);

// ---- Online pruning (drop.cpp) ------------------------------------------------------------------

// Rank a token's choices by falling weight. A choice whose weight is below thresholds[rank] times
// the largest is dropped: its index becomes `experts`, its weight 0. With `renormalise` the
// remaining weights are scaled to the sum of all. Tokens whose `keep` is not 0 keep all; keep may
// be null. All arrays are [tokens][k], except thresholds [k] and keep [tokens].
MOEPRESS_API int32_t moepress_drop(const int64_t* index, const float* weight, int64_t tokens,
                                   int64_t k, int64_t experts, const float* thresholds,
                                   int32_t renormalise, const uint8_t* keep, int64_t* ranked,
                                   float* kept, uint8_t* dropped);
