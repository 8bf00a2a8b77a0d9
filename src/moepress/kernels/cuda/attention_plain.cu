// Attention of few tokens in float32: one split of the positions, key by key, without tensor cores.
#include "attention.cuh"

namespace moepress {
namespace {

constexpr int kRows = 4, kChunks = 2;  // rows of a block; columns 128 c + 4 lane .. + 3
constexpr int kAtOnce = 2;             // keys whose loads are under way together

DEVICE float whole_warp(float x) {
#pragma unroll
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

DEVICE void attention_plain(const AttentionCall& call) {
    const Rows rows(call, kRows);
    const int lane = lane_id(), warp = warp_id();
    const auto load = [&](const float* p, int64_t at, float4(&x)[kChunks]) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            const int column = 128 * c + 4 * lane;
            x[c] = make_float4(0, 0, 0, 0);
            if (column < call.size)
                x[c] = *reinterpret_cast<const float4*>(p + at + column);
        }
    };
    const float* keys = rows.head_of<float>(call.k, call.of_k);
    const float* values = rows.head_of<float>(call.v, call.of_v);
    float4 q[kRows][kChunks], y[kRows][kChunks];
    float most[kRows], sum[kRows] = {};
    int64_t mask[kRows];  // where the mask of a row begins
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const Query query = rows.query(call, r);
        load(static_cast<const float*>(call.q), rows.at(call.of_q, query), q[r]);
        most[r] = nothing();
        mask[r] = rows.at(call.of_mask, query);
#pragma unroll
        for (int c = 0; c < kChunks; ++c) y[r][c] = make_float4(0, 0, 0, 0);
    }
    each_tile(call, rows, [&](int start) {
#pragma unroll 1
        for (int first = start; first < start + kKeys; first += kAtOnce) {
            float4 k[kAtOnce][kChunks], v[kAtOnce][kChunks];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int64_t at = min(first + i, int(call.positions) - 1);
                load(keys, at * call.of_k.step, k[i]);
                load(values, at * call.of_v.step, v[i]);
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                    const int position[1] = {first + i};
                    float x = 0, added[1];
                    read_mask(call, mask[r], position, added);
#pragma unroll
                    for (int c = 0; c < kChunks; ++c)
                        x += q[r][c].x * k[i][c].x + q[r][c].y * k[i][c].y + q[r][c].z * k[i][c].z +
                             q[r][c].w * k[i][c].w;
                    x = whole_warp(x) * call.scale + added[0];
                    const float greatest = fmaxf(most[r], x), p = weight(x, greatest);
                    const float shrunk = weight(most[r], greatest);
                    most[r] = greatest;
                    sum[r] = sum[r] * shrunk + p;
#pragma unroll
                    for (int c = 0; c < kChunks; ++c) {
                        y[r][c].x = y[r][c].x * shrunk + p * v[i][c].x;
                        y[r][c].y = y[r][c].y * shrunk + p * v[i][c].y;
                        y[r][c].z = y[r][c].z * shrunk + p * v[i][c].z;
                        y[r][c].w = y[r][c].w * shrunk + p * v[i][c].w;
                    }
                }
        }
    });
    auto* shared = shared_memory<Shared<kRows>>();
    constexpr int width = 128 * kChunks + 4;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        if (lane == 0) {
            shared->most[warp][r] = most[r];
            shared->sum[warp][r] = sum[r];
        }
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
            *reinterpret_cast<float4*>(shared->values + (warp * kRows + r) * width + 128 * c +
                                       4 * lane) = y[r][c];
    }
    write_part<kRows>(call, rows, shared, width);
}

}  // namespace
}  // namespace moepress

// Heads of at most 256 numbers, a multiple of 4; blocks of 4 rows. Threads: 128. Dynamic shared
// memory: 4 * 4 * 262 floats. Grid and parameters: attention.cuh.
MOEPRESS_ATTENTION_KERNEL(moepress_attention_plain, 2, moepress::attention_plain)
