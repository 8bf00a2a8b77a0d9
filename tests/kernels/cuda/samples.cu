// Small kernels that show what the emulator does, and what it finds.
#include "device.h"

// out[i] = the sum of the 256 numbers of block i: shared memory, a barrier, shuffles.
extern "C" __global__ void moepress_samples_sum(const int* in, int* out, int64_t blocks) {
    begin();
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
    begin();
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
    begin();
    out[threadIdx.x] = scale * in[threadIdx.x + shift];
}

extern "C" __global__ void moepress_samples_stuck() {
    if (threadIdx.x < 32) __syncthreads();
}

extern "C" __global__ void moepress_samples_convert(const float* in, uint16_t* half,
                                                    uint16_t* bfloat, float* back) {
    begin();
    const int i = int(threadIdx.x);
    half[i] = float_to_half(in[i]);
    bfloat[i] = float_to_bfloat(in[i]);
    back[i] = half_to_float(half[i]);
}

// Races, and what prevents them.

// out[i] = the number of thread i + 1 or, `far`, i + 32, through shared memory. `order`: nothing, a
// shuffle, __syncwarp or __syncthreads between them.
extern "C" __global__ void moepress_samples_neighbour(int* out, int64_t order, int64_t far) {
    begin();
    int* numbers = shared_memory<int>();
    const int i = int(threadIdx.x), from = (i + (far ? 32 : 1)) % int(blockDim.x);
    numbers[i] = i;
    if (order == 1) __shfl_xor_sync(~0u, i, 1);
    if (order == 2) __syncwarp();
    if (order == 3) __syncthreads();
    out[i] = numbers[from];
}

// One word of a ring that a warp reads and fills again. `order`: whether all lanes have read before.
extern "C" __global__ void __launch_bounds__(32)
    moepress_samples_ring(const int* in, int* out, int64_t order) {
    begin();
    int* word = shared_memory<int>();
    int sum = 0;
    for (int i = 0; i < 3; ++i) {
        if (lane_id() == 0) cp_async_4(word, in + i);
        cp_async_commit();
        cp_async_wait<0>();
        __syncwarp();
        sum += *word;
        if (order) __syncwarp();
    }
    out[lane_id()] = sum;
}

// out[0] = the sum of numbers that the blocks leave in memory, by the block that comes last. `order`:
// 1: fences of the writer, 2: of the reader.
extern "C" __global__ void __launch_bounds__(32)
    moepress_samples_last(int* numbers, int* counter, int* out, int64_t order) {
    begin();
    if (lane_id() != 0) return;
    numbers[blockIdx.x] = int(blockIdx.x);
    if (order & 1) __threadfence();
    if (atomicAdd(counter, 1) != int(gridDim.x) - 1) return;
    if (order & 2) __threadfence();
    int sum = 0;
    for (int b = 0; b < int(gridDim.x); ++b) sum += numbers[b];
    *out = sum;
}

// A product of a warpgroup with zeros. `order`: 1: the fence before it, 2: the wait after it, before B
// is written again.
extern "C" __global__ void __launch_bounds__(128) moepress_samples_warpgroup(int* out, int64_t order) {
    begin();
    auto* b = shared_memory<uint32_t>();
    for (int i = int(threadIdx.x); i < 128 * 32; i += 128) b[i] = 0;
    if (order & 1) warpgroup_see_shared();
    __syncthreads();
    const uint32_t a[4] = {};
    int d[16][4];
    warpgroup_begin();
    warpgroup_u8s8(d, a, warpgroup_columns(b, 0), false);
    warpgroup_commit();
    if (order & 2) warpgroup_wait<0>();
    __syncthreads();
    b[threadIdx.x] = 1;
    warpgroup_wait<0>();
    out[threadIdx.x] = d[0][0];
}

// `begins`: before it writes.
extern "C" __global__ void moepress_samples_begin(int* out, int64_t begins) {
    if (begins) begin();
    out[threadIdx.x] = 1;
    if (!begins) begin();
}

// y [4] = four numbers from x[first] on, by one load.
extern "C" __global__ void moepress_samples_wide(const float* x, float* y, int64_t first) {
    begin();
    if (threadIdx.x > 0) return;
    const float4 four = *reinterpret_cast<const float4*>(x + first);
    y[0] = four.x, y[1] = four.y, y[2] = four.z, y[3] = four.w;
}
