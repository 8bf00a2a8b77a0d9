// The inputs of the second product of experts with any gate, and with biases; else as gated.cu. A file
// of its own, because it takes four times as long to compile.
#include "gate.cuh"
#include "rounding.cuh"

namespace moepress {
namespace {

struct GatedAny {
    const float* out;  // [splits][positions][parts I]: gate, then up if there is one
    int splits;
    int64_t positions, inner;
    Gate gate;
    Biases biases;

    template <int n>
    DEVICE void load(int row, int column, float (&h)[n]) const {
        float up[n] = {};
        sum(row, column, h);
        if (gate.gated) sum(row, inner + column, up);
#pragma unroll
        for (int j = 0; j < n; ++j) h[j] = gate(h[j], up[j]);
    }

    // Of the splits, from column `first` of a row on, with the biases.
    template <int n>
    DEVICE void sum(int row, int64_t first, float (&total)[n]) const {
        const int64_t cols = gate.parts() * inner;
#pragma unroll
        for (int j = 0; j < n; ++j) total[j] = 0;
        const float* at = out + row * cols + first;
#pragma unroll 4
        for (int s = 0; s < splits; ++s, at += positions * cols) {
            float part[n];
            load_numbers(at, 0, kFloat32, part);
#pragma unroll
            for (int j = 0; j < n; ++j) total[j] += part[j];
        }
        biases.add(row, first, total);
    }
};

}  // namespace
}  // namespace moepress

// As moepress_gated, with biases [experts][parts I] (null: none) and any gate, whose fields come last.
// `pair` and `index`: as in routing.cuh.
extern "C" __global__ void __launch_bounds__(256)
    moepress_gated_any(const float* out, int64_t splits, int64_t positions, const int32_t* used,
                       int64_t inner, int64_t rotated, int64_t g, int64_t planes, int64_t halves,
                       int8_t* q, float* scale, int32_t* sum, const void* bias, int64_t bias_dtype,
                       const int32_t* pair, const int64_t* index, int64_t activation, int64_t gated,
                       int64_t limits_output, float limit, float alpha, float up_offset,
                       float gate_softcap, float up_softcap) {
    using namespace moepress;
    begin();
    const int group_shift = __ffs(int(g)) - 1;
    const Codes codes = {q,       scale,         sum,         int(planes), group_shift,
                         rotated != 0, halves != 0, int(positions), int(inner)};
    const Gate gate = {int(activation), gated != 0, limits_output != 0, limit, alpha, up_offset,
                       gate_softcap, up_softcap};
    const Biases biases = {bias, bias_dtype, gate.parts() * inner, pair, index};
    round_rows(GatedAny{out, int(splits), positions, inner, gate, biases}, int(blockIdx.x),
               used[0], codes);
}
