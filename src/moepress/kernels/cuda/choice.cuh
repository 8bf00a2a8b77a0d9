// The choice of a token's experts from its logits, by a warp: scores, groups, the best k, weights.
//
// As kernels/router.py computes it, with the same roundings: models that score in 16 bits have
// equal scores often, and which of them is chosen depends on how they are rounded.
#pragma once

#include "numbers.h"

namespace moepress {
namespace {

enum Score { kSoftmax, kSigmoid, kSqrtSoftplus, kChosen };  // as SCORES in kernels/router.py

struct Choice {
    const void* correction;  // [experts], added to scores for the choice alone; null: none
    int64_t correction_dtype;
    int64_t tokens, experts, k;  // k <= 32
    int64_t score;               // a Score
    int64_t groups, kept;        // experts are chosen from the best `kept` of `groups` <= 32
    int64_t group_best;          // a group is worth the sum of its best 1 or 2 choices
    int64_t normalise;           // whether weights are divided by their sum + epsilon
    float epsilon, scale;
    int64_t score_dtype, choice_dtype;  // scores and weights, and scores with the correction
    void* logits;                       // [tokens][experts]
    int64_t logits_dtype;
    void* weights;  // [tokens][k]
    int64_t weights_dtype;
    int64_t* index;  // [tokens][k]
};

// n numbers past L1, such as those of another block of this launch, all loads under way together.
template <int n, class At>
DEVICE void load_apart(const void* p, int64_t dtype, const At& at, float (&x)[n]) {
    if (dtype == kFloat32) {
#pragma unroll
        for (int i = 0; i < n; ++i) x[i] = __ldcg(static_cast<const float*>(p) + at(i));
        return;
    }
    uint16_t bits[n];
#pragma unroll
    for (int i = 0; i < n; ++i) bits[i] = __ldcg(static_cast<const uint16_t*>(p) + at(i));
#pragma unroll
    for (int i = 0; i < n; ++i)
        x[i] = dtype == kFloat16 ? half_to_float(bits[i]) : bfloat_to_float(bits[i]);
}

// Integers in the order of numbers, -0 as 0, NaN above all as torch sorts; 0 stands for no number.
DEVICE uint32_t key_of(float x) {
    if (isnan(x)) return ~0u;
    const uint32_t bits = __float_as_uint(x + 0.0f);
    return bits >> 31 ? ~bits : bits | 1u << 31;
}
DEVICE float number_of(uint32_t key) {
    return __uint_as_float(key >> 31 ? key & ~(1u << 31) : ~key);
}

DEVICE float sum_of_warp(float x) {
#pragma unroll
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

DEVICE float greatest_of_warp(float x) {
#pragma unroll
    for (int step = 16; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// The least `place` among the lanes with the greatest key.
DEVICE uint32_t first_of_greatest(uint32_t key, uint32_t place) {
    const uint32_t greatest = __reduce_max_sync(~0u, key);
    return ~__reduce_max_sync(~0u, key == greatest ? ~place : 0u);
}

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Scores of a token, in place of its logits [experts]. Each lane has every 32nd.
DEVICE void make_scores(const Choice& call, float* score) {
    const int count = int(call.experts), lane = lane_id();
    if (call.score == kSoftmax) {
        float most = __uint_as_float(0xFF800000), sum = 0;
        for (int e = lane; e < count; e += 32) most = fmaxf(most, score[e]);
        most = greatest_of_warp(most);
        for (int e = lane; e < count; e += 32) sum += score[e] = expf(score[e] - most);
        sum = sum_of_warp(sum);
        for (int e = lane; e < count; e += 32) score[e] = rounded_to(call.score_dtype, score[e] / sum);
    } else if (call.score == kSigmoid) {
        for (int e = lane; e < count; e += 32)
            score[e] = rounded_to(call.score_dtype, sigmoid(score[e]));
    } else if (call.score == kSqrtSoftplus) {
        for (int e = lane; e < count; e += 32) {
            const float x = score[e], plus = x > 20.0f ? x : log1pf(expf(x));
            score[e] = rounded_to(call.score_dtype, sqrtf(rounded_to(call.score_dtype, plus)));
        }
    }
}

// Leave out the experts of all but the best groups. Each lane has a group.
DEVICE void keep_best_groups(const Choice& call, uint32_t* key) {
    const int lane = lane_id(), size = int(call.experts / call.groups);
    uint32_t own = 0;
    if (lane < call.groups) {
        float first = __uint_as_float(0xFF800000), second = first;
        int at = lane % size;  // groups may begin at the same bank
        for (int i = 0; i < size; ++i) {
            const float x = number_of(key[lane * size + at]);
            second = fmaxf(second, fminf(first, x));
            first = fmaxf(first, x);
            at = at + 1 == size ? 0 : at + 1;
        }
        own = key_of(call.group_best == 2 && size > 1 ? rounded_to(call.choice_dtype, first + second)
                                                      : first);
    }
    uint32_t kept = 0;
    for (int r = 0; r < int(call.kept); ++r) {
        const uint32_t group = first_of_greatest(own, uint32_t(lane));
        kept |= 1u << group;
        if (lane == int(group)) own = 0;
    }
    __syncwarp();
    for (int e = lane; e < int(call.experts); e += 32)
        if (!(kept >> e / size & 1)) key[e] = 0;
    __syncwarp();
}

// The best k of the keys, by falling key, equal ones by their place; lane r gets the r-th.
DEVICE int take_best(const Choice& call, uint32_t* key) {
    const int count = int(call.experts), lane = lane_id();
    uint32_t best = 0, place = 0;
    const auto look = [&]() {  // at the lane's own keys
        best = 0;
#pragma unroll 4
        for (int e = lane; e < count; e += 32) {
            const uint32_t other = key[e];
            if (other > best) best = other, place = uint32_t(e);
        }
    };
    look();
    int mine = 0;
    for (int r = 0; r < int(call.k); ++r) {
        const int taken = int(first_of_greatest(best, place));
        if (lane == r) mine = taken;
        if (lane == taken % 32) {
            key[taken] = 0;
            look();
        }
    }
    return mine;
}

// One token, by a warp. All in shared memory:
//
//   correction: [experts]; not read where there is none
//   score, key: [experts], of this warp
//   here: whether the token's logits are in score
DEVICE void choose(const Choice& call, int64_t token, const float* correction, float* score,
                   uint32_t* key, bool here) {
    constexpr int kAtOnce = 8;
    const int count = int(call.experts), lane = lane_id(), k = int(call.k);
    for (int first = lane; !here && first - lane < count; first += 32 * kAtOnce) {
        float x[kAtOnce];
        const auto at = [&](int i) { return token * count + min(first + 32 * i, count - 1); };
        load_apart(call.logits, call.logits_dtype, at, x);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
            if (first + 32 * i < count) score[first + 32 * i] = x[i];
    }
    __syncwarp();
    make_scores(call, score);
    for (int e = lane; e < count; e += 32) {
        float x = score[e];
        if (call.correction != nullptr) x = rounded_to(call.choice_dtype, x + correction[e]);
        key[e] = key_of(x);
    }
    __syncwarp();
    if (call.groups > 1) keep_best_groups(call, key);
    const int mine = take_best(call, key);
    __syncwarp();
    const bool given = lane < k;
    float weight = given ? score[mine] : 0.0f;
    __syncwarp();  // the next token's scores take their place
    if (call.score == kChosen) {
        const float most = __shfl_sync(~0u, weight, 0);
        const float p = given ? expf(weight - most) : 0.0f;
        weight = rounded_to(call.score_dtype, p / sum_of_warp(p));
    }
    if (call.normalise) {
        const float sum = rounded_to(call.score_dtype, sum_of_warp(weight));
        weight = rounded_to(call.score_dtype, weight / rounded_to(call.score_dtype, sum + call.epsilon));
    }
    if (call.scale != 1.0f) weight = rounded_to(call.score_dtype, weight * call.scale);
    if (given) {
        store_number(call.weights, token * k + lane, call.weights_dtype, weight);
        call.index[token * k + lane] = mine;
    }
}

}  // namespace
}  // namespace moepress
