// A router of few tokens in one launch: logits, and the choice of experts (choice.cuh).
//
//   logits = x W^T + bias      in float32, rounded: some experts and tokens a block
//   choice                     by the block that has finished last: a warp for each token
//
// Limit: the time of four trips to memory, one after another: x, logits, the counter of the blocks,
// logits again. So what no kernel before this one writes is loaded before it may begin, and a
// router that one block can read (Mixtral's) has only that block, where its logits stay.
#include "choice.cuh"

namespace moepress {
namespace {

// How many blocks have finished, 0 between launches. Those that may run at the same time have
// different ones (router.py).
constexpr int kCounters = 1 << 14;
constexpr int kMostExperts = 1024;
__device__ int counters[kCounters];

// 8 neighbouring numbers as they are in memory; `rest`: of float32. `narrow`: there are none of it.
struct Eight {
    uint4 first, rest;
};

// Numbers that no kernel before this one writes; zeros and no read, unless `given`.
template <bool narrow>
DEVICE Eight load_weights(const void* p, int64_t i, int64_t dtype, bool given) {
    const bool wide = !narrow && dtype == kFloat32;
    const auto* at = static_cast<const unsigned char*>(p) + (wide ? 4 : 2) * i;
    return {load_stream_16_or_zero(at, given), load_stream_16_or_zero(at + 16, given && wide)};
}

// Also of what the kernel before this one wrote; zeros and no read, unless `given`.
template <bool narrow>
DEVICE Eight load_inputs(const void* p, int64_t i, int64_t dtype, bool given) {
    const bool wide = !narrow && dtype == kFloat32;
    const auto* at = static_cast<const unsigned char*>(p) + (wide ? 4 : 2) * i;
    return {load_16_or_zero(at, given), load_16_or_zero(at + 16, given && wide)};
}

template <bool narrow>
DEVICE void unpack(const Eight& v, int64_t dtype, float (&x)[8]) {
    const uint32_t first[4] = {v.first.x, v.first.y, v.first.z, v.first.w};
    const uint32_t rest[4] = {v.rest.x, v.rest.y, v.rest.z, v.rest.w};
    if (!narrow && dtype == kFloat32) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            x[i] = __uint_as_float(first[i]), x[4 + i] = __uint_as_float(rest[i]);
    } else if (dtype == kFloat16) {
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = half_to_float(uint16_t(first[i / 2] >> 16 * (i % 2)));
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            x[i] = __uint_as_float(i % 2 ? first[i / 2] & 0xFFFF0000u : first[i / 2] << 16);
    }
}

struct Products {
    const void* x;  // [tokens][cols]
    int64_t x_dtype;
    const void* weight;  // [experts][cols]
    int64_t weight_dtype;
    const void* bias;  // [experts]; null: none
    int64_t bias_dtype;
    int64_t cols;           // a multiple of 8
    int64_t product_dtype;  // to which logits are rounded
};

DEVICE bool one_block() { return gridDim.x * gridDim.y == 1; }

// Logits of `rows` experts and `of_block` tokens for each `warps` warps. Every thread has columns
// 8 i .. 8 i + 7 of all, for each `32 warps`-th i. Calls begin().
//
// In shared memory, [experts] each:
//
//   correction: that of the choice, in float32
//   score: gets the logits of the first token, where there is one block
template <int threads, int warps, int rows, int of_block, int ahead, bool narrow>
DEVICE void make_logits(const Products& call, const Choice& choice, float* correction,
                        float* score) {
    constexpr int kThreads = 32 * warps, kSums = rows * of_block, kEach = kMostExperts / threads;
    __shared__ float parts[32 * kSums];  // [warps of the block][rows][of_block]
    const int units = int(call.cols / 8), thread = int(threadIdx.x) % kThreads;
    const int teams = int(blockDim.x) / kThreads, team = int(threadIdx.x) / kThreads;
    const int experts = int(choice.experts), tokens = int(choice.tokens);
    const int expert = (int(blockIdx.x) * teams + team) * rows;
    const int token = int(blockIdx.y) * of_block;

    Eight w[ahead][rows];
    const auto load = [&](int first) {
#pragma unroll
        for (int a = 0; a < ahead; ++a)
#pragma unroll
            for (int r = 0; r < rows; ++r) {
                const int64_t row = min(expert + r, experts - 1);
                const int unit = first + a * kThreads;
                w[a][r] = load_weights<narrow>(call.weight, row * call.cols + 8 * unit,
                                               call.weight_dtype, unit < units);
            }
    };
    load(thread);
    // At most 32 sums: the first warp writes all, and is_last needs to wait for no other.
    const int i = int(threadIdx.x), of = i / kSums, t = i % of_block;
    const int e = (int(blockIdx.x) * teams + of) * rows + i / of_block % rows;
    const bool writes = i < teams * kSums && e < experts && token + t < tokens;
    float logit = 0, bias = 0;
    if (writes && call.bias != nullptr) bias = load_number(call.bias, e, call.bias_dtype);
    float early[kEach];
    const bool corrected = choice.correction != nullptr;
    const auto place = [&](int j) { return int(threadIdx.x) + j * threads; };
    ::begin();
    if (corrected)  // not before: a model may hand over what the kernel before this one made
        load_apart(choice.correction, choice.correction_dtype,
                   [&](int j) { return min(place(j), experts - 1); }, early);
    float sum[rows][of_block] = {};
    for (int first = thread; first < units; first += ahead * kThreads) {
        Eight x[ahead][of_block];
#pragma unroll
        for (int a = 0; a < ahead; ++a)  // all loads before the first product
#pragma unroll
            for (int t = 0; t < of_block; ++t) {
                const int64_t row = min(token + t, tokens - 1);
                const int unit = first + a * kThreads;
                x[a][t] = load_inputs<narrow>(call.x, row * call.cols + 8 * unit, call.x_dtype,
                                      unit < units);
            }
#pragma unroll
        for (int a = 0; a < ahead; ++a) {
            float weights[rows][8];
#pragma unroll
            for (int r = 0; r < rows; ++r) unpack<narrow>(w[a][r], call.weight_dtype, weights[r]);
#pragma unroll
            for (int t = 0; t < of_block; ++t) {
                float inputs[8];
                unpack<narrow>(x[a][t], call.x_dtype, inputs);
#pragma unroll
                for (int r = 0; r < rows; ++r)
#pragma unroll
                    for (int i = 0; i < 8; ++i)
                        sum[r][t] = fmaf(inputs[i], weights[r][i], sum[r][t]);
            }
        }
        if (first + ahead * kThreads < units) load(first + ahead * kThreads);
    }
#pragma unroll
    for (int r = 0; r < rows; ++r)
#pragma unroll
        for (int t = 0; t < of_block; ++t) {
            const float whole = sum_of_warp(sum[r][t]);
            if (lane_id() == 0) parts[warp_id() * kSums + r * of_block + t] = whole;
        }
#pragma unroll
    for (int j = 0; j < kEach; ++j)
        if (corrected && place(j) < experts) correction[place(j)] = early[j];
    __syncthreads();
    if (writes) {
#pragma unroll
        for (int s = 0; s < warps; ++s) logit += parts[(of * warps + s) * kSums + i % kSums];
        logit = rounded_to(choice.logits_dtype, rounded_to(call.product_dtype, logit + bias));
        const int64_t at = int64_t(token + t) * experts + e;
        store_number(choice.logits, at, choice.logits_dtype, logit);
        if (one_block() && token + t == 0) score[e] = logit;
    }
}

// Whether this block is the last of the launch to come here. All logits are then in memory.
DEVICE bool is_last(int64_t counter) {
    __shared__ int last;
    if (warp_id() == 0) {
        __syncwarp();
        if (lane_id() == 0) {
            __threadfence();  // what all lanes wrote, before the count
            last = atomicAdd(counters + counter, 1) == int(gridDim.x * gridDim.y) - 1;
            __threadfence();
            if (last) counters[counter] = 0;
        }
    }
    __syncthreads();
    return last != 0;
}

template <int threads, int warps, int rows, int of_block, int ahead, bool narrow>
DEVICE void route(const Products& products, const Choice& choice, int64_t counter) {
    const int count = int(choice.experts), all = threads / 32;
    float* const correction = shared_memory<float>();
    float* const score = correction + count * (1 + 2 * warp_id());
    auto* const key = reinterpret_cast<uint32_t*>(score + count);
    make_logits<threads, warps, rows, of_block, ahead, narrow>(products, choice, correction, score);
    if (one_block())
        __syncthreads();  // tokens beyond the first are read from memory
    else if (!is_last(counter))
        return;
    for (int64_t token = warp_id(); token < choice.tokens; token += all)
        choose(choice, token, correction, score, key, one_block() && token == 0);
}

}  // namespace
}  // namespace moepress

