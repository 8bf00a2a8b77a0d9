// The C interface. Every function returns a Result; nothing is written unless it is kOk. Memory is
// the caller's, sizes are checked here, and no packed byte outside the given ranges is ever read.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define MOEPRESS_API extern "C" __declspec(dllexport)
#else
#define MOEPRESS_API extern "C" __attribute__((visibility("default")))
#endif

enum Result : int32_t {  // RESULTS in __init__.py says them in words
    kOk = 0,
    kBadCodec,       // code bits, group size or row length that no codec has
    kBadBytes,       // a matrix reaches outside its packed bytes
    kBadShape,       // a size or the number of threads is out of range
    kBadActivation,  // unknown activation
    kBadId,          // an embedding id outside the table
    kBadPrecision,   // activation bits other than 8 and 16
    kNoMemory,
};

// The version of this interface; __init__.py refuses another.
MOEPRESS_API int32_t moepress_interface();

// Instruction sets that were compiled and that this CPU has, best first, separated by blanks.
MOEPRESS_API const char* moepress_instruction_sets();

// Use one of them; 0 if it is not among them.
MOEPRESS_API int32_t moepress_use(const char* instruction_set);

// Lend a team of threads (threads.h), or null.
MOEPRESS_API void moepress_lend_team(void* gomp_parallel);

// y [tokens][rows] = x [tokens][cols] W^T + bias [rows] or null
MOEPRESS_API int32_t moepress_linear(const float* x, int64_t tokens, int64_t cols,
                                     const uint8_t* packed, int64_t packed_bytes, int64_t rows,
                                     int32_t bits, int32_t group, const float* bias,
                                     int32_t activation_bits, int32_t threads, float* y);

// y [tokens][hidden] = sum over k of weight[t][k] * down_e(act(gate_e x_t) * up_e x_t), e =
// index[t][k]; an index outside 0 .. experts-1 adds nothing. Tables [experts][2]: first byte, bits;
// an expert whose matrices both have 0 bits is left out and adds nothing.
MOEPRESS_API int32_t moepress_experts(
    const float* x, int64_t tokens, int64_t hidden, const int64_t* index, const float* weight,
    int64_t k, const uint8_t* gate_up, int64_t gate_up_bytes, const int64_t* gate_up_table,
    int32_t gate_up_group, const uint8_t* down, int64_t down_bytes, const int64_t* down_table,
    int32_t down_group, int64_t experts, int64_t intermediate, int32_t activation,
    int32_t activation_bits, int32_t threads, float* y);

// y [n][cols] = rows ids of a packed [rows][cols] matrix
MOEPRESS_API int32_t moepress_embedding(const int64_t* ids, int64_t n, const uint8_t* packed,
                                        int64_t packed_bytes, int64_t rows, int64_t cols,
                                        int32_t bits, int32_t group, float* y);

// A token's choices by falling weight; one whose weight is below thresholds[rank] times the largest
// is dropped: index experts, weight 0. What stays is scaled up to the sum of all if `renormalise`.
// Tokens whose `keep` is not 0 keep all; keep may be null. All arrays are [tokens][k] but thresholds
// [k] and keep [tokens].
MOEPRESS_API int32_t moepress_drop(const int64_t* index, const float* weight, int64_t tokens,
                                   int64_t k, int64_t experts, const float* thresholds,
                                   int32_t renormalise, const uint8_t* keep, int64_t* ranked,
                                   float* kept, uint8_t* dropped);

// Branches [8][rows] of the best trellis paths for eight columns of a matrix, target [8][rows] in the
// units of code values (quantizers/viterbi.py).
MOEPRESS_API int32_t moepress_trellis_search(const float* target, int64_t rows, int32_t bits,
                                             int32_t threads, uint8_t* branches);

// As moepress_linear and moepress_experts, for matrices of trellis codes. Activations are rotated and
// rounded to 15 bits.
MOEPRESS_API int32_t moepress_trellis_linear(const float* x, int64_t tokens, int64_t cols,
                                             const uint8_t* packed, int64_t packed_bytes,
                                             int64_t rows, int32_t bits, int32_t group,
                                             const float* bias, int32_t threads, float* y);
MOEPRESS_API int32_t moepress_trellis_experts(
    const float* x, int64_t tokens, int64_t hidden, const int64_t* index, const float* weight,
    int64_t k, const uint8_t* gate_up, int64_t gate_up_bytes, const int64_t* gate_up_table,
    int32_t gate_up_group, const uint8_t* down, int64_t down_bytes, const int64_t* down_table,
    int32_t down_group, int64_t experts, int64_t intermediate, int32_t activation, int32_t threads,
    float* y);
