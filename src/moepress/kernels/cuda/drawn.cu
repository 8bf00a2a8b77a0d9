// One visit of rounding/noise.py: some rows k of a matrix, columns first, get the error that rounding
// would leave at each of several widths.
//
//     a = target[k] + received[k][w]                       w: the width
//     r = d_w a + sqrt(d_w (1 - d_w) mean(a^2)) noise[k]   the mean over all rows k of the visit
//
// received becomes r - received, the errors before feedback. Two kernels, since the mean must be
// known first. Limit: four arrays are read, two written; the launches take longer.
#include "device.h"

namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 4 * kThreads;  // of a block

struct Visit {
    const float* target;  // [K][columns]
    const float* received;  // [K][widths][columns]
    int64_t first, rows, widths, columns;

    // Where row k of this thread's four columns begins; `width`: of an array with all widths.
    DEVICE int64_t place(int64_t k) const { return (first + k) * columns + column(); }
    DEVICE int64_t wide_place(int64_t k) const {
        return ((first + k) * widths + blockIdx.y) * columns + column();
    }
    DEVICE int64_t column() const { return int64_t(blockIdx.x) * kColumns + 4 * threadIdx.x; }

    DEVICE float4 adjusted(int64_t k) const {
        const float4 t = *reinterpret_cast<const float4*>(target + place(k));
        const float4 x = *reinterpret_cast<const float4*>(received + wide_place(k));
        return make_float4(t.x + x.x, t.y + x.y, t.z + x.z, t.w + x.w);
    }
};

}  // namespace

// partial [widths][gridDim.x] = sums of a^2 over the columns of each block. Grid: (columns / 1024
// rounded up, widths); columns is a multiple of 4.
extern "C" __global__ void __launch_bounds__(kThreads)
moepress_drawn_energy(const float* target, const float* received, int64_t first, int64_t rows,
                      int64_t widths, int64_t columns, float* partial) {
    begin();
    float* of_warps = shared_memory<float>();  // [kThreads / 32]
    const Visit visit{target, received, first, rows, widths, columns};
    float sum = 0;
    if (visit.column() < columns)
#pragma unroll 8
        for (int64_t k = 0; k < rows; ++k) {
            const float4 a = visit.adjusted(k);
            sum += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w;
        }
#pragma unroll
    for (int half = 16; half > 0; half /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, half);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int warp = 1; warp < kThreads / 32; ++warp) sum += of_warps[warp];
    partial[blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

// The visit, with the same grid, and `partial` as above.
//
// Args:
//   received: becomes the errors.
//   residual: [K][widths][columns], gets r.
//   noise: [K][columns].
//   error: [widths] d.
extern "C" __global__ void __launch_bounds__(kThreads)
moepress_drawn_errors(const float* target, float* received, int64_t first, int64_t rows,
                      int64_t widths, int64_t columns, const float* partial, const float* noise,
                      const float* error, float* residual) {
    begin();
    const Visit visit{target, received, first, rows, widths, columns};
    if (visit.column() >= columns) return;
    float energy = 0;
    for (unsigned block = 0; block < gridDim.x; ++block)
        energy += partial[blockIdx.y * gridDim.x + block];
    const float d = error[blockIdx.y];
    const float spread = sqrtf(energy / float(rows * columns)) * sqrtf(d * (1 - d));
#pragma unroll 4
    for (int64_t k = 0; k < rows; ++k) {
        const float4 a = visit.adjusted(k);
        const float4 z = *reinterpret_cast<const float4*>(noise + visit.place(k));
        float4 x = *reinterpret_cast<const float4*>(received + visit.wide_place(k));
        const float4 r = make_float4(d * a.x + spread * z.x, d * a.y + spread * z.y,
                                     d * a.z + spread * z.z, d * a.w + spread * z.w);
        x = make_float4(r.x - x.x, r.y - x.y, r.z - x.z, r.w - x.w);
        *reinterpret_cast<float4*>(residual + visit.wide_place(k)) = r;
        *reinterpret_cast<float4*>(received + visit.wide_place(k)) = x;
    }
}
