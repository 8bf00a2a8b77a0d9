// The inputs of the second product of experts: act(gate) * up, as codes.
#include "activation.cuh"
#include "rounding.cuh"

namespace moepress {
namespace {

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

// Codes of act(gate) * up, [positions][I]; only of the first used[0] positions. Grid: as Codes in codes.py
// says.
extern "C" __global__ void __launch_bounds__(256)
    moepress_gated(const float* out, int64_t splits, int64_t positions, const int32_t* used,
                   int64_t inner, int64_t activation, int64_t rotated, int64_t g,
                   int64_t planes, int64_t halves, int8_t* q, float* scale, int32_t* sum) {
    using namespace moepress;
    begin();
    const int group_shift = __ffs(int(g)) - 1;
    const Codes codes = {q,       scale,         sum,         int(planes), group_shift,
                         rotated != 0, halves != 0, int(positions), int(inner)};
    round_rows(Gated{out, int(splits), positions, inner, int(activation)}, int(blockIdx.x),
               used[0], codes);
}
