// Root mean square norms of a few rows.
#include "numbers.h"

namespace moepress {
namespace {

constexpr int kMostThreads = 512;
constexpr int kHeld = 2;  // pieces of a row that a thread keeps in registers

enum Formula { kRounded, kWide, kCentered };  // as FORMULAS in small_reference.py

struct Norm {
    const void* weight;  // null: without
    int64_t weight_dtype, formula, x_dtype, y_dtype;
    float inverse;  // 1 / root mean square
};

// n numbers of a row, normed and stored.
template <int n>
DEVICE void store_normed(const Norm& norm, const float (&x)[n], const float (&weight)[n], void* y,
                         int64_t at) {
    float out[n];
#pragma unroll
    for (int j = 0; j < n; ++j) {
        const float normed = x[j] * norm.inverse;
        if (norm.weight == nullptr)
            out[j] = normed;
        else if (norm.formula == kRounded)
            out[j] = weight[j] * rounded_to(norm.x_dtype, normed);
        else
            out[j] = normed * (norm.formula == kCentered ? 1.0f + weight[j] : weight[j]);
    }
    store_numbers(y, at, norm.y_dtype, out);
}

// A row of `size` numbers, n at a time: 8 where addresses allow it.
template <int n>
DEVICE void norm_row(const void* x, int64_t first, Norm norm, int64_t size, float epsilon, void* y,
                     int64_t y_first, float* partial) {
    const int64_t mine = int64_t(threadIdx.x) * n, step = int64_t(blockDim.x) * n;
    float held[kHeld][n] = {}, weight[kHeld][n] = {}, sum = 0;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
        const int64_t at = mine + j * step;
        if (at < size) {
            load_numbers(x, first + at, norm.x_dtype, held[j]);
            if (norm.weight != nullptr) load_numbers(norm.weight, at, norm.weight_dtype, weight[j]);
        }
#pragma unroll
        for (int i = 0; i < n; ++i) sum += held[j][i] * held[j][i];
    }
    for (int64_t at = mine + kHeld * step; at < size; at += step) {
        float more[n];
        load_numbers(x, first + at, norm.x_dtype, more);
#pragma unroll
        for (int i = 0; i < n; ++i) sum += more[i] * more[i];
    }
#pragma unroll
    for (int distance = 16; distance; distance /= 2)
        sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane_id() == 0) partial[warp_id()] = sum;
    __syncthreads();
    float total = 0;
    for (int warp = 0; warp < int(blockDim.x) / 32; ++warp) total += partial[warp];
    norm.inverse = 1.0f / sqrtf(total / float(size) + epsilon);

#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
        const int64_t at = mine + j * step;
        if (at < size) store_normed(norm, held[j], weight[j], y, y_first + at);
    }
    for (int64_t at = mine + kHeld * step; at < size; at += step) {
        float more[n], by[n] = {};
        load_numbers(x, first + at, norm.x_dtype, more);
        if (norm.weight != nullptr) load_numbers(norm.weight, at, norm.weight_dtype, by);
        store_normed(norm, more, by, y, y_first + at);
    }
}

}  // namespace
}  // namespace moepress

// y [rows, size] = the norm of x, in float32 but for what the formula rounds.
//
// Args:
//   x: rows begin `stride` numbers after each other.
//   weight: [size], or null.
//   formula: of the weight w and the normed n. 0: w * n rounded to the dtype of x. 1: w * n.
//     2: (1 + w) * n.
//   by_eights: size and stride are multiples of 8, x and weight begin at multiples of 16 bytes.
//
// Grid: (rows). Threads: whole warps, at most 512.
extern "C" __global__ void __launch_bounds__(512)
    moepress_rms_norm(const void* x, int64_t x_dtype, int64_t stride, const void* weight,
                      int64_t weight_dtype, int64_t size, float epsilon, int64_t formula,
                      int64_t by_eights, void* y, int64_t y_dtype) {
    using namespace moepress;
    __shared__ float partial[kMostThreads / 32];
    begin();
    const int64_t row = blockIdx.x;
    const Norm norm{weight, weight_dtype, formula, x_dtype, y_dtype, 0};
    if (by_eights)
        norm_row<8>(x, row * stride, norm, size, epsilon, y, row * size, partial);
    else
        norm_row<1>(x, row * stride, norm, size, epsilon, y, row * size, partial);
}
