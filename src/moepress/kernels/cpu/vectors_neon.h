// `Vectors` for 64-bit ARM. The members are explained in vectors_portable.h.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "number_kinds.h"
#include "vectors_portable.h"

namespace moepress {
namespace {

struct NeonVectors {
    static constexpr int width = 4, sums = 16, rows = 4;
    typedef float Float __attribute__((vector_size(16)));
    typedef uint32_t Word __attribute__((vector_size(16)));

    static Float splat(float x) { return (Float)vdupq_n_f32(x); }
    static Float load(const float* at) { return (Float)vld1q_f32(at); }
    static void store(float* at, Float x) { vst1q_f32(at, (float32x4_t)x); }
    static Float mul_add(Float a, Float b, Float c) {
        return (Float)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
    }

    static Float widen(const float* at) { return load(at); }
    static Float widen(const Bfloat16* at) {
        return (Float)vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&at->bits), 16));
    }
    static Float widen(const Float16* at) {
        return (Float)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&at->bits)));
    }
    template <class Number>
    static Float widen_some(const Number* at, int n) {
        return widen_copied<NeonVectors>(at, n);
    }

    static Float totals(const Float* x) {
        const auto pair = [&](int i) {
            return vpaddq_f32((float32x4_t)x[i], (float32x4_t)x[i + 1]);
        };
        return (Float)vpaddq_f32(pair(0), pair(2));
    }
};

}  // namespace
}  // namespace moepress
