// What each instruction set provides: three functions on small pieces of a matrix product.
#pragma once

#include <cstdint>

#include "trellis.h"

namespace moepress {

// Activations of `width` tokens over all K columns, in 8-bit codes: x = scale * code, one scale for
// each group of columns. Four columns of all tokens lie together: the broadcast operands of the
// u8 x s8 dot product, in the order in which they are used.
struct Panel {
    int8_t* codes;  // [K / 4][width][4], -127 .. 127
    float* scale;   // [G][width]
    float* sum;     // [G][width], scale * sum of the codes of the group
    int width;      // one of kWidths
};

constexpr int kBits[] = {1, 2, 3, 4, 8};
constexpr int kWidths[] = {1, 2, 4, 8, 16};
constexpr int kMaxWidth = 16;   // some instruction sets have registers for fewer
constexpr int kRows = 16;       // rows of a block
constexpr int kMaxGroup = 128;  // largest group size

// docs/format.md. Static: each file compiles its own copy, with its own instruction set.
static constexpr bool has_zero(int bits) { return bits >= 2 && bits <= 4; }
static constexpr int64_t block_bytes(int64_t cols, int bits, int group) {
    return 2 * cols * bits + (has_zero(bits) ? 48 : 32) * (cols / group);
}

enum Activation {  // in the order of `ACTIVATIONS` in __init__.py
    kGelu, kGeluTanh, kHardswish, kMish, kQuickGelu, kRelu, kRelu2, kSigmoid, kSilu, kTanh,
    kActivations
};

// out[p][r] = sum over k of w[r][k] * x[p][k], for the 16 rows of one block. `out` is [width][16].
using BlockDot = void (*)(const uint8_t* block, int64_t cols, int group, const Panel& x, float* out);

// Quantize one token: x [cols] to column `place` of a panel whose groups have `group` columns.
// With 16 bits, the codes 128 * high + low take two columns, `place` and `place + 1`.
using Quantize = void (*)(const float* x, int64_t cols, int group, int bits, const Panel& panel,
                          int place);

// Rotated activations of some tokens in 15-bit codes: x = scale * code, one scale for each group.
struct Rounded {
    int16_t* codes;  // [tokens][K]
    float* scale;    // [tokens][G]
    int32_t* sum;    // [tokens][G], of the codes of a group
};

// out [tokens][64] = the 64 rows of a slab of trellis codes times tokens first .. first + tokens - 1.
// `above` is the slab above, of the same path; `scales` are those of the 64 rows.
using SlabDot = void (*)(const uint8_t* above, const uint8_t* slab, int64_t cols, int group,
                         const Rounded& x, int64_t first, int64_t tokens, const uint8_t* scales,
                         float* out);

// Round the rotated x [cols] to place `at`.
using RoundToken = void (*)(const float* x, int64_t cols, int group, const Rounded& out, int64_t at);

// gate[i] = act(gate[i]) * up[i], n values
using Glu = void (*)(int activation, float* gate, const float* up, int n);

struct Isa {
    const char* name;
    int max_width;       // of a panel
    BlockDot dot[5][5];  // by place in kBits, kWidths; null above max_width
    Quantize quantize;
    Glu glu;
    ViterbiStep viterbi_step[4];  // by code bits, 1 to 4
    void (*subtract_least)(uint16_t* costs);
    SlabDot slab_dot[4];  // by code bits, 1 to 4
    void (*rotate)(float* x, int64_t cols);
    RoundToken round_token;
};

// Compiled with flags of their own; null where the compiler could not.
extern const Isa* const kAvx512;
extern const Isa* const kAvx2;
extern const Isa* const kPortable;

const Isa* isa_in_use();  // dispatch.cpp

}  // namespace moepress
