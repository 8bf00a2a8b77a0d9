// The checks of the C interface (moepress.h) before a linear or experts run, for either codec.
#pragma once

#include <cstdint>
#include <exception>

#include "expert_tables.h"
#include "experts.h"
#include "isa.h"
#include "linear.h"
#include "moepress.h"

namespace moepress {

// The result of body(), or kNoMemory if it throws: std::bad_alloc, or std::length_error of a
// vector.
template <class Body>
int32_t guarded(Body body) {
    try {
        return body();
    } catch (const std::exception&) {
        return kNoMemory;
    }
}

template <class Codec>
Result checked_linear(const Codec& codec, const void* x, int64_t tokens,
                      const typename Codec::Matrix& w, int64_t packed_bytes, const float* bias,
                      int threads, bool bfloat16, void* y) {
    if (!w.exists()) return kBadCodec;
    if (w.nbytes() != packed_bytes) return kBadBytes;
    if (tokens < 0 || threads < 1) return kBadShape;
    run_linear(codec, x, tokens, w, bias, threads, bfloat16, y);
    return kOk;
}

// One of the two packed parameters of the experts.
struct PackedParameter {
    const uint8_t* bytes;
    int64_t nbytes;
    const int64_t* table;  // [experts][2]: first byte, code bits
    int group;
};

template <class Codec>
Result checked_experts(const Codec& codec, const void* x, int64_t tokens, int64_t hidden,
                       const int64_t* index, const float* weight, int64_t k,
                       const PackedParameter& gate_up, const PackedParameter& down, int64_t count,
                       int64_t intermediate, const MoepressGate& gate,
                       const MoepressBiases& biases, const Stored& stored, int threads,
                       bool bfloat16, void* y) {
    constexpr int64_t most = int64_t(1) << 29;  // columns: products of sizes stay below 2^63
    if (tokens < 0 || k < 0 || count < 0 || threads < 1) return kBadShape;
    if (hidden < 1 || hidden > most || intermediate < 1 || intermediate > most) return kBadShape;
    if (gate.activation < 0 || gate.activation >= kActivations) return kBadActivation;
    const int64_t rows = (gate.gated ? 2 : 1) * intermediate;
    Experts<Codec> experts{{}, {}, hidden, intermediate, gate_up.group, down.group, gate,
                           {biases.gate_up, biases.bfloat16 != 0, rows},
                           {biases.down, biases.bfloat16 != 0, hidden}};
    Result result = read_table(gate_up.bytes, gate_up.nbytes, gate_up.table, count,
                               rows, hidden, gate_up.group, experts.gate_up);
    if (result != kOk) return result;
    result = read_table(down.bytes, down.nbytes, down.table, count, hidden, intermediate,
                        down.group, experts.down);
    if (result != kOk) return result;
    if (!both_or_neither(experts.gate_up, experts.down)) return kBadCodec;
    if (tokens == 0) return kOk;  // x and y may be null
    return run_experts(codec, x, tokens, index, weight, k, experts, stored, threads, bfloat16, y);
}

}  // namespace moepress
