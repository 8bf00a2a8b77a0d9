// Products of scalar matrices with few tokens.
//
// A block of threads has 128 rows, one panel of up to 8 tokens, and a range of columns; each of its
// four warps has 32 rows. Weights stream from memory to registers, `kDepth` groups ahead, and are
// operand A of the byte products as they are (scalar_code.cuh). Activations are operand B: they
// come to shared memory 1024 columns at a time, while the columns before are multiplied. A panel is
// the 8 columns of B, so that 1 to 8 tokens cost the same products.
//
// Sums of a group are exact integers c. With the activations' scale a and sum, and the weights'
// scale s and zero z: y += a * s * (c - z * sum). Up to 4 tokens take the even columns of B: then
// each thread has one token, and half of this work.
//
// Instructions of a thread for a weight of groups of 128, sm_90: 1.1 (1 and 2 bits), 1.2 (4), 1.9
// (3) and 1 (8 bits), for 1 to 4 tokens up to .15 less. An H100 can issue 3.0e13 a second. That
// allows 2.4e13 weights of 2 bits, twice what its memory delivers (2.19 bits each, at 3.35 TB/s:
// 1.2e13), and at 1 bit as much as its memory.
#include "scalar_code.cuh"

namespace moepress {
namespace {

constexpr int kPanel = 8;
constexpr int kWarps = 4;
constexpr int kStageColumns = 1024;

// Activations of a panel in shared memory, 1024 columns of them.
template <int group, int planes>
struct Stage {
    static constexpr int kGroups = kStageColumns / group;
    // Bytes from token to token: what the threads of a warp read at once comes from all banks.
    static constexpr int kStride = kStageColumns + (group == 128 ? 16 : group);

    int8_t q[planes][kPanel][kStride];
    float scale[kGroups][kPanel];
    int sum[kGroups][kPanel];

    // Starts to copy groups begin .. end - 1, at most kGroups: a warp copies whole tokens.
    DEVICE void start(const Call& call, const Work& work, int begin, int end) {
        const int64_t groups = call.cols / group;
        for (int t = warp_id(); t < work.count; t += kWarps) {
            const int64_t row = call.input_of(work.first + t);
#pragma unroll
            for (int plane = 0; plane < planes; ++plane) {
                const int8_t* from =
                    call.q + (plane * call.inputs + row) * call.cols + begin * group;
                for (int i = lane_id(); i < (end - begin) * (group / 16); i += 32)
                    cp_async_16(q[plane][t] + 16 * i, from + 16 * i);
            }
            for (int g = lane_id(); g < end - begin; g += 32) {
                cp_async_4(&scale[g][t], call.scale + row * groups + begin + g);
                cp_async_4(&sum[g][t], call.sum + row * groups + begin + g);
            }
        }
        cp_async_commit();
    }
};

template <int bits, int group, int planes>
DEVICE void multiply(const Call& call, const Work& work) {
    using P = Part<bits, group>;
    using S = Stage<group, planes>;
    constexpr int kColumns = group / 4;  // of a thread
    constexpr int kLoads = P::kLow + P::kHigh;
    constexpr int kDeepest = kLoads <= 2 ? 4 : kLoads <= 4 ? 2 : 1;
    constexpr int kDepth = planes == 1 || kDeepest == 1 ? kDeepest : kDeepest / 2;
    S* const stages = shared_memory<S>();
    const int lane = lane_id(), r = lane >> 2, j = lane & 3;
    const int blocks = (call.rows + kBlockRows - 1) / kBlockRows;
    const int block = 2 * (work.row_block * kWarps + warp_id()) + (r >> 2);
    const int begin = work.split * call.groups_per_split;
    const int end = begin + call.groups_per_split < call.cols / group
                        ? begin + call.groups_per_split
                        : call.cols / group;
    const Place<bits, group> place(work.matrix, block < blocks ? block : blocks - 1, call.cols);
    P ring[kDepth];
#pragma unroll
    for (int d = 0; d < kDepth; ++d)
        if (begin + d < end) place.load(ring[d], begin + d);
    if (!call.pair) ::begin();  // see the kernels below
    stages[0].start(call, work, begin, begin + S::kGroups < end ? begin + S::kGroups : end);

    const bool wide = work.count > 4;
    const int mine = wide ? r : r >> 1;  // the token of column r of B
    const int token = mine < work.count ? mine : work.count - 1;
    const int result = wide ? 2 * j : j;  // the token of the thread's first result
    float y[2][4] = {};
    S* stage = stages;
    for (int from = begin; from < end; from += S::kGroups) {
        const int to = from + S::kGroups < end ? from + S::kGroups : end;
        S* const other = stages + (stage == stages);
        cp_async_wait<0>();
        __syncthreads();
        if (to < end) other->start(call, work, to, to + S::kGroups < end ? to + S::kGroups : end);
        for (int base = from; base < to; base += kDepth) {
#pragma unroll
            for (int d = 0; d < kDepth; ++d) {
                const int g = base + d, at = g - from;
                if (g >= to) break;
                P& part = ring[d];
                place.align(part);
                uint32_t x[planes][kColumns / 4];
#pragma unroll
                for (int plane = 0; plane < planes; ++plane)
                    read_activations(stage->q[plane][token] + at * group + j * kColumns, x[plane]);
                Sums<planes> sums;
#pragma unroll
                for (int m = 0; m < kColumns / 8; ++m) sums.add(part, m, x);
                float scale[4], zero[4];
                scales_of(part, scale, zero);
                if (g + kDepth < end) place.load(part, g + kDepth);
                add_group<0>(y[0], sums, scale, zero, stage->scale[at][result],
                             stage->sum[at][result]);
                if (wide)
                    add_group<1>(y[1], sums, scale, zero, stage->scale[at][result + 1],
                                 stage->sum[at][result + 1]);
            }
        }
        stage = other;
    }

    const int warp = work.row_block * kWarps + warp_id();
    const int row = (2 * warp + (r >> 2)) * kBlockRows + 4 * (r & 3);
    float* out = call.out + (work.split * call.positions + work.first + result) * call.rows;
    if (result < work.count) store_rows<bits>(out, row, call.rows, y[0]);
    if (wide && result + 1 < work.count) store_rows<bits>(out + call.rows, row, call.rows, y[1]);
}

template <int group, int planes>
DEVICE void multiply(const Call& call, const Work& work) {
    switch (work.bits) {
        case 1: return multiply<1, group, planes>(call, work);
        case 2: return multiply<2, group, planes>(call, work);
        case 3: return multiply<3, group, planes>(call, work);
        case 4: return multiply<4, group, planes>(call, work);
        case 8: return multiply<8, group, planes>(call, work);
        default: trap();
    }
}

}  // namespace
}  // namespace moepress

