// The last step of a product: sums of its splits, in a fixed order, in the dtype of the result.
#include "numbers.h"

namespace moepress {
namespace {

// `biased`: each choice adds the bias of its expert, index[t][j], inside its weight.
template <bool biased>
DEVICE void combine_experts(const float* out, int64_t splits, int64_t positions,
                            const int32_t* position, const void* weight, int64_t weight_dtype,
                            int64_t k, int64_t cols, void* y, int64_t dtype, const void* bias,
                            int64_t bias_dtype, const int64_t* index) {
    const int64_t token = blockIdx.y;
    const int64_t column = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (column >= cols) return;
    float total[4] = {};
    constexpr int kAtOnce = 4;  // choices: their loads are under way together
    for (int64_t first = token * k; first < (token + 1) * k; first += kAtOnce) {
        int64_t at[kAtOnce];
        float w[kAtOnce], sum[kAtOnce][4] = {};
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            const bool is = first + j < (token + 1) * k;
            at[j] = is ? position[first + j] : -1;
            w[j] = is ? load_number(weight, first + j, weight_dtype) : 0.0f;
        }
#pragma unroll 2
        for (int64_t s = 0; s < splits; ++s)
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) {
                float part[4] = {};
                if (at[j] >= 0)
                    load_numbers(out, (s * positions + at[j]) * cols + column, kFloat32, part);
#pragma unroll
                for (int c = 0; c < 4; ++c) sum[j][c] += part[c];
            }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            if (biased && at[j] >= 0) {
                float part[4];
                load_numbers(bias, index[first + j] * cols + column, bias_dtype, part);
#pragma unroll
                for (int c = 0; c < 4; ++c) sum[j][c] += part[c];
            }
#pragma unroll
            for (int c = 0; c < 4; ++c)
                if (at[j] >= 0) total[c] += w[j] * sum[j][c];
        }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) store_number(y, token * cols + column + c, dtype, total[c]);
}

}  // namespace
}  // namespace moepress

// y [T][N] = sum over j of weight[t][j] * sum over s of out[s][position[t k + j]]; pairs without a
// position add nothing. N is a multiple of 4. Grid: (N / 4 / threads, T).
extern "C" __global__ void __launch_bounds__(128)
    moepress_combine_experts(const float* out, int64_t splits, int64_t positions,
                             const int32_t* position, const void* weight, int64_t weight_dtype,
                             int64_t k, int64_t cols, void* y, int64_t dtype) {
    begin();
    moepress::combine_experts<false>(out, splits, positions, position, weight, weight_dtype, k,
                                     cols, y, dtype, nullptr, 0, nullptr);
}

// The same with biases [experts][N]: weight[t][j] * (sum over s .. + bias[index[t][j]]).
extern "C" __global__ void __launch_bounds__(128)
    moepress_combine_experts_biased(const float* out, int64_t splits, int64_t positions,
                                    const int32_t* position, const void* weight,
                                    int64_t weight_dtype, int64_t k, int64_t cols, void* y,
                                    int64_t dtype, const void* bias, int64_t bias_dtype,
                                    const int64_t* index) {
    begin();
    moepress::combine_experts<true>(out, splits, positions, position, weight, weight_dtype, k,
                                    cols, y, dtype, bias, bias_dtype, index);
}

// y [T][N] = sum over s of out[s] + bias [N] (null: none). Grid: (N / threads, T).
extern "C" __global__ void __launch_bounds__(128)
    moepress_combine_linear(const float* out, int64_t splits, int64_t rows, int64_t cols,
                            const void* bias, int64_t bias_dtype, void* y, int64_t dtype) {
    begin();
    const int64_t row = blockIdx.y, column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (column >= cols) return;
    float sum = 0;
    for (int64_t s = 0; s < splits; ++s) sum += out[(s * rows + row) * cols + column];
    if (bias != nullptr) sum += load_number(bias, column, bias_dtype);
    store_number(y, row * cols + column, dtype, sum);
}
