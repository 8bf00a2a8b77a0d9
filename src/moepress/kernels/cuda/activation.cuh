// The activation functions of experts.
#pragma once

#include "device.h"

namespace moepress {
namespace {

DEVICE float sigmoid(float x) { return 1 / (1 + expf(-x)); }

// In the order of ACTIVATIONS in kernels/cpu/__init__.py.
DEVICE float activation_of(float x, int activation) {
    switch (activation) {
        case 0: return 0.5f * x * (1 + erff(x * 0.707106781f));
        case 1: return 0.5f * x * (1 + tanhf(0.797884561f * (x + 0.044715f * x * x * x)));
        case 2: {
            float gate = x + 3;
            gate = gate < 0 ? 0 : gate;  // these comparisons keep NaN
            gate = gate > 6 ? 6 : gate;
            return x * gate / 6;
        }
        case 3: return x * tanhf(log1pf(expf(x)));
        case 4: return x * sigmoid(1.702f * x);
        case 5: return x < 0 ? 0 : x;
        case 6: {
            const float y = x < 0 ? 0 : x;
            return y * y;
        }
        case 7: return sigmoid(x);
        case 8: return x / (1 + expf(-x));
        default: return tanhf(x);
    }
}

}  // namespace
}  // namespace moepress
