// The routed experts of a layer, for either codec:
//
//     y_t = sum over k of  weight[t][k] * down_e(act(gate_e x_t) * up_e x_t),   e = index[t][k]
//
// Biases are added to each product where there are any; gates may do more (kernels/gate.py).
//
//     1. sort the chosen (token, expert) pairs by expert, cut each expert's into panels (routing.h)
//     2. prepare the tokens, in panels
//     3. gate and up, activation, preparation for down (gate_up.h)
//     4. an item of work is a strip of output rows: down of all experts, weighted, summed in the
//        order of the experts. Two threads never write the same output, so that results do not
//        depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "codec.h"
#include "gate_up.h"
#include "routing.h"
#include "strip.h"
#include "threads.h"

namespace moepress {

// y [tokens][hidden] += weight * (down h), over all pairs.
template <class Codec>
void add_down(const Codec& codec, const Experts<Codec>& experts, const Routing& routing,
              const typename Codec::Activations& h, int threads, float* y) {
    const auto& some = experts.down[routing.experts.front().expert];
    const int64_t grain = codec.down_grain(some, routing.tokens, threads);
    parallel(threads, codec.strips(some), grain, [&](int64_t begin, int64_t end) {
        Products<Codec> products;
        float some_biases[Codec::kStripRows];
        for (size_t i = 0; i < routing.panels.size(); ++i) {
            const Panel& panel = routing.panels[i];
            for (int64_t strip = begin; strip < end; ++strip) {
                const int64_t first = strip * Codec::kStripRows;
                const int64_t count = std::min<int64_t>(Codec::kStripRows, experts.hidden - first);
                const float* bias =
                    experts.down_bias.copy(panel.expert, first, count, some_biases);
                multiply_strip(codec, experts.down[panel.expert], strip, h, i, panel, products,
                               [&](int t, int64_t row, int64_t rows, const float* values) {
                                   const size_t pair = size_t(panel.first + t);
                                   const float weight = routing.weight[pair];
                                   float* to = y + routing.token[pair] * experts.hidden + row;
                                   if (bias)
                                       for (int64_t r = 0; r < rows; ++r)
                                           to[r] += weight * (values[r] + bias[r]);
                                   else
                                       for (int64_t r = 0; r < rows; ++r)
                                           to[r] += weight * values[r];
                               });
            }
        }
    });
}

// y [tokens][hidden]; x [tokens][hidden]; index, weight [tokens][k]. At most kChunkTokens tokens.
// Memory is allocated before y is written.
template <class Codec>
void experts_chunk(const Codec& codec, const float* x, int64_t tokens, const int64_t* index,
                   const float* weight, int64_t k, const Experts<Codec>& experts,
                   const std::vector<bool>& present, int threads, float* y) {
    const size_t y_bytes = size_t(tokens * experts.hidden) * sizeof(float);
    const Routing routing = route(index, weight, tokens, k, present, codec.panel_tokens());
    if (routing.panels.empty()) return void(std::memset(y, 0, y_bytes));
    typename Codec::Activations in(codec, routing, experts.hidden, experts.gate_up_group,
                                   Of::kTokens);
    typename Codec::Activations h(codec, routing, experts.intermediate, experts.down_group,
                                  Of::kPairs);
    const GateUp<Codec> gate_up(codec, experts, routing);
    std::memset(y, 0, y_bytes);
    parallel(threads, in.items(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) in.fill(item, x);
    });
    gate_up.run(in, h, threads);
    add_down(codec, experts, routing, h, threads, y);
}

template <class Codec>
void run_experts(const Codec& codec, const float* x, int64_t tokens, const int64_t* index,
                 const float* weight, int64_t k, const Experts<Codec>& experts, int threads,
                 float* y) {
    std::vector<bool> present;
    for (const auto& matrix : experts.gate_up) present.push_back(matrix.bits > 0);
    for (int64_t first = 0; first < tokens;) {
        const int64_t count = std::min(tokens - first, Codec::kChunkTokens);
        experts_chunk(codec, x + first * experts.hidden, count, index + first * k,
                      weight + first * k, k, experts, present, threads,
                      y + first * experts.hidden);
        first += count;
    }
}

}  // namespace moepress
