// The inputs of the second product of experts: act(gate) * up, as codes.
#include "rounding.cuh"

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

struct Gated {
    const float* out;  // [splits][positions][2 I]: gate, then up
    int splits;
    int64_t positions, inner;
    int activation;

    template <int n>
    DEVICE void load(int row, int column, float (&h)[n]) const {
        float gate[n] = {}, up[n] = {}, part[2][n];
        const float* at = out + row * 2 * inner + column;
#pragma unroll 4
        for (int s = 0; s < splits; ++s, at += positions * 2 * inner) {
            load_numbers(at, 0, kFloat32, part[0]);
            load_numbers(at, inner, kFloat32, part[1]);
#pragma unroll
            for (int j = 0; j < n; ++j) gate[j] += part[0][j];
#pragma unroll
            for (int j = 0; j < n; ++j) up[j] += part[1][j];
        }
#pragma unroll
        for (int j = 0; j < n; ++j) h[j] = activation_of(gate[j], activation) * up[j];
    }
};

}  // namespace
}  // namespace moepress

// Codes of act(gate) * up, [positions][I]; only of the first used[0] positions. `normal` is
// 1 / sqrt(run). Grid: as _Codes in __init__.py says.
extern "C" __global__ void __launch_bounds__(256)
    moepress_gated(const float* out, int64_t splits, int64_t positions, const int32_t* used,
                   int64_t inner, int64_t activation, int64_t run, float normal, int64_t g,
                   int64_t planes, int64_t halves, int8_t* q, float* scale, int32_t* sum) {
    using namespace moepress;
    begin();
    const int group_shift = __ffs(int(g)) - 1;
    round_rows(Gated{out, int(splits), positions, inner, int(activation)}, int(blockIdx.x),
               used[0], int(run), normal,
               Codes{q, scale, sum, int(planes), group_shift, halves != 0, int(positions),
                     int(inner)});
}
