// The choice of a token's experts from its logits: scores, groups, the best k, weights. As
// kernels/router.py computes it, with the same roundings: models that score in 16 bits have equal
// scores often, and which of them is chosen depends on how they are rounded.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "activation_functions.h"
#include "moepress.h"
#include "route_numbers.h"

namespace moepress {
namespace {

enum Score { kBySoftmax, kBySigmoid, kBySqrtSoftplus, kByChosen, kScores };  // as SCORES there

constexpr float kLeastPower = -87;  // below it `exponential` is not exact

// What all tokens of a call share.
struct Choice {
    MoepressFormula formula;
    const float* correction;  // [experts], or null: none
    int32_t numbers;          // of scores with the correction
    int64_t experts, k;
};

// A token's memory.
struct ChoiceSpace {
    float* score;   // [experts]: holds the logits; overwritten
    int32_t* key;   // [experts]
    int32_t* best;  // [most(k, kept groups)]
    float* weight;  // [k]
    int64_t* group;  // [kept groups]
};

// x [n] joined with `start`, in 16 interleaved parts.
template <class Join>
float joined(const float* x, int64_t n, float start, Join join) {
    float part[16];
    for (float& p : part) p = start;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; ++j) part[j] = join(part[j], x[i + j]);
    for (int j = 0; i + j < n; ++j) part[j] = join(part[j], x[i + j]);
    for (int half = 8; half > 0; half /= 2)
        for (int j = 0; j < half; ++j) part[j] = join(part[j], part[j + half]);
    return part[0];
}

// These pass over NaN.
inline float greatest(const float* x, int64_t n) {
    return joined(x, n, -INFINITY, [](float a, float b) { return b > a ? b : a; });
}
inline float least(const float* x, int64_t n) {
    return joined(x, n, INFINITY, [](float a, float b) { return b < a ? b : a; });
}
inline float sum_of(const float* x, int64_t n) {
    return joined(x, n, 0, [](float a, float b) { return a + b; });
}

inline float exponential_of_any(float x) {
    return x < kLeastPower ? std::exp(x) : exponential(x);
}

// Softmax of x [n] in place, not rounded.
inline void softmax(float* x, int64_t n) {
    const float most = greatest(x, n);
    if (least(x, n) - most >= kLeastPower)
        for (int64_t i = 0; i < n; ++i) x[i] = exponential(x[i] - most);
    else
        for (int64_t i = 0; i < n; ++i) x[i] = exponential_of_any(x[i] - most);
    const float sum = sum_of(x, n);
    for (int64_t i = 0; i < n; ++i) x[i] /= sum;
}

// As torch's, of threshold 20.
inline float softplus(float x) { return x > 20 ? x : std::log1p(exponential_of_any(x)); }

// Logits [n] to scores, in place.
inline void make_scores(const MoepressFormula& formula, float* x, int64_t n) {
    switch (formula.score) {
        case kBySoftmax: softmax(x, n); break;
        case kBySigmoid:
            if (least(x, n) >= kLeastPower)
                for (int64_t i = 0; i < n; ++i) x[i] = sigmoid(x[i]);
            else
                for (int64_t i = 0; i < n; ++i)
                    x[i] = x[i] < kLeastPower ? 1 / (1 + std::exp(-x[i])) : sigmoid(x[i]);
            break;
        case kBySqrtSoftplus:
            for (int64_t i = 0; i < n; ++i) x[i] = softplus(x[i]);
            round_numbers(x, n, formula.scores);
            for (int64_t i = 0; i < n; ++i) x[i] = std::sqrt(x[i]);
            break;
        default: return;
    }
    round_numbers(x, n, formula.scores);
}

// Integers in the order of numbers, -0 as 0, NaN above all as torch sorts.
inline int32_t key_of(float x) {
    const int32_t bits = FloatBits::in(x + 0.0f);
    const int32_t below = bits < 0 ? 0x7FFFFFFF : 0;  // of negative numbers the greater is less
    const bool nan = (bits & FloatBits::kMagnitude) > FloatBits::kInfinity;
    return nan ? 0x7FFFFFFF : bits ^ below;
}
inline float number_of(int32_t key) {
    return FloatBits::of(key ^ (key < 0 ? 0x7FFFFFFF : 0));
}

// index [k]: the places of the k greatest of the keys [n], by falling key, equal ones by their
// place; k <= n. `best` [k] is memory.
inline void take_best(const int32_t* key, int64_t n, int64_t k, int32_t* best, int64_t* index) {
    int64_t taken = 0;
    for (int64_t i = 0; i < n; ++i) {
        const int32_t own = key[i];
        if (taken == k && own <= best[k - 1]) continue;
        taken += taken < k;
        int64_t at = taken - 1;
        for (; at > 0 && best[at - 1] < own; --at) {
            best[at] = best[at - 1];
            index[at] = index[at - 1];
        }
        best[at] = own;
        index[at] = i;
    }
}

// What a group is worth, by the keys [n] of its choices.
inline int32_t worth(const Choice& choice, const int32_t* key, int64_t n) {
    int32_t first = key[0], second = INT32_MIN;
    for (int64_t i = 1; i < n; ++i) {
        second = std::max(second, std::min(first, key[i]));
        first = std::max(first, key[i]);
    }
    if (choice.formula.group_best == 1 || n == 1) return first;
    return key_of(rounded_number(number_of(first) + number_of(second), choice.numbers));
}

// Leave out the experts of all but the best groups.
inline void keep_best_groups(const Choice& choice, const ChoiceSpace& space, int32_t* worths) {
    const MoepressFormula& formula = choice.formula;
    const int64_t groups = formula.groups, size = choice.experts / groups;
    for (int64_t g = 0; g < groups; ++g) worths[g] = worth(choice, space.key + g * size, size);
    take_best(worths, groups, formula.kept_groups, space.best, space.group);
    std::sort(space.group, space.group + formula.kept_groups);
    const int32_t out = key_of(-INFINITY);
    const int64_t* next = space.group;
    for (int64_t g = 0; g < groups; ++g)
        if (next < space.group + formula.kept_groups && *next == g)
            ++next;
        else
            std::fill(space.key + g * size, space.key + (g + 1) * size, out);
}

// Weights [k] of the chosen experts, in place of their scores.
inline void make_weights(const MoepressFormula& formula, float* x, int64_t k) {
    const int32_t numbers = formula.scores;
    if (formula.score == kByChosen) {
        softmax(x, k);
        round_numbers(x, k, numbers);
    }
    if (formula.normalise) {
        const float sum = rounded_number(sum_of(x, k), numbers);
        // torch rounds the number that is added on CPUs, but not the scale below.
        const float epsilon = rounded_number(formula.epsilon, numbers);
        const float whole = rounded_number(sum + epsilon, numbers);
        for (int64_t r = 0; r < k; ++r) x[r] /= whole;
        round_numbers(x, k, numbers);
    }
    if (formula.scale != 1) {
        for (int64_t r = 0; r < k; ++r) x[r] *= formula.scale;
        round_numbers(x, k, numbers);
    }
}

// One token: index [k], and its weights [k] in space.weight.
inline void choose(const Choice& choice, const ChoiceSpace& space, int64_t* index) {
    const MoepressFormula& formula = choice.formula;
    const int64_t n = choice.experts, k = choice.k;
    make_scores(formula, space.score, n);
    if (choice.correction == nullptr)
        for (int64_t e = 0; e < n; ++e) space.key[e] = key_of(space.score[e]);
    else
        for (int64_t e = 0; e < n; ++e)
            space.key[e] =
                key_of(rounded_number(space.score[e] + choice.correction[e], choice.numbers));
    if (formula.groups > 1) keep_best_groups(choice, space, space.key + n);
    take_best(space.key, n, k, space.best, index);
    for (int64_t r = 0; r < k; ++r) space.weight[r] = space.score[index[r]];
    make_weights(formula, space.weight, k);
}

}  // namespace
}  // namespace moepress
