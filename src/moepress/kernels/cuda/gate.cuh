// Gates with options, and biases: what lies between the products of experts (kernels/gate.py). Plain
// gates without biases have kernels of their own, in gated.cu and grouped.cu.
#pragma once

#include "activation.cuh"
#include "numbers.h"

namespace moepress {
namespace {

constexpr float kLargest = 3.402823466e+38f;  // a bound above it is infinite: none

DEVICE float softcap(float x, float cap) { return cap > kLargest ? x : cap * tanhf(x / cap); }
DEVICE float at_most(float x, float most) { return x > most ? most : x; }  // keeps NaN
DEVICE float at_least(float x, float least) { return x < least ? least : x; }

struct Gate {
    int activation;
    bool gated, limits_output;
    float limit, alpha, up_offset, gate_softcap, up_softcap;

    DEVICE int parts() const { return gated ? 2 : 1; }

    DEVICE float activated(float g) const {
        if (gate_softcap <= kLargest) return softcap(g, gate_softcap) * sigmoid(alpha * g);
        if (alpha != 1) return g * sigmoid(alpha * g);
        return activation_of(g, activation);
    }

    // h of the first products g and u; u has no effect without a gate.
    DEVICE float operator()(float g, float u) const {
        if (!limits_output) g = at_most(g, limit);
        float a = activated(g);
        if (limits_output) a = at_most(a, limit);
        if (!gated) return a;
        u = at_least(at_most(u, limit), -limit);
        return a * (softcap(u, up_softcap) + up_offset);
    }
};

// The biases of the experts' matrices, of which positions take those of their expert.
struct Biases {
    const void* at;  // [experts][stride], or null: none
    int64_t dtype, stride;
    const int32_t* pair;   // [positions]: the pair (token, choice) of each
    const int64_t* index;  // [pairs]: its expert

    // Add the biases of n rows of the matrix from `first` on to x.
    template <int n>
    DEVICE void add(int position, int64_t first, float (&x)[n]) const {
        if (at == nullptr) return;
        float bias[n];
        load_numbers(at, index[pair[position]] * stride + first, dtype, bias);
#pragma unroll
        for (int j = 0; j < n; ++j) x[j] += bias[j];
    }
};

}  // namespace
}  // namespace moepress