// The kernels: one for each group size and number of planes, moepress_scalar_decode_g128_p1 and so
// on. Compiled with MOEPRESS_GROUP and MOEPRESS_PLANES defined, this file has only that one.
//
// Grid: ceil(N / 128), splits, panels of 8. Threads: 128. Dynamic shared memory: two stages, at
// most 2 * (8704 * planes + 65536 / g) bytes. Parameters: scalar_code.cuh.
#define MOEPRESS_SCALAR_DECODE(GROUP, PLANES)                                                      \
    extern "C" __global__ void __launch_bounds__(128, 4)                                           \
        moepress_scalar_decode_g##GROUP##_p##PLANES(                                               \
            const int8_t* q, const float* scale, const int32_t* sum, int64_t planes, int64_t rows, \
            const int32_t* pair, int64_t k, const int32_t* panel, int64_t positions,               \
            const uint8_t* packed, int64_t packed_bytes, const int64_t* table, int64_t bits,       \
            int64_t N, int64_t K, int64_t g, float* out, int64_t splits) {                         \
        using namespace moepress;                                                                  \
        if (pair) begin(); /* else the panels are there, and weights can be read before */         \
        if (planes != PLANES || g != GROUP) trap();                                                \
        const Work work =                                                                          \
            work_of(kPanel, panel, positions, packed, packed_bytes, table, bits, N, K, GROUP);     \
        if (!work.count) return pair ? void() : begin();                                           \
        const int per_split = (int(K) / GROUP + int(splits) - 1) / int(splits);                    \
        const Call call = {q,   scale,     sum,    rows,   pair,     int(k),                       \
                           out, positions, int(N), int(K), per_split};                             \
        multiply<GROUP, PLANES>(call, work);                                                       \
    }

#define MOEPRESS_SCALAR_DECODE_OF(GROUP, PLANES) MOEPRESS_SCALAR_DECODE(GROUP, PLANES)

#ifdef MOEPRESS_GROUP
MOEPRESS_SCALAR_DECODE_OF(MOEPRESS_GROUP, MOEPRESS_PLANES)
#else
MOEPRESS_SCALAR_DECODE(32, 1)
MOEPRESS_SCALAR_DECODE(64, 1)
MOEPRESS_SCALAR_DECODE(128, 1)
MOEPRESS_SCALAR_DECODE(32, 2)
MOEPRESS_SCALAR_DECODE(64, 2)
MOEPRESS_SCALAR_DECODE(128, 2)
#endif
