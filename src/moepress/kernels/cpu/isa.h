// What an instruction set provides (`Isa`): a table of functions that each do a small piece of
// work. The functions are compiled once for each instruction set, by avx512.cpp and others.
// dispatch.cpp picks the table that runs.
#pragma once

#include <cstdint>
#include <utility>

#include "attention.h"
#include "moepress.h"
#include "trellis_code.h"

namespace moepress {

constexpr int kLaneRows = 16;   // rows that `Lanes` (lanes_*.h) computes side by side
constexpr int kMaxGroup = 128;  // largest group size: columns that share one activation scale

// Activation functions, in the order of ACTIVATIONS in __init__.py.
enum Activation {
    kGelu, kGeluTanh, kHardswish, kMish, kQuickGelu, kRelu, kRelu2, kSigmoid, kSilu, kTanh,
    kActivations
};

// g[i] = h(g[i], up[i]), for i = 0 .. n - 1: act(g[i]) * up[i] unless the gate says more. Without a
// gate `up` is null. Overwrites `up`.
using Glu = void (*)(const MoepressGate& gate, float* g, float* up, int n);

// ---- Scalar matrices -------------------------------------------------------------------------

// Activations of up to `width` tokens over all K columns, G groups of columns, rounded to 8-bit
// codes: x = scale * code. Four columns of all tokens lie together: these are the operands of the
// u8 x s8 dot product, in the order in which it reads them.
struct ScalarPanel {
    int8_t* codes;  // [K / 4][width][4], from -127 to 127
    float* scale;   // [G][width]
    float* sum;     // [G][width]: scale * (sum of the codes of the group)
    int width;      // one of kWidths
};

constexpr int kWidths[] = {1, 2, 4, 8, 16};  // 2^i at place i
constexpr int kWidthCount = 5;
constexpr int kMaxWidth = 16;

// out [width][16] = (the 16 rows of a block) times (the tokens of a panel).
using ScalarDot = void (*)(const uint8_t* block, int64_t cols, int group, const ScalarPanel& x,
                           float* out);

// Round one token, x [cols], into column `place` of a panel. With activation bits 16 a code of 15
// bits is 128 * high + low: the high halves go to column `place`, the low halves to `place + 1`.
using ScalarRound = void (*)(const float* x, int64_t cols, int group, int activation_bits,
                             const ScalarPanel& panel, int place);

// ---- Trellis matrices (widths: trellis_code.h) -------------------------------------------------

using TrellisWidths = std::integer_sequence<int, 1, 2, 3, 4, 15, 25, 35>;

// Rotated activations of some tokens, rounded to codes: x = scale * code. With activation bits 16
// the codes have 15 bits, from -16256 to 16256. With 8 they are from -127 to 127; instruction sets
// that multiply bytes (`sums_any_byte`, lanes_portable.h) keep such a code twice, in both bytes.
struct TrellisTokens {
    int16_t* codes;  // [tokens][K]
    float* scale;    // [tokens][G]
    int32_t* sum;    // [tokens][G]: sum of the codes of the group

