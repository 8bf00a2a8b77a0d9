// Products of scalar matrices with many tokens.
//
// A block of threads has 128 rows and a panel of up to 64 tokens; each of its four warps has 32
// rows and all tokens. The codes of a group are unpacked once, into registers (operand A of the
// byte products, scalar_code.cuh), and multiplied with 16 tokens at a time. Activations of a group
// (operand B) come to shared memory `kStages` - 1 groups ahead, weights to registers `kDepth`
// groups ahead. Sums of a group are exact integers; scales and zeros are applied to each of them,
// as in scalar_decode.cu.
//
// Instructions of a warp for a group of 128 columns and 64 tokens (2^18 products), sm_90: 610 to
// 690 by width, of which 64 are byte products and 330 apply scales and zeros. An H100 can issue 528
// in a clock, so that at most 4e14 products a second are made.
#include "scalar_code.cuh"

namespace moepress {
namespace {

constexpr int kPanel = 64;
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

// Activations of a panel in shared memory, one group.
template <int group, int planes>
struct Stage {
    // Bytes from token to token: what the threads of a warp read at once comes from all banks.
    static constexpr int kStride = group == 128 ? 144 : group;

    int8_t q[planes][kPanel][kStride];
    float scale[kPanel];
    int sum[kPanel];
};

template <int planes>
constexpr int kStages = planes == 1 ? 3 : 2;

// Starts to copy group g of the tokens, whose rows of activations are `input`.
template <int group, int planes>
DEVICE void start(Stage<group, planes>& stage, const Call& call, const int* input, int count,
                  int g) {
    constexpr int kPieces = group / 16;
    const int groups = call.cols / group, thread = int(threadIdx.x);
#pragma unroll
    for (int i = 0; i < kPanel * kPieces / kThreads; ++i) {
        const int t = (thread + i * kThreads) / kPieces, piece = thread % kPieces;
        if (t >= count) break;
        const int64_t row = input[t];
#pragma unroll
        for (int plane = 0; plane < planes; ++plane)
            cp_async_16(stage.q[plane][t] + 16 * piece,
                        call.q + (plane * call.inputs + row) * call.cols + g * group + 16 * piece);
    }
    const int t = thread % kPanel;
    if (t < count) {
        const int64_t at = int64_t(input[t]) * groups + g;
        if (thread < kPanel)
            cp_async_4(&stage.scale[t], call.scale + at);
        else
            cp_async_4(&stage.sum[t], call.sum + at);
    }
}

// Activations of a thread's columns in a group, for two times 8 tokens: operand B.
template <int group, int planes>
struct Columns {
    uint32_t x[2][planes][group / 16];

    DEVICE void read(const int8_t* from) {
        using S = Stage<group, planes>;
#pragma unroll
        for (int i = 0; i < 2 * planes; ++i) {
            const int tile = i / planes, plane = i % planes;
            read_activations(from + (plane * kPanel + 8 * tile) * S::kStride, x[tile][plane]);
        }
    }
};

template <int bits, int group, int planes>
DEVICE void multiply(const Call& call, const Work& work) {
    using P = Part<bits, group>;
    using S = Stage<group, planes>;
    constexpr int kColumns = group / 4;  // of a thread
    constexpr int kProducts = kColumns / 8;
    constexpr int kAhead = kStages<planes> - 1;
    constexpr int kDepth = P::kLow + P::kHigh <= 2 ? 2 : 1;  // at least 64 bytes a thread
    S* const stages = shared_memory<S>();
    int* const input = reinterpret_cast<int*>(stages + kStages<planes>);
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
    for (int t = threadIdx.x; t < work.count; t += kThreads)
        input[t] = int(call.input_of(work.first + t));
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
        if (begin + i < end) start(stages[i], call, input, work.count, begin + i);
        cp_async_commit();
    }

