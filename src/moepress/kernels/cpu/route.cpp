// A router: logits, and the choice of experts (kernels/router.py). Rows of the weight are spread
// over threads, and after them tokens.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "checks.h"
#include "isa.h"
#include "moepress.h"
#include "route_choice.h"
#include "route_numbers.h"
#include "threads.h"

namespace moepress {
namespace {

constexpr int64_t kWorthThreads = 1 << 17;        // products, from which several threads are faster
constexpr int64_t kWorthThreadsChoice = 1 << 11;  // scores

// A vector or matrix of numbers, or none.
struct Numbers {
    const void* at;
    int32_t kind;

    bool known() const { return at == nullptr || is_kind(kind); }
};

struct Router {
    Numbers hidden, weight, bias, correction;
    int64_t tokens, cols, experts, k;
    MoepressFormula formula;
    int threads;

    // Those of scores with the correction, as torch promotes.
    int32_t choice_numbers() const {
        if (formula.score == kByChosen) return kFloat32;  // logits, as floats
        if (correction.at == nullptr || correction.kind == formula.scores) return formula.scores;
        return kFloat32;
    }

    bool fits() const {
        constexpr int64_t most = int64_t(1) << 29;  // products of sizes stay below 2^63
        const MoepressFormula& f = formula;
        if (tokens < 0 || tokens > most || cols < 0 || cols > most) return false;
        if (experts < 1 || experts > most || threads < 1) return false;
        if (!is_kind(hidden.kind) || !is_kind(weight.kind)) return false;
        if (!bias.known() || !correction.known()) return false;
        for (const int32_t numbers : {f.product, f.logits, f.scores, f.weights})
            if (!is_kind(numbers)) return false;
        if (f.score < 0 || f.score >= kScores) return false;
        if (f.score == kByChosen && correction.at != nullptr) return false;
        if (f.groups < 1 || f.groups > experts || experts % f.groups != 0) return false;
        if (f.kept_groups < 1 || f.kept_groups > f.groups) return false;
        if (f.group_best != 1 && f.group_best != 2) return false;
        return k >= 1 && k <= experts / f.groups * f.kept_groups;
    }
};

// Tokens as floats, zeros behind each: whole steps of route_product.h.
struct Tokens {
    int64_t stride;
    std::unique_ptr<float[]> at;

    explicit Tokens(const Router& router)
        : stride((router.cols + 63) / 64 * 64), at(new float[size_t(router.tokens * stride)]) {
        const int64_t bytes = router.cols * bytes_of(router.hidden.kind);
        for (int64_t t = 0; t < router.tokens; ++t) {
            float* const to = at.get() + t * stride;
            const auto* from = static_cast<const uint8_t*>(router.hidden.at) + t * bytes;
            widen_numbers(from, router.hidden.kind, router.cols, to);
            std::fill(to + router.cols, to + stride, 0.0f);
        }
    }
};

// sums [tokens][experts] = tokens times the weight.
void multiply(const Router& router, const Tokens& tokens, float* sums) {
    const RouteProduct product = isa_in_use()->route_product[router.weight.kind];
    const int64_t row_bytes = router.cols * bytes_of(router.weight.kind);
    const auto* const weight = static_cast<const uint8_t*>(router.weight.at);
    const int64_t work = router.tokens * router.experts * router.cols;
    const int threads = work < kWorthThreads ? 1 : router.threads;
    const int64_t grain = grain_for(router.experts, threads, router.experts);
    parallel(threads, router.experts, grain, [&](int64_t first, int64_t last) {
        for (int64_t e = first; e < last; ++e)
            for (int64_t t = 0; t < router.tokens; ++t)
                sums[t * router.experts + e] = product(weight + e * row_bytes, router.cols,
                                                       tokens.at.get() + t * tokens.stride);
    });
}

std::unique_ptr<float[]> wide(const Numbers& numbers, int64_t n) {
    if (numbers.at == nullptr) return nullptr;
    std::unique_ptr<float[]> floats(new float[size_t(n)]);
    widen_numbers(numbers.at, numbers.kind, n, floats.get());
    return floats;
}

// Logits of a token, from its sums [experts] and in their place.
void finish_logits(const Router& router, const float* bias, float* sums, void* logits) {
    const int64_t n = router.experts;
    if (bias != nullptr)
        for (int64_t e = 0; e < n; ++e) sums[e] += bias[e];
    round_numbers(sums, n, router.formula.product);
    round_numbers(sums, n, router.formula.logits);
    narrow_numbers(sums, n, router.formula.logits, logits);
}

Result run(const Router& router, uint8_t* logits, uint8_t* weights, int64_t* index) {
    const int64_t n = router.experts, k = router.k;
    const MoepressFormula& formula = router.formula;
    const std::unique_ptr<float[]> bias = wide(router.bias, n);
    const std::unique_ptr<float[]> correction = wide(router.correction, n);
    const Choice choice{formula, correction.get(), router.choice_numbers(), n, k};
    const int64_t most_best = std::max(k, formula.kept_groups);
    const int64_t keys = n + formula.groups + most_best;
    const std::unique_ptr<float[]> floats(new float[size_t(router.tokens * (n + k))]);
    const std::unique_ptr<int32_t[]> integers(new int32_t[size_t(router.tokens * keys)]);
    const std::unique_ptr<int64_t[]> groups(
        new int64_t[size_t(router.tokens * formula.kept_groups)]);
    multiply(router, Tokens(router), floats.get());

    const auto finish = [&](int64_t t) {
        float* const sums = floats.get() + t * n;
        int32_t* const key = integers.get() + t * keys;
        const ChoiceSpace space{sums, key, key + n + formula.groups,
                                floats.get() + router.tokens * n + t * k,
                                groups.get() + t * formula.kept_groups};
        finish_logits(router, bias.get(), sums, logits + t * n * bytes_of(formula.logits));
        choose(choice, space, index + t * k);
        narrow_numbers(space.weight, k, formula.weights,
                       weights + t * k * bytes_of(formula.weights));
    };
    const int threads = router.tokens * n < kWorthThreadsChoice ? 1 : router.threads;
    parallel(threads, router.tokens, 1, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t) finish(t);
    });
    return kOk;
}

}  // namespace
}  // namespace moepress

int32_t moepress_route(const void* hidden, int32_t hidden_numbers, int64_t tokens, int64_t cols,
                       const void* weight, int32_t weight_numbers, int64_t experts,
                       const void* bias, int32_t bias_numbers, const void* correction,
                       int32_t correction_numbers, int64_t k, const MoepressFormula* formula,
                       int32_t threads, void* logits, void* weights, int64_t* index) {
    using namespace moepress;
    return guarded([&] {
        const Router router{{hidden, hidden_numbers}, {weight, weight_numbers},
                            {bias, bias_numbers}, {correction, correction_numbers},
                            tokens, cols, experts, k, *formula, threads};
        if (!router.fits()) return kBadShape;
        return run(router, static_cast<uint8_t*>(logits), static_cast<uint8_t*>(weights), index);
    });
}