    // For many tokens (trellis_many.h):
    int8_t* bytes;     // [tokens][K] codes of 8 bits, of each 4 columns in the order 0, 2, 1, 3
    int32_t* crossed;  // [tokens][G]: sum of q[k] q[k + 2] over k with k mod 4 < 2, modulo 2^32
};

// Some of those tokens, by their places in `all`.
struct TrellisPanel {
    TrellisTokens all;
    const int64_t* places;  // [count]
    int64_t count;
};

// out [count][64] = (the 64 rows of a slab) times (the tokens of a panel). `above` is the slab that
// precedes this one on the paths. `scales` are the bfloat16 scales of the 64 rows.
using TrellisDot = void (*)(const uint8_t* above, const uint8_t* slab, int64_t cols, int group,
                            const TrellisPanel& x, const uint8_t* scales, float* out);

// Rotate one token or one row of weights, x [cols], in place: x <- Q x (docs/format.md). The one
// back is its inverse.
using TrellisRotate = void (*)(float* x, int64_t cols);

// Round one rotated token, x [cols], to place `place` of `out`.
using TrellisRound = void (*)(const float* x, int64_t cols, int group, int activation_bits,
                              const TrellisTokens& out, int64_t place);

// Viterbi's algorithm (viterbi.cpp). Its costs are by group: states with the same older bits, which
// have the same predecessors. `best` [2^(12 - bits)] holds the least cost of the predecessors of
// each group. Targets are in units of 1 / unit.

// One step: `next` from `best`. `small`: no cost of `best` is above 32767. Returns whether that is
// known of `next`.
using ViterbiStep = bool (*)(const uint16_t* best, int16_t target, bool small, uint16_t* next);

// Subtract the least of the costs [count] from all.
using SubtractLeast = void (*)(uint16_t* costs, int count);

// The first of the states with the least cost after a step.
using ViterbiBest = int (*)(const uint16_t* best, int16_t target);

// The states [steps] of the best path that ends in state `end`. `kept` holds `best` of every
// step that a stride starts with, kept_words apart.
using ViterbiTrace = void (*)(const uint16_t* kept, const int16_t* target, int steps, int end,
                              uint16_t* states);

// ---- Small operations of decoding (small.h) ---------------------------------------------------

struct NormCall;
struct RotaryCall;
using NormRows = void (*)(const NormCall& call, int64_t first, int64_t last);
using Add = void (*)(const void* a, const void* b, int64_t n, int32_t numbers, void* y);
using TurnTokens = void (*)(const RotaryCall& call, int64_t first, int64_t last);

// ---- Routers (route.cpp) ---------------------------------------------------------------------

// A row of a router's weight [cols] times a token x [cols], behind which are zeros up to a multiple
// of 64.
using RouteProduct = float (*)(const uint8_t* row, int64_t cols, const float* x);

// ---- The table -------------------------------------------------------------------------------

struct Isa {
    const char* name;
    Glu glu;

    int max_width;                         // of a panel: how many sums the registers hold
    ScalarDot scalar_dot[9][kWidthCount];  // by code bits (1, 2, 3, 4, 8) and place in kWidths;
                                           // null where the width is above max_width
    ScalarRound scalar_round;

    TrellisDot trellis_dot[2][kWidthsEnd];  // by activation bits, 8 and 16, and width
    TrellisRotate trellis_rotate, trellis_rotate_back;
    TrellisRound trellis_round;
    ViterbiStep viterbi_step[kWidthsEnd][2];  // by width and phase (viterbi.h)
    ViterbiBest viterbi_best[kWidthsEnd];
    ViterbiTrace viterbi_trace[kWidthsEnd];
    SubtractLeast subtract_least;

    NormRows norm_rows;      // rows first .. last - 1
    Add add;
    TurnTokens turn_tokens;  // tokens first .. last - 1 of all batches, one after another
    RouteProduct route_product[3];  // by MoepressNumbers of the weight
    Attend attend;  // attention.h
    AttentionMerge merge_attention;
};

// One for each instruction set; null where the compiler does not have it. The files of another
// architecture are not compiled (CMakeLists.txt).
extern const Isa* const kAvx512;
extern const Isa* const kAvxVnni;
extern const Isa* const kAvx2;
extern const Isa* const kNeonI8mm;
extern const Isa* const kNeonDotprod;
extern const Isa* const kPortable;

// Makes the table of avx512_vbmi2 from that of avx512; null where the compiler does not have it.
extern void (*const kAvx512Vbmi2)(Isa& avx512);

// Makes the table of avx512_amx from that of avx512_vbmi2; null where the compiler does not have it.
extern void (*const kAvx512Amx)(Isa& avx512_vbmi2);

// Changes the table of avx512 for CPUs where additions run beside dot products (trellis_many.h,
// CrossedWords); null where the compiler does not have avx512.
extern void (*const kAvx512Crossed)(Isa& avx512);

const Isa* isa_in_use();  // dispatch.cpp

}  // namespace moepress
