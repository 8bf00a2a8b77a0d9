// The inputs of the second of the products that torch makes (grouped.cu), with any gate and biases.
#include "gate.cuh"
#include "rounding.cuh"

namespace moepress {
namespace {

// Products in bfloat16 of some columns of gate, then of the same columns of up if there is one.
struct GatedAny {
    const uint16_t* out;  // [positions][parts cols]
    int64_t cols, first;  // of the intermediate columns
    int64_t inner;        // all of them
    Gate gate;
    Biases biases;

    template <int n>
    DEVICE void load(int row, int column, float (&h)[n]) const {
        const int64_t at = int64_t(row) * gate.parts() * cols + column;
        float up[n] = {};
        load_numbers(out, at, kBfloat16, h);
        biases.add(row, first + column, h);
        if (gate.gated) {
            load_numbers(out, at + cols, kBfloat16, up);
            biases.add(row, inner + first + column, up);
        }
#pragma unroll
        for (int j = 0; j < n; ++j) h[j] = gate(h[j], up[j]);
    }
};

}  // namespace
}  // namespace moepress

// As moepress_grouped_gate, with biases [experts][parts I] (null: none) and any gate, whose fields come last.
// out [positions][parts cols]. `pair` and `index`: as in routing.cuh.
extern "C" __global__ void __launch_bounds__(256)
    moepress_grouped_any(const uint16_t* out, int64_t positions, const int32_t* used,
                         int64_t first, int64_t cols, int64_t run, uint16_t* h, int64_t inner,
                         const void* bias, int64_t bias_dtype, const int32_t* pair,
                         const int64_t* index, int64_t activation, int64_t gated,
                         int64_t limits_output, float limit, float alpha, float up_offset,
                         float gate_softcap, float up_softcap) {
    using namespace moepress;
    begin();
    const Gate gate = {int(activation), gated != 0, limits_output != 0, limit, alpha, up_offset,
                       gate_softcap, up_softcap};
    const Biases biases = {bias, bias_dtype, gate.parts() * inner, pair, index};
    round_rows(GatedAny{out, cols, first, inner, gate, biases}, int(blockIdx.x),
               min(used[0], int(positions)),
               Bfloats{h, nullptr, 1, inner, int(first), int(cols), int(run)});
}
