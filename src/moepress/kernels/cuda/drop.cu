// Online dynamic pruning: drop those of a token's chosen experts that are not worth running.
#include "numbers.h"

namespace {

// Whether weight a comes before b where weights fall; NaN first, as torch sorts.
DEVICE bool before(float a, float b) { return a > b || (isnan(a) && !isnan(b)); }

}  // namespace

// One token a warp: its k choices by falling weight, equal ones in their order, and without those of
// small weight. Arguments as in cpu/drop.cpp. Shared memory: 12 k bytes for each warp.
extern "C" __global__ void __launch_bounds__(128)
    moepress_drop(const int64_t* index, const void* weight, int64_t dtype, int64_t tokens,
                  int64_t k, int64_t experts, const float* thresholds, int64_t renormalise,
                  const uint8_t* keep, int64_t* ranked, void* kept, uint8_t* dropped) {
    begin();
    const int count = int(k), lane = lane_id(), warps = int(blockDim.x) / 32;
    const int64_t token = int64_t(blockIdx.x) * warps + warp_id(), first = token * k;
    if (token >= tokens) return;
    auto* const choice = shared_memory<int64_t>() + warp_id() * count;
    auto* const size = reinterpret_cast<float*>(shared_memory<int64_t>() + warps * count) +
                       warp_id() * count;
    const auto weight_of = [&](int i) {
        const int64_t e = index[first + i];
        return e >= 0 && e < experts ? load_number(weight, first + i, dtype) : 0.0f;
    };
    for (int i = lane; i < count; i += 32) {
        const float own = weight_of(i);
        int rank = 0;
        for (int j = 0; j < count; ++j) {
            const float other = weight_of(j);
            rank += before(other, own) || (!before(own, other) && j < i);
        }
        choice[rank] = index[first + i];
        size[rank] = own;
    }
    __syncwarp();
    const bool protect = keep != nullptr && keep[token] != 0;
    const auto drops = [&](int r) {
        const bool real = choice[r] >= 0 && choice[r] < experts;
        return real && !protect && size[r] < thresholds[r] * size[0];
    };
    float all = 0, left = 0;
    for (int r = 0; r < count; ++r) {
        all += size[r];
        left += drops(r) ? 0.0f : size[r];
    }
    const bool scaled = renormalise && left != all && left > 0;
    for (int r = lane; r < count; r += 32) {
        const bool out = drops(r);
        const float w = out ? 0.0f : size[r];
        ranked[first + r] = out ? experts : choice[r];
        store_number(kept, first + r, dtype, scaled ? w * (all / left) : w);
        dropped[first + r] = out;
    }
}
