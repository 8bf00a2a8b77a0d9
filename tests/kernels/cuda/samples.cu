// Small kernels that show what the emulator does, and what it finds.
#include "device.h"

// out[i] = the sum of the 256 numbers of block i: shared memory, a barrier, shuffles.
extern "C" __global__ void moepress_samples_sum(const int* in, int* out, int64_t blocks) {
    if (blockIdx.x >= blocks) return;
    int* sums = shared_memory<int>();
    int value = in[blockIdx.x * blockDim.x + threadIdx.x];
    for (int step = 16; step; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    if (lane_id() == 0) sums[warp_id()] = value;
    __syncthreads();
    if (threadIdx.x == 0) {
        int total = 0;
        for (int w = 0; w < int(blockDim.x) / 32; ++w) total += sums[w];
        out[blockIdx.x] = total;
    }
}

// d [16, 8] = a [16, 32] b [8, 32]^T of bytes, through shared memory, cp.async and ldmatrix.
extern "C" __global__ void __launch_bounds__(32)
    moepress_samples_product(const uint8_t* a, const int8_t* b, int* d, int64_t waits) {
    auto* rows = shared_memory<uint8_t>();  // 16 rows of a, then 8 of b
    const int lane = lane_id();
    cp_async_16(rows + 16 * lane, a + 16 * lane);
    if (lane < 16) cp_async_16(rows + 512 + 16 * lane, b + 16 * lane);
    cp_async_commit();
    if (waits) cp_async_wait<0>();
    __syncwarp();
    uint32_t fragment[4], columns[4];
    ldmatrix_x4(fragment, rows + 32 * (lane % 16) + 16 * (lane / 16));
    ldmatrix_x4(columns, rows + 512 + 32 * (lane % 8) + 16 * (lane / 8 % 2));  // b twice
    const uint32_t column[2] = {columns[0], columns[1]};
    int sum[4] = {};
    mma_u8s8(sum, fragment, column);
    for (int r = 0; r < 4; ++r)
        d[(lane / 4 + 8 * (r / 2)) * 8 + 2 * (lane % 4) + r % 2] = sum[r];
    if (!waits) cp_async_wait<0>();
}

// out[i] = in[i + shift], with a scale.
extern "C" __global__ void moepress_samples_shift(const float* in, float* out, int64_t shift,
                                                  float scale) {
    out[threadIdx.x] = scale * in[threadIdx.x + shift];
}

extern "C" __global__ void moepress_samples_stuck() {
    if (threadIdx.x < 32) __syncthreads();
}

extern "C" __global__ void moepress_samples_convert(const float* in, uint16_t* half,
                                                    uint16_t* bfloat, float* back) {
    const int i = int(threadIdx.x);
    half[i] = float_to_half(in[i]);
    bfloat[i] = float_to_bfloat(in[i]);
    back[i] = half_to_float(half[i]);
}
