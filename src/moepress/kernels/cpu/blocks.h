// The arithmetic, written once over `Lanes` (sixteen rows of a block) and compiled once for each
// instruction set. Only lanes_*.h differ.
//
// With codes c, scale s and zero z of a row's group, and activations x = a q, q 8-bit integers:
//
//     y = sum over groups of  s (a sum(c q) - z a sum(q))
//
// sum(c q) is an integer, exact: at most 255 * 127 * 128 < 2^22, so its float is exact too. What
// is rounded is what follows it, once a group: the error is that of a float32 sum over K / g terms.
// a sum(q) is the same for all rows and comes with the panel.
//
// A unit is 32 columns: 8 quads of 4 columns, and 64 * bits bytes of codes. Each quad is one
// register of codes (docs/format.md, "Tiles"), used for every token of the panel: unpacking costs
// one or two instructions per `width` dot products. Everything here has internal linkage: two
// translation units with different instruction sets must not share an inline function.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"
#include "viterbi.h"

namespace {

using moepress::Panel;

// Alone, a token's codes need not be moved to the low bits of their bytes: masked where they lie they
// are 2^shift times as large, each shift has a sum of its own, and the sums are shifted at the end of
// the group. That saves every shift but those.
template <int bits, int width>
constexpr bool kInPlace = Lanes::sums_any_byte && width == 1 && (bits == 1 || bits == 2 || bits == 4);

// The codes of 16 rows and the 4 columns `quad` of a unit: planes of 64 bytes, 8 / bits quads each.
template <int bits, int quad, bool in_place>
[[gnu::always_inline]] inline Lanes::Codes codes_of(const uint8_t* plane, const uint8_t* high) {
    constexpr int width = bits == 3 ? 2 : bits;
    constexpr int at = width * quad;
    const Lanes::Codes chunk = Lanes::load(plane + 64 * (at / 8));
    const Lanes::Codes low = Lanes::field<width, at % 8, in_place>(chunk);
    if constexpr (bits == 3) return Lanes::with_high<quad>(low, Lanes::load(high));
    return low;
}

// `dot` holds `ways` sums for each token, used in turn: one alone would wait for itself.
template <int bits, int width, int ways, int quad = 0>
[[gnu::always_inline]] inline void add_quads(const uint8_t* plane, const uint8_t* high,
                                             const int8_t* x, Lanes::Dot<bits>* dot) {
    const Lanes::Codes codes = codes_of<bits, quad, kInPlace<bits, width>>(plane, high);
#pragma GCC unroll 16
    for (int p = 0; p < width; ++p) {
        int32_t four;
        std::memcpy(&four, x + 4 * p, 4);
        dot[p * ways + quad % ways].add(codes, four);
    }
    if constexpr (quad < 7)
        add_quads<bits, width, ways, quad + 1>(plane, high, x + 4 * width, dot);
}

// One or two tokens are bound by memory. The hardware alone leaves a third of the bandwidth unused:
// it stops at every page, and a block is three streams (codes, scales, zeros). So codes are asked
// for this many bytes ahead, scales and zeros a whole block ahead, into the second-level cache: the
// first level has too few buffers for misses to cover the latency. Measured on Zen 4, 2-bit codes,
// one thread, of 26 GB/s that a plain read gets: 11 GB/s without, 15 into the first level, 23 so;
// 4 KB ahead is too few, from 8 to 12 KB makes no difference.
constexpr int kAhead = 8192;

template <int bits, int width>
void block_dot(const uint8_t* block, int64_t cols, int group, const Panel& x, float* out) {
    constexpr bool has_zero = moepress::has_zero(bits);
    constexpr float levels = (1 << bits) - 1;
    constexpr int unit_bytes = 64 * (bits == 3 ? 2 : bits);
    constexpr bool in_place = kInPlace<bits, width>;
    constexpr int ways = in_place ? 8 / bits : width < Lanes::sums ? Lanes::sums / width : 1;
    const int64_t groups = cols / group;
    const int64_t next = moepress::block_bytes(cols, bits, group);
    const uint8_t* plane = block;
    const uint8_t* ahead = block + kAhead;
    const uint8_t* scale = block + 2 * cols * bits;
    const uint8_t* zero = scale + 32 * groups;
    const int8_t* quads = x.codes;
    Lanes::Float y[width];
#pragma GCC unroll 16
    for (int p = 0; p < width; ++p) y[p] = Lanes::zero();
    for (int64_t g = 0; g < groups; ++g) {
        Lanes::Dot<bits> dot[width * ways];
        const uint8_t* high = plane + 4 * group;  // 3 bits: the plane of high bits
        for (int column = 0; column < group; column += 32) {
            if constexpr (width <= 2)
                for (int line = 0; line < bits; ++line, ahead += 64) Lanes::prefetch(ahead);
            add_quads<bits, width, ways>(plane, high, quads, dot);
#pragma GCC unroll 16
            for (int p = 0; p < width * ways; ++p) dot[p].carry();
            plane += unit_bytes;
            high += 64;
            quads += 32 * width;
        }
        if constexpr (bits == 3) plane = high;
        if constexpr (width <= 2) {
            Lanes::prefetch(scale + kAhead + 48 * g);  // codes again: `ahead` skips this many
            Lanes::prefetch(scale + next + 32 * g);
            if constexpr (has_zero) Lanes::prefetch(zero + next + 16 * g);
        }
        const Lanes::Float s = Lanes::bfloat16(scale + 32 * g);
        Lanes::Float z = Lanes::splat(levels / 2);
        if constexpr (has_zero)
            z = Lanes::mul(Lanes::bytes(zero + 16 * g), Lanes::splat(levels / 255));
#pragma GCC unroll 16
        for (int p = 0; p < width; ++p) {
#pragma GCC unroll 16
            for (int way = 1; way < ways; ++way)
                dot[p * ways].join(dot[p * ways + way], in_place ? bits * way : 0);
            const Lanes::Float a = Lanes::splat(x.scale[g * width + p]);
            const Lanes::Float correction = Lanes::mul(z, Lanes::splat(x.sum[g * width + p]));
            const Lanes::Float sum = dot[p * ways].value();
            y[p] = Lanes::mul_add(s, Lanes::mul_sub(a, sum, correction), y[p]);
        }
    }
#pragma GCC unroll 16
    for (int p = 0; p < width; ++p) Lanes::store(out + 16 * p, y[p]);
}

// Rounds half to even, |x| < 2^22: the sum is a float whose unit is 1.
inline int32_t round_to_int(float x) {
    const float sum = x + 12582912.0f;  // 1.5 * 2^23
    int32_t bits;
    std::memcpy(&bits, &sum, 4);
    return bits - 0x4B400000;
}

// The scale of a group of activations whose largest code is `range`.
struct Span {
    bool counts;  // false: all codes are 0
    float inverse, scale;
};

inline Span span_of(const float* x, int n, float range) {
    constexpr int32_t infinity = 0x7F800000;
    int32_t largest = 0;  // bits of the largest |x|: they order as the floats do, NaN last
    for (int i = 0; i < n; ++i) {
        int32_t bits_of;
        std::memcpy(&bits_of, x + i, 4);
        bits_of &= 0x7FFFFFFF;
        largest = bits_of > largest ? bits_of : largest;
    }
    float amax;
    std::memcpy(&amax, &largest, 4);
    // Below 2^-100 a group counts as 0: its inverse would overflow. Infinity and NaN must reach the
    // output: the scale is NaN.
    const bool counts = amax >= 0x1p-100f && largest < infinity;
    float scale = counts ? amax / range : 0.0f;
    if (largest >= infinity) std::memcpy(&scale, "\0\0\xC0\x7F", 4);
    return {counts, counts ? range / amax : 0.0f, scale};
}

void quantize(const float* x, int64_t cols, int group, int bits, const Panel& panel, int place) {
    const float range = bits == 8 ? 127.0f : 16256.0f;  // 127; 128 * 127
    for (int64_t g = 0; g < cols / group; ++g, x += group) {
        const auto [counts, inverse, scale] = span_of(x, group, range);
        int32_t code[moepress::kMaxGroup];
        for (int i = 0; i < group; ++i) code[i] = counts ? round_to_int(x[i] * inverse) : 0;
        int8_t narrow[2][moepress::kMaxGroup];
        int32_t sums[2] = {0, 0};
        if (bits == 8) {
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
        for (int part = 0; part < bits / 8; ++part) {
            const float unit = bits == 16 && part == 0 ? 128 * scale : scale;
            int8_t* to = panel.codes + (g * group * width + 4 * (place + part));
            if (width == 1) {
                std::memcpy(to, narrow[part], size_t(group));
            } else {
                for (int i = 0; i < group; i += 4) std::memcpy(to + i * width, narrow[part] + i, 4);
            }
            panel.scale[g * width + place + part] = unit;
            panel.sum[g * width + place + part] = unit * float(sums[part]);
        }
    }
}

// e^x within 2 units in the last place, in operations that vectorise: e^x = 2^n e^r, |r| <= ln2 / 2
// (Cody-Waite reduction, Cephes' polynomial). Saturates at 2^-126 and at 2^127.
inline float exponential(float x) {
    x = x < -87.3f ? -87.3f : x;
    x = x > 88.0f ? 88.0f : x;
    const int32_t n = round_to_int(x * 1.44269504f);
    const float r = x - float(n) * 0.693359375f - float(n) * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    const uint32_t bits = uint32_t(n + 127) << 23;  // of a NaN: whatever, it stays NaN below
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

inline float sigmoid(float x) { return 1 / (1 + exponential(-x)); }

inline float hyperbolic_tangent(float x) {
    const float square = x * x;  // near 0 the quotient would cancel: Taylor's series to x^9
    float series = 62.0f / 2835;
    series = series * square - 17.0f / 315;
    series = series * square + 2.0f / 15;
    series = series * square - 1.0f / 3;
    series = series * square * x + x;
    const float quotient = 1 - 2 / (exponential(2 * x) + 1);
    return square < 0.09f ? series : quotient;
}

struct Gelu {
    float operator()(float x) const { return 0.5f * x * (1 + __builtin_erff(x * 0.707106781f)); }
};
struct GeluTanh {
    float operator()(float x) const {
        const float inner = 0.797884561f * (x + 0.044715f * x * x * x);
        return 0.5f * x * (1 + hyperbolic_tangent(inner));
    }
};
struct Hardswish {
    float operator()(float x) const {
        float gate = x + 3;
        gate = gate < 0 ? 0 : gate;
        gate = gate > 6 ? 6 : gate;
        return x * gate / 6;
    }
};
struct Mish {  // x tanh(ln(1 + e)) = x n / (n + 2), n = e^2 + 2e, e = e^x
    float operator()(float x) const {
        const float e = exponential(x > 20 ? 20 : x);
        const float n = e * e + 2 * e;
        return x * (n / (n + 2));
    }
};
struct QuickGelu {
    float operator()(float x) const { return x * sigmoid(1.702f * x); }
};
struct Relu {
    float operator()(float x) const { return x < 0 ? 0 : x; }  // in this order NaN stays NaN
};
struct Relu2 {
    float operator()(float x) const {
        const float y = x < 0 ? 0 : x;
        return y * y;
    }
};
struct Sigmoid {
    float operator()(float x) const { return sigmoid(x); }
};
struct Silu {
    float operator()(float x) const { return x / (1 + exponential(-x)); }
};
struct Tanh {
    float operator()(float x) const { return hyperbolic_tangent(x); }
};

template <class Function>
void apply(Function function, float* gate, const float* up, int n) {
    for (int i = 0; i < n; ++i) gate[i] = function(gate[i]) * up[i];
}

void glu(int activation, float* gate, const float* up, int n) {
    switch (activation) {
        case moepress::kGelu: return apply(Gelu(), gate, up, n);
        case moepress::kGeluTanh: return apply(GeluTanh(), gate, up, n);
        case moepress::kHardswish: return apply(Hardswish(), gate, up, n);
        case moepress::kMish: return apply(Mish(), gate, up, n);
        case moepress::kQuickGelu: return apply(QuickGelu(), gate, up, n);
        case moepress::kRelu: return apply(Relu(), gate, up, n);
        case moepress::kRelu2: return apply(Relu2(), gate, up, n);
        case moepress::kSigmoid: return apply(Sigmoid(), gate, up, n);
        case moepress::kSilu: return apply(Silu(), gate, up, n);
        default: return apply(Tanh(), gate, up, n);
    }
}

template <int bits, int width>
constexpr moepress::BlockDot dot_or_null() {
    if constexpr (width <= Lanes::max_width) return block_dot<bits, width>;
    return nullptr;
}

#define MOEPRESS_WIDTHS(bits)                                                             \
    {dot_or_null<bits, 1>(), dot_or_null<bits, 2>(), dot_or_null<bits, 4>(),              \
     dot_or_null<bits, 8>(), dot_or_null<bits, 16>()}

#define MOEPRESS_ISA(name)                                                                \
    {name,                                                                                \
     Lanes::max_width,                                                                    \
     {MOEPRESS_WIDTHS(1), MOEPRESS_WIDTHS(2), MOEPRESS_WIDTHS(3), MOEPRESS_WIDTHS(4),     \
      MOEPRESS_WIDTHS(8)},                                                                \
     quantize,                                                                            \
     glu,                                                                                 \
     {viterbi_step<1>, viterbi_step<2>, viterbi_step<3>, viterbi_step<4>},                \
     subtract_least,                                                                      \
     {slab_dot<1>, slab_dot<2>, slab_dot<3>, slab_dot<4>},                                \
     rotate,                                                                              \
     round_token}

}  // namespace
