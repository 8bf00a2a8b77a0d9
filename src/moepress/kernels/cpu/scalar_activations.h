// Rounding a token's activations for products with scalar matrices: into one column of a panel
// (isa.h, ScalarPanel). 8 bits: codes from -127 to 127. 16 bits: codes of 15 bits, from -16256 to
// 16256, each split into 128 * high + low, so that the token takes two columns of 8-bit codes whose
// products are added afterwards. Internal linkage: each instruction set compiles its own copy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "isa.h"
#include "rounding.h"

namespace moepress {
namespace {

inline void scalar_round(const float* x, int64_t cols, int group, int activation_bits,
                         const ScalarPanel& panel, int place) {
    const float range = activation_bits == 8 ? 127.0f : 16256.0f;  // 127; 128 * 127
    for (int64_t g = 0; g < cols / group; ++g, x += group) {
        const GroupScale by = group_scale(x, group, range);
        int32_t code[kMaxGroup];
        for (int i = 0; i < group; ++i) code[i] = by.code(x[i]);
        int8_t narrow[2][kMaxGroup];  // the 8-bit codes of each plane
        int32_t sums[2] = {0, 0};
        if (activation_bits == 8) {
            for (int i = 0; i < group; ++i) sums[0] += code[i];
            for (int i = 0; i < group; ++i) narrow[0][i] = int8_t(code[i]);
        } else {
            for (int i = 0; i < group; ++i) {
                const int32_t high = (code[i] + 64) >> 7, low = code[i] - high * 128;
                sums[0] += high;
                sums[1] += low;
                narrow[0][i] = int8_t(high);
                narrow[1][i] = int8_t(low);
            }
        }
        const int64_t width = panel.width;
        for (int plane = 0; plane < activation_bits / 8; ++plane) {
            const float scale = activation_bits == 16 && plane == 0 ? 128 * by.scale : by.scale;
            int8_t* to = panel.codes + (g * group * width + 4 * (place + plane));
            if (width == 1) {
                std::memcpy(to, narrow[plane], size_t(group));
            } else {
                for (int i = 0; i < group; i += 4)
                    std::memcpy(to + i * width, narrow[plane] + i, 4);
            }
            panel.scale[g * width + place + plane] = scale;
            panel.sum[g * width + place + plane] = scale * float(sums[plane]);
        }
    }
}

}  // namespace
}  // namespace moepress
