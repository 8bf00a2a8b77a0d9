// The last step of attention: the splits of the positions together, in the dtype of the result.
#include "numbers.h"

// y [batches, tokens, heads * group, size] = sum over splits of e^(most - greatest) parts / the same
// of sums; 0 where the sum is: a query that sees nothing.
//
// Args:
//   parts: [batches * heads, group * tokens, splits, size].
//   sums: [batches * heads, group * tokens, splits, 2]: greatest score, and sum of weights.
//
// Grid: (batches * heads * group * tokens). Threads: `size`, rounded up to whole warps.
extern "C" __global__ void __launch_bounds__(256)
    moepress_attention_merge(const float* parts, const float* sums, int64_t splits, int64_t heads,
                             int64_t group, int64_t tokens, int64_t size, void* y, int64_t dtype) {
    begin();
    const float none = __uint_as_float(0xFF800000), log2e = 1.44269504088896f;
    const int64_t row = blockIdx.x, column = threadIdx.x;
    const float* part = parts + row * splits * size + (column < size ? column : 0);
    const float2* of_split = reinterpret_cast<const float2*>(sums) + row * splits;
    float most = none, sum = 0, total = 0;
    for (int64_t first = 0; first < splits; first += 32) {
        const int64_t mine = first + lane_id();
        const float2 known = mine < splits ? of_split[mine] : make_float2(none, 0);
        float greatest = fmaxf(most, known.x);
#pragma unroll
        for (int step = 16; step; step /= 2)
            greatest = fmaxf(greatest, __shfl_xor_sync(~0u, greatest, step));
        const float base = greatest == none ? 0.0f : greatest;
        const float shrunk = exp2f((most - base) * log2e), f = exp2f((known.x - base) * log2e);
        most = greatest;
        float weights = f * known.y;
#pragma unroll
        for (int step = 16; step; step /= 2) weights += __shfl_xor_sync(~0u, weights, step);
        sum = sum * shrunk + weights;
        total *= shrunk;
        const int here = int(min(int64_t(32), splits - first));
#pragma unroll 8
        for (int s = 0; s < here; ++s)
            total += __shfl_sync(~0u, f, s) * part[(first + s) * size];
    }
    if (column >= size) return;
    const int64_t token = row % tokens, head = row / tokens % (heads * group);
    const int64_t batch = row / (tokens * heads * group);
    const int64_t at = ((batch * tokens + token) * heads * group + head) * size + column;
    store_number(y, at, dtype, sum == 0 ? 0.0f : total / sum);
}