    float even[kPanel / 8][4] = {}, odd[kPanel / 8][4] = {};  // tokens 8 n + 2 j and 8 n + 2 j + 1
    int slot = 0;
    for (int base = begin; base < end; base += kDepth) {
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
            const int g = base + d;
            if (g >= end) break;
            uint32_t first[kProducts][4], second[kProducts][4];
            float scale[4], zero[4];
            place.align(ring[d]);
#pragma unroll
            for (int m = 0; m < kProducts; ++m) operands(ring[d], m, first[m], second[m]);
            scales_of(ring[d], scale, zero);
            if (g + kDepth < end) place.load(ring[d], g + kDepth);

            cp_async_wait<kAhead - 1>();
            __syncthreads();
            const int free = slot == 0 ? kStages<planes> - 1 : slot - 1;  // read in the last round
            if (g + kAhead < end) start(stages[free], call, input, work.count, g + kAhead);
            cp_async_commit();

            const S& stage = stages[slot];
            slot = slot + 1 == kStages<planes> ? 0 : slot + 1;
            const int8_t* const x = stage.q[0][r] + j * kColumns;
            Columns<group, planes> columns;
            columns.read(x);
#pragma unroll
            for (int n = 0; n < kPanel / 8; n += 2) {
                if (8 * n >= work.count) break;
                Sums<planes> sums[2];
#pragma unroll
                for (int i = 0; i < 2 * planes * kProducts; ++i) {
                    const int m = i / 2 / planes, plane = i / 2 % planes, tile = i % 2;
                    const uint32_t b[2] = {columns.x[tile][plane][2 * m],
                                           columns.x[tile][plane][2 * m + 1]};
                    mma_u8s8(sums[tile].first[plane], first[m], b);
                    mma_u8s8(sums[tile].second[plane], second[m], b);
                }
                // Those of the next tokens, while these products are under way.
                if (n + 2 < kPanel / 8) columns.read(x + 8 * (n + 2) * S::kStride);
#pragma unroll
                for (int tile = 0; tile < 2; ++tile) {
                    const int t = 8 * (n + tile) + 2 * j;
                    const float2 a = *reinterpret_cast<const float2*>(stage.scale + t);
                    const int2 sum = *reinterpret_cast<const int2*>(stage.sum + t);
                    add_group<0>(even[n + tile], sums[tile], scale, zero, a.x, sum.x);
                    add_group<1>(odd[n + tile], sums[tile], scale, zero, a.y, sum.y);
                }
            }
        }
    }

    const int row = (work.row_block * kWarps + warp_id()) * kWarpRows + 4 * r;
    float* out = call.out + (work.split * call.positions + work.first) * call.rows;
#pragma unroll
    for (int n = 0; n < kPanel / 8; ++n) {
        const int t = 8 * n + 2 * j;
        if (t < work.count) store_rows<bits>(out + int64_t(t) * call.rows, row, call.rows, even[n]);
        if (t + 1 < work.count)
            store_rows<bits>(out + int64_t(t + 1) * call.rows, row, call.rows, odd[n]);
    }
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

// The kernels: one for each group size and number of planes, moepress_scalar_prefill_g128_p1 and so
// on. Compiled with MOEPRESS_GROUP and MOEPRESS_PLANES defined, this file has only that one.
//
// Grid: ceil(N / 128), splits, panels of 64. Threads: 128. Dynamic shared memory, in bytes:
// (4 - planes) * (64 * planes * (g + (g == 128 ? 16 : 0)) + 512) + 256. Parameters:
// scalar_code.cuh.
#define MOEPRESS_SCALAR_PREFILL(GROUP, PLANES)                                                     \
    extern "C" __global__ void __launch_bounds__(128, 2)                                           \
        moepress_scalar_prefill_g##GROUP##_p##PLANES(                                              \
            const int8_t* q, const float* scale, const int32_t* sum, int64_t planes, int64_t rows, \
            const int32_t* pair, int64_t k, const int32_t* panel, int64_t positions,               \
            const uint8_t* packed, int64_t packed_bytes, const int64_t* table, int64_t bits,       \
            int64_t N, int64_t K, int64_t g, float* out, int64_t splits) {                         \
        using namespace moepress;                                                                  \
        begin();                                                                                   \
        if (planes != PLANES || g != GROUP) trap();                                                \
        const Work work =                                                                          \
            work_of(kPanel, panel, positions, packed, packed_bytes, table, bits, N, K, GROUP);     \
        if (!work.count) return;                                                                   \
        const int per_split = (int(K) / GROUP + int(splits) - 1) / int(splits);                    \
        const Call call = {q,   scale,     sum,    rows,   pair,     int(k),                       \
                           out, positions, int(N), int(K), per_split};                             \
        multiply<GROUP, PLANES>(call, work);                                                       \
    }
#define MOEPRESS_SCALAR_PREFILL_OF(GROUP, PLANES) MOEPRESS_SCALAR_PREFILL(GROUP, PLANES)

#ifdef MOEPRESS_GROUP
MOEPRESS_SCALAR_PREFILL_OF(MOEPRESS_GROUP, MOEPRESS_PLANES)
#else
MOEPRESS_SCALAR_PREFILL(32, 1)
MOEPRESS_SCALAR_PREFILL(64, 1)
MOEPRESS_SCALAR_PREFILL(128, 1)
MOEPRESS_SCALAR_PREFILL(32, 2)
MOEPRESS_SCALAR_PREFILL(64, 2)
MOEPRESS_SCALAR_PREFILL(128, 2)
#endif
