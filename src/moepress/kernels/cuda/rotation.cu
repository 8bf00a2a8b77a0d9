// The rotation of kernels/trellis.py for whole arrays: signs, then Hadamard matrices of runs of
// columns, or the other way round. The same sums in the same order, so the results are equal.
//
// Limit: the array is read and written once. A block brings its columns through shared memory
// log2(run) / 3 times.
#include "numbers.h"

namespace {

constexpr int kThreads = 256;

// One word is left free after every 32, against bank conflicts.
DEVICE int place(int i) { return i + i / 32; }

// `steps` steps of sums and differences, the first at distance 2^log.
template <int steps>
DEVICE void pass(float* values, int span, int log) {
    constexpr int count = 1 << steps;
    for (int unit = int(threadIdx.x); unit < span >> steps; unit += kThreads) {
        const int low = unit & ((1 << log) - 1), first = (unit >> log << (log + steps)) | low;
        float x[count];
#pragma unroll
        for (int i = 0; i < count; ++i) x[i] = values[place(first + (i << log))];
#pragma unroll
        for (int half = 1; half < count; half *= 2)
#pragma unroll
            for (int i = 0; i < count; ++i)
                if (!(i & half)) {
                    const float a = x[i], b = x[i + half];
                    x[i] = a + b;
                    x[i + half] = a - b;
                }
#pragma unroll
        for (int i = 0; i < count; ++i) values[place(first + (i << log))] = x[i];
    }
    __syncthreads();
}

}  // namespace

// Rotate `total` numbers, rows of `columns`; a block takes `span` of them, whole runs.
//
// Args:
//   in, out: of `dtype`, as in numbers.h.
//   sign: [columns].
//   run: numbers in a run, 2^log of them.
//   after: whether signs come after the Hadamard matrices.
//   normal: 1 / sqrt(run).
extern "C" __global__ void __launch_bounds__(kThreads)
moepress_rotation(const void* in, void* out, const float* sign, int64_t dtype, int64_t total,
                  int64_t columns, int64_t log, int64_t span, int64_t after, float normal) {
    begin();
    float* values = shared_memory<float>();
    const int64_t first = int64_t(blockIdx.x) * span;
    const int here = int(min(span, total - first));
    int column = int((first + threadIdx.x) % columns);
    const int start = column, ahead = int(kThreads % columns);
    const auto next = [&] {
        column += ahead;
        if (column >= columns) column -= int(columns);
    };
    for (int i = int(threadIdx.x); i < here; i += kThreads, next()) {
        const float x = load_number(in, first + i, dtype);
        values[place(i)] = after ? x : x * sign[column];
    }
    __syncthreads();
    int done = 0;
    for (; done + 3 <= int(log); done += 3) pass<3>(values, here, done);
    if (int(log) - done == 2) pass<2>(values, here, done);
    if (int(log) - done == 1) pass<1>(values, here, done);
    column = start;
    for (int i = int(threadIdx.x); i < here; i += kThreads, next()) {
        const float y = values[place(i)] * normal;
        store_number(out, first + i, dtype, after ? y * sign[column] : y);
    }
}
