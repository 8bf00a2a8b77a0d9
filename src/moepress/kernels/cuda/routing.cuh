// The pairs (token, choice) of a call, sorted by expert and cut into panels. One block.
//
// A counting sort, stable: the warps take ranges of pairs in order, and count per expert and warp.
// The sums of all counts before it, expert by expert and warp by warp, are where a warp puts its
// first pair of an expert.
#pragma once

#include "device.h"

namespace moepress {
namespace {

// Replace a[0 .. length) by the sums of the elements before each, and return the sum of all.
DEVICE int exclusive_scan(int* a, int length) {
    __shared__ int totals[32];
    const int thread = int(threadIdx.x), threads = int(blockDim.x), warps = threads / 32;
    const int each = (length + threads - 1) / threads;
    const int begin = min(thread * each, length), end = min(begin + each, length);
    int own = 0;
    for (int i = begin; i < end; ++i) own += a[i];
    int before = own;  // becomes the sum of this and the lower lanes
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, before, step);
        if (lane_id() >= step) before += other;
    }
    if (lane_id() == 31) totals[warp_id()] = before;
    __syncthreads();
    int all = 0, lower = 0;
    for (int w = 0; w < warps; ++w) {
        if (w < warp_id()) lower += totals[w];
        all += totals[w];
    }
    int at = lower + before - own;
    for (int i = begin; i < end; ++i) {
        const int count = a[i];
        a[i] = at;
        at += count;
    }
    __syncthreads();
    return all;
}

struct Routing {
    const int64_t* index;  // [pairs]: the expert of each; outside 0 .. experts - 1: none
    const int64_t *gate_up_table, *down_table;  // an expert without bits in both counts as none
    int64_t pairs, experts;
    int64_t size;       // the most positions of a panel
    int64_t panels;     // room for panels
    int32_t* pair;      // [pairs]: the pairs of experts, sorted
    int32_t* position;  // [pairs]: the place of each in `pair`, or -1
    int32_t* panel;     // [panels][3]: expert, first position, count; count 0: unused
    int32_t* used;      // [1]: how many pairs have a position
};

// The expert of a pair, or -1.
DEVICE int expert_of(const Routing& call, int i) {
    const int64_t e = call.index[i];
    if (e < 0 || e >= call.experts) return -1;
    return call.gate_up_table[2 * e + 1] == 0 && call.down_table[2 * e + 1] == 0 ? -1 : int(e);
}

// Up to 32 pairs, by one warp: a lane has a pair.
DEVICE void route_few(const Routing& call) {
    const int pairs = int(call.pairs), size = int(call.size), lane = lane_id();
    const int e = lane < pairs ? expert_of(call, lane) : -1;
    const uint32_t same = __match_any_sync(~0u, e);
    const int rank = __popc(same & ((1u << lane) - 1)), count = e < 0 ? 0 : __popc(same);
    // The panels of an expert count at the lane of its first pair.
    const int own = rank == 0 ? (count + size - 1) / size : 0;
    int start = 0, first = 0, total = 0, made = 0;  // sums over smaller experts, and over all
#pragma unroll 4
    for (int j = 0; j < pairs; ++j) {
        const int other = __shfl_sync(~0u, e, j), panels = __shfl_sync(~0u, own, j);
        const bool real = other >= 0, smaller = real && other < e;
        start += smaller;
        first += smaller ? panels : 0;
        total += real;
        made += panels;
    }
    if (e >= 0) {
        call.position[lane] = start + rank;
        call.pair[start + rank] = lane;
        if (rank % size == 0) {
            int32_t* const to = call.panel + 3 * (first + rank / size);
            to[0] = e;
            to[1] = start + rank;
            to[2] = min(size, count - rank);
        }
    } else if (lane < pairs) {
        call.position[lane] = -1;
    }
    for (int i = 3 * made + lane; i < 3 * int(call.panels); i += 32) call.panel[i] = 0;
    if (lane == 0) call.used[0] = total;
}

// Shared memory: experts * (warps + 1) ints.
DEVICE void route_many(const Routing& call) {
    const int pairs = int(call.pairs), size = int(call.size);
    const int warps = int(blockDim.x) / 32, warp = warp_id(), lane = lane_id();
    const int thread = int(threadIdx.x), threads = int(blockDim.x), count = int(call.experts);
    int* const place = shared_memory<int>();    // [experts][warps]: next position
    int* const first = place + count * warps;   // [experts]: first panel
    const int each = (pairs + threads - 1) / threads * 32;  // pairs of a warp
    const int begin = min(warp * each, pairs), end = min(begin + each, pairs);
    for (int i = thread; i < count * warps; i += threads) place[i] = 0;
    __syncthreads();

    for (int i = begin + lane; i - lane < end; i += 32) {
        const int e = i < end ? expert_of(call, i) : -1;
        const uint32_t same = __match_any_sync(~0u, e);
        if (e >= 0 && __ffs(int(same)) - 1 == lane) place[e * warps + warp] += __popc(same);
        __syncwarp();
    }
    __syncthreads();
    const int total = exclusive_scan(place, count * warps);

    const auto start_of = [&](int e) { return e < count ? place[e * warps] : total; };
    for (int e = thread; e < count; e += threads)
        first[e] = (start_of(e + 1) - start_of(e) + size - 1) / size;
    __syncthreads();
    const int made = exclusive_scan(first, count);
    for (int e = thread; e < count; e += threads) {
        int32_t* to = call.panel + 3 * first[e];
        const int stop = start_of(e + 1);
        for (int at = start_of(e); at < stop; at += size, to += 3) {
            to[0] = e;
            to[1] = at;
            to[2] = min(size, stop - at);
        }
    }
    for (int i = 3 * made + thread; i < 3 * int(call.panels); i += threads) call.panel[i] = 0;
    if (thread == 0) call.used[0] = total;
    __syncthreads();  // `place` is read above and changed below

    for (int i = begin + lane; i - lane < end; i += 32) {
        const int e = i < end ? expert_of(call, i) : -1;
        const uint32_t same = __match_any_sync(~0u, e);
        const int rank = __popc(same & ((1u << lane) - 1));
        const int at = e < 0 ? -1 : place[e * warps + warp] + rank;
        __syncwarp();
        if (e >= 0 && rank == 0) place[e * warps + warp] += __popc(same);
        __syncwarp();
        if (i < end) call.position[i] = at;
        if (at >= 0) call.pair[at] = i;
    }
}

DEVICE void route(const Routing& call) {
    if (call.pairs > 32)
        route_many(call);
    else if (warp_id() == 0)
        route_few(call);
}

}  // namespace
}  // namespace moepress
