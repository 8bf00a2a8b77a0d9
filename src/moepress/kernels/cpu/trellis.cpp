// The C functions for trellis matrices. The search for codes is in viterbi.cpp.

#include "checks.h"
#include "isa.h"
#include "moepress.h"
#include "threads.h"
#include "trellis_codec.h"
#include "trellis_matrix.h"

using namespace moepress;

int32_t moepress_trellis_linear(const void* x, int64_t tokens, int64_t cols, const uint8_t* packed,
                                int64_t packed_bytes, int64_t rows, int32_t bits, int32_t group,
                                const float* bias, int32_t activation_bits, int32_t threads,
                                int32_t bfloat16, void* y) {
    return guarded([&] {
        if (activation_bits != 8 && activation_bits != 16) return kBadPrecision;
        const TrellisCodec codec(*isa_in_use(), activation_bits);
        const TrellisMatrix w{packed, rows, cols, bits, group};
        return checked_linear(codec, x, tokens, w, packed_bytes, bias, threads, bfloat16 != 0, y);
    });
}

int32_t moepress_trellis_experts(const void* x, int64_t tokens, int64_t hidden,
                                 const int64_t* index, const float* weight, int64_t k,
                                 const uint8_t* gate_up, int64_t gate_up_bytes,
                                 const int64_t* gate_up_table, int32_t gate_up_group,
                                 const uint8_t* down, int64_t down_bytes, const int64_t* down_table,
                                 int32_t down_group, int64_t experts, int64_t intermediate,
                                 const MoepressGate* gate, const MoepressBiases* biases, MoepressStore* store, int64_t layer,
                                 int32_t activation_bits, int32_t threads, int32_t bfloat16, void* y) {
    return guarded([&] {
        if (activation_bits != 8 && activation_bits != 16) return kBadPrecision;
        const TrellisCodec codec(*isa_in_use(), activation_bits);
        return checked_experts(codec, x, tokens, hidden, index, weight, k,
                               {gate_up, gate_up_bytes, gate_up_table, gate_up_group},
                               {down, down_bytes, down_table, down_group}, experts, intermediate,
                               *gate, *biases, {store, layer}, threads, bfloat16 != 0,
                               y);
    });
}

int32_t moepress_trellis_rotate(float* x, int64_t rows, int64_t cols, int32_t back,
                                int32_t threads) {
    if (rows < 1 || cols < 1 || cols % 32 != 0 || threads < 1) return kBadShape;
    const Isa& isa = *isa_in_use();
    const TrellisRotate rotate = back ? isa.trellis_rotate_back : isa.trellis_rotate;
    parallel(threads, rows, grain_for(rows, threads, 16), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) rotate(x + row * cols, cols);
    });
    return kOk;
}
