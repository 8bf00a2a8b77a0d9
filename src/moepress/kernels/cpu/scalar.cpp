// The C functions for scalar matrices.

#include "checks.h"
#include "isa.h"
#include "moepress.h"
#include "scalar_codec.h"
#include "scalar_matrix.h"

using namespace moepress;

int32_t moepress_scalar_linear(const void* x, int64_t tokens, int64_t cols, const uint8_t* packed,
                               int64_t packed_bytes, int64_t rows, int32_t bits, int32_t group,
                               const float* bias, int32_t activation_bits, int32_t threads,
                               int32_t bfloat16, void* y) {
    return guarded([&] {
        if (activation_bits != 8 && activation_bits != 16) return kBadPrecision;
        const ScalarCodec codec(*isa_in_use(), activation_bits);
        const ScalarMatrix w{packed, rows, cols, bits, group};
        return checked_linear(codec, x, tokens, w, packed_bytes, bias, threads, bfloat16 != 0, y);
    });
}

int32_t moepress_scalar_experts(const void* x, int64_t tokens, int64_t hidden,
                                const int64_t* index, const float* weight, int64_t k,
                                const uint8_t* gate_up, int64_t gate_up_bytes,
                                const int64_t* gate_up_table, int32_t gate_up_group,
                                const uint8_t* down, int64_t down_bytes, const int64_t* down_table,
                                int32_t down_group, int64_t experts, int64_t intermediate,
                                const MoepressGate* gate, const MoepressBiases* biases, MoepressStore* store, int64_t layer,
                                int32_t activation_bits, int32_t threads, int32_t bfloat16, void* y) {
    return guarded([&] {
        if (activation_bits != 8 && activation_bits != 16) return kBadPrecision;
        const ScalarCodec codec(*isa_in_use(), activation_bits);
        return checked_experts(codec, x, tokens, hidden, index, weight, k,
                               {gate_up, gate_up_bytes, gate_up_table, gate_up_group},
                               {down, down_bytes, down_table, down_group}, experts, intermediate,
                               *gate, *biases, {store, layer}, threads, bfloat16 != 0,
                               y);
    });
}

int32_t moepress_scalar_embedding(const int64_t* ids, int64_t n, const uint8_t* packed,
                                  int64_t packed_bytes, int64_t rows, int64_t cols, int32_t bits,
                                  int32_t group, float* y) {
    const ScalarMatrix w{packed, rows, cols, bits, group};
    if (!w.exists()) return kBadCodec;
    if (w.nbytes() != packed_bytes) return kBadBytes;
    for (int64_t i = 0; i < n; ++i)
        if (ids[i] < 0 || ids[i] >= rows) return kBadId;
    for (int64_t i = 0; i < n; ++i) w.decode_row(ids[i], y + i * cols);
    return kOk;
}