// Args: those of the structs above, in another order. `counter`: below kCounters.
//
// Dynamic shared memory: 4 bytes an expert, 8 more for each warp that chooses, at most `tokens`.
// resident: blocks that the registers of a multiprocessor shall have room for.
#define MOEPRESS_ROUTE(name, threads, resident, warps, rows, of_block, ahead, narrow)            \
    extern "C" __global__ void __launch_bounds__(threads, resident) name(                        \
        const void* x, int64_t x_dtype, const void* weight, int64_t weight_dtype,                \
        const void* bias, int64_t bias_dtype, const void* correction, int64_t correction_dtype,  \
        int64_t tokens, int64_t experts, int64_t cols, int64_t k, int64_t score, int64_t groups, \
        int64_t kept, int64_t group_best, int64_t normalise, float epsilon, float scale,         \
        int64_t product_dtype, int64_t score_dtype, int64_t choice_dtype, void* logits,          \
        int64_t logits_dtype, void* weights, int64_t weights_dtype, int64_t* index,              \
        int64_t counter) {                                                                       \
        const moepress::Products products = {x,    x_dtype,    weight, weight_dtype,             \
                                             bias, bias_dtype, cols,   product_dtype};           \
        const moepress::Choice choice = {                                                        \
            correction, correction_dtype, tokens,      experts,      k,       score,             \
            groups,     kept,             group_best,  normalise,    epsilon, scale,             \
            score_dtype, choice_dtype,    logits,      logits_dtype, weights, weights_dtype,     \
            index};                                                                              \
        moepress::route<threads, warps, rows, of_block, ahead, narrow>(products, choice, counter); \
    }

// One token: 8 experts a block of a small router in 16 bits; one expert. Grid: (experts / 8 or 1).
MOEPRESS_ROUTE(moepress_route_small, 1024, 1, 4, 1, 1, 4, true)
MOEPRESS_ROUTE(moepress_route_one, 256, 2, 8, 1, 1, 4, false)
// 4 tokens a block, and one expert or 4. Grid: (experts / 1 or 4, tokens / 4).
MOEPRESS_ROUTE(moepress_route_few, 256, 2, 8, 1, 4, 2, false)
MOEPRESS_ROUTE(moepress_route_tile, 256, 1, 8, 4, 4, 1, false)
