// The steps before, between and after the products that torch makes, in bfloat16 (grouped.py).
#include "activation.cuh"
#include "rounding.cuh"
#include "routing.cuh"

namespace moepress {
namespace {

// Products in bfloat16 of some columns of gate, then of the same columns of up.
struct Gated {
    const uint16_t* out;  // [positions][2 cols]
    int64_t cols;
    int activation;

    template <int n>
    DEVICE void load(int row, int column, float (&h)[n]) const {
        float gate[n], up[n];
        load_numbers(out, row * 2 * cols + column, kBfloat16, gate);
        load_numbers(out, row * 2 * cols + cols + column, kBfloat16, up);
#pragma unroll
        for (int j = 0; j < n; ++j) h[j] = activation_of(gate[j], activation) * up[j];
    }
};

// Of grouped_combine. `biased`: each choice adds the bias of its expert, index[t][j], inside its
// weight.
template <bool biased>
DEVICE void combine(const uint16_t* out, const int32_t* position, const void* weight,
                    int64_t weight_dtype, int64_t k, int64_t cols, void* y, int64_t dtype,
                    int64_t stride, int64_t first, const void* bias, int64_t bias_dtype,
                    const int64_t* index) {
    const int64_t token = blockIdx.y;
    const int64_t column = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (column >= cols) return;
    float total[4] = {};
    for (int64_t j = 0; j < k; ++j) {
        const int64_t at = position[token * k + j];
        if (at < 0) continue;
        float part[4];
        load_numbers(out, at * cols + column, kBfloat16, part);
        if (biased) {
            float more[4];
            const int64_t row = index[token * k + j] * stride;
            load_numbers(bias, row + first + column, bias_dtype, more);
#pragma unroll
            for (int c = 0; c < 4; ++c) part[c] += more[c];
        }
        const float w = load_number(weight, token * k + j, weight_dtype);
#pragma unroll
        for (int c = 0; c < 4; ++c) total[c] += w * part[c];
    }
    const int64_t to = token * stride + first + column;
#pragma unroll
    for (int c = 0; c < 4; ++c) store_number(y, to + c, dtype, total[c]);
}

}  // namespace
}  // namespace moepress

// The pairs sorted by expert, as routing.cuh says. One block; shared memory: as there.
extern "C" __global__ void __launch_bounds__(1024, 1)
    moepress_grouped_route(const int64_t* index, int64_t pairs, const int64_t* gate_up_table,
                           const int64_t* down_table, int64_t experts, int64_t size, int64_t panels,
                           int32_t* pair, int32_t* position, int32_t* panel, int32_t* used) {
    using namespace moepress;
    begin();
    route(Routing{index, gate_up_table, down_table, pairs, experts, size, panels, pair, position,
                  panel, used});
}

// x [T][K], rotated (run = 0: not), in bfloat16: row t goes to the rows position[t][..] of out that
// are not -1; to row t where position is null. Grid: as grid_of in grouped.py says.
extern "C" __global__ void __launch_bounds__(256)
    moepress_grouped_inputs(const void* x, int64_t dtype, int64_t rows, int64_t cols, int64_t run,
                            const int32_t* position, int64_t k, uint16_t* out) {
    using namespace moepress;
    begin();
    round_rows(Inputs{x, dtype, cols}, int(blockIdx.x), int(rows),
               Bfloats{out, position, int(k), cols, 0, int(cols), int(run)});
}

// h [positions][I] in bfloat16: its columns first .. first + cols - 1 of the first used[0] positions,
// act(gate) * up, rotated (run = 0: not). out [positions][2 cols]. `first` and `cols` are multiples
// of the run. Grid: as grid_of in grouped.py says.
extern "C" __global__ void __launch_bounds__(256)
    moepress_grouped_gate(const uint16_t* out, int64_t positions, const int32_t* used, int64_t first,
                          int64_t cols, int64_t activation, int64_t run, uint16_t* h, int64_t inner) {
    using namespace moepress;
    begin();
    round_rows(Gated{out, cols, int(activation)}, int(blockIdx.x),
               min(used[0], int(positions)),
               Bfloats{h, nullptr, 1, inner, int(first), int(cols), int(run)});
}

// y [T][stride], its columns first .. first + cols - 1: sum over j of weight[t][j] *
// out[position[t k + j]], in order; pairs without a position add nothing. out [positions][cols] in
// bfloat16; cols is a multiple of 4. Grid: (cols / 4 / threads, T).
extern "C" __global__ void __launch_bounds__(128)
    moepress_grouped_combine(const uint16_t* out, const int32_t* position, const void* weight,
                             int64_t weight_dtype, int64_t k, int64_t cols, void* y, int64_t dtype,
                             int64_t stride, int64_t first) {
    begin();
    moepress::combine<false>(out, position, weight, weight_dtype, k, cols, y, dtype, stride, first,
                             nullptr, 0, nullptr);
}

// The same with biases [experts][stride]: weight[t][j] * (out[..] + bias[index[t][j]]).
extern "C" __global__ void __launch_bounds__(128)
    moepress_grouped_combine_biased(const uint16_t* out, const int32_t* position,
                                    const void* weight, int64_t weight_dtype, int64_t k,
                                    int64_t cols, void* y, int64_t dtype, int64_t stride,
                                    int64_t first, const void* bias, int64_t bias_dtype,
                                    const int64_t* index) {
    begin();
    moepress::combine<true>(out, position, weight, weight_dtype, k, cols, y, dtype, stride, first,
                            bias, bias_dtype, index);
}
