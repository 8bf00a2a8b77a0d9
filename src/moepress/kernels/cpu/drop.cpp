// Online dynamic pruning: drop those of a token's chosen experts that are not worth running. This
// takes some nanoseconds for a token; as a dozen tensor operations it would take longer than a
// small layer.

#include <cstdint>

#include "moepress.h"

namespace {

// One token: sort its choices by falling weight, equal ones in their order, and drop the small
// ones.
void drop_token(const int64_t* index, const float* weight, int64_t k, int64_t experts,
                const float* thresholds, bool renormalise, bool keep, int64_t* ranked,
                float* kept, uint8_t* dropped) {
    for (int64_t i = 0; i < k; ++i) {
        const bool real = index[i] >= 0 && index[i] < experts;
        const float w = real ? weight[i] : 0;
        int64_t at = i;
        for (; at > 0 && kept[at - 1] < w; --at) {
            kept[at] = kept[at - 1];
            ranked[at] = ranked[at - 1];
        }
        kept[at] = w;
        ranked[at] = index[i];
    }
    float all = 0, left = 0;
    const float first = k > 0 ? kept[0] : 0;
    for (int64_t r = 0; r < k; ++r) {
        all += kept[r];
        const bool real = ranked[r] >= 0 && ranked[r] < experts;
        dropped[r] = real && !keep && kept[r] < thresholds[r] * first;
        if (dropped[r]) {
            kept[r] = 0;
            ranked[r] = experts;
        }
        left += kept[r];
    }
    if (renormalise && left != all && left > 0)
        for (int64_t r = 0; r < k; ++r) kept[r] *= all / left;
}

}  // namespace

int32_t moepress_drop(const int64_t* index, const float* weight, int64_t tokens, int64_t k,
                      int64_t experts, const float* thresholds, int32_t renormalise,
                      const uint8_t* keep, int64_t* ranked, float* kept, uint8_t* dropped) {
    if (tokens < 0 || k < 0 || experts < 0) return kBadShape;
    for (int64_t t = 0; t < tokens; ++t) {
        const int64_t at = t * k;
        drop_token(index + at, weight + at, k, experts, thresholds, renormalise != 0,
                   keep != nullptr && keep[t] != 0, ranked + at, kept + at, dropped + at);
    }
    return kOk;
}
