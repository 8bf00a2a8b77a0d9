// Activation functions, and what lies between the products of experts (isa.h, Glu). All but gelu's erf are
// written so that the compiler vectorises them. Internal linkage: each instruction set compiles its
// own copy.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "isa.h"
#include "rounding.h"

namespace moepress {
namespace {

// e^x within 2 units in the last place, in operations that vectorise: e^x = 2^n e^r, |r| <= ln2 / 2
// (Cody-Waite reduction, polynomial of the Cephes library). Saturates at 2^-126 and at 2^127.
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
    const uint32_t bits = uint32_t(n + 127) << 23;  // meaningless for NaN, but p is NaN then
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

inline float sigmoid(float x) { return 1 / (1 + exponential(-x)); }

inline float hyperbolic_tangent(float x) {
    const float square = x * x;  // near 0 the quotient cancels: Taylor series to x^9
    float series = 62.0f / 2835;
    series = series * square - 17.0f / 315;
    series = series * square + 2.0f / 15;
    series = series * square - 1.0f / 3;
    series = series * square * x + x;
    const float quotient = 1 - 2 / (exponential(2 * x) + 1);
    return square < 0.09f ? series : quotient;
}

inline float softcap(float x, float cap) { return cap * hyperbolic_tangent(x / cap); }

// These comparisons keep NaN.
inline float at_most(float x, float most) { return x > most ? most : x; }
inline float at_least(float x, float least) { return x < least ? least : x; }

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
    float operator()(float x) const { return x < 0 ? 0 : x; }  // this comparison keeps NaN
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
struct ScaledSilu {
    float alpha;
    float operator()(float x) const { return x / (1 + exponential(-alpha * x)); }
};
struct SoftcappedSilu {
    float alpha, cap;
    float operator()(float x) const { return softcap(x, cap) * sigmoid(alpha * x); }
};
struct Tanh {
    float operator()(float x) const { return hyperbolic_tangent(x); }
};

template <class Function>
void apply(Function function, float* g, const float* up, int n) {
    if (up == nullptr)
        for (int i = 0; i < n; ++i) g[i] = function(g[i]);
    else
        for (int i = 0; i < n; ++i) g[i] = function(g[i]) * up[i];
}

inline void apply_silu(const MoepressGate& gate, float* g, const float* up, int n) {
    if (gate.gate_softcap < INFINITY)
        apply(SoftcappedSilu{gate.alpha, gate.gate_softcap}, g, up, n);
    else if (gate.alpha != 1)
        apply(ScaledSilu{gate.alpha}, g, up, n);
    else
        apply(Silu(), g, up, n);
}

// g <- act(g) * up, or act(g) if `up` is null.
inline void activate(const MoepressGate& gate, float* g, const float* up, int n) {
    switch (gate.activation) {
        case kGelu: return apply(Gelu(), g, up, n);
        case kGeluTanh: return apply(GeluTanh(), g, up, n);
        case kHardswish: return apply(Hardswish(), g, up, n);
        case kMish: return apply(Mish(), g, up, n);
        case kQuickGelu: return apply(QuickGelu(), g, up, n);
        case kRelu: return apply(Relu(), g, up, n);
        case kRelu2: return apply(Relu2(), g, up, n);
        case kSigmoid: return apply(Sigmoid(), g, up, n);
        case kSilu: return apply_silu(gate, g, up, n);
        default: return apply(Tanh(), g, up, n);
    }
}

// The second factor of the product, in place.
inline void prepare_up(const MoepressGate& gate, float* up, int n) {
    if (gate.limit < INFINITY)
        for (int i = 0; i < n; ++i) up[i] = at_least(at_most(up[i], gate.limit), -gate.limit);
    if (gate.up_softcap < INFINITY)
        for (int i = 0; i < n; ++i) up[i] = softcap(up[i], gate.up_softcap);
    if (gate.up_offset != 0)
        for (int i = 0; i < n; ++i) up[i] += gate.up_offset;
}

// Each option is a loop of its own: a plain gate runs the one loop of `apply`.
inline void glu(const MoepressGate& gate, float* g, float* up, int n) {
    const bool limited = gate.limit < INFINITY;
    if (up != nullptr) prepare_up(gate, up, n);
    if (limited && !gate.limits_output)
        for (int i = 0; i < n; ++i) g[i] = at_most(g[i], gate.limit);
    if (!limited || !gate.limits_output) return activate(gate, g, up, n);
    activate(gate, g, nullptr, n);
    for (int i = 0; i < n; ++i) g[i] = at_most(g[i], gate.limit);
    if (up != nullptr)
        for (int i = 0; i < n; ++i) g[i] *= up[i];
}

}  // namespace
}  // namespace moepress
