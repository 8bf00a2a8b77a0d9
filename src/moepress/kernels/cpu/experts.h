// The routed experts of a layer, for either codec:
//
//     y_t = sum over k of  weight[t][k] * down_e(act(gate_e x_t) * up_e x_t),   e = index[t][k]
//
// Biases are added to each product where there are any; gates may do more (kernels/gate.py).
//
//     1. sort the chosen (token, expert) pairs by expert, cut each expert's into panels (routing.h)
//     2. prepare the tokens, in panels
//     3. gate and up, activation, preparation for down (gate_up.h). Experts of a store (store.h)
//        that are there come first, the others when they have been read
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
#include "store.h"
#include "strip.h"
#include "threads.h"

namespace moepress {

// Where the experts of a call come from: a layer of a store, or memory.
struct Stored {
    MoepressStore* store;  // null: memory
    int64_t layer;
};

// y [tokens][hidden] += weight * (down h), over the pairs of panels first_panel .. last_panel - 1.
template <class Codec>
void add_down(const Codec& codec, const Experts<Codec>& experts, const Routing& routing,
              const typename Codec::Activations& h, size_t first_panel, size_t last_panel,
              int threads, float* y) {
    const auto& some = experts.down[routing.experts.front().expert];
    const int64_t grain = codec.down_grain(some, routing.tokens, threads);
    parallel(threads, codec.strips(some), grain, [&](int64_t begin, int64_t end) {
        Products<Codec> products;
        float some_biases[Codec::kStripRows];
        for (size_t i = first_panel; i < last_panel; ++i) {
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
Result experts_chunk(const Codec& codec, const float* x, int64_t tokens, const int64_t* index,
                     const float* weight, int64_t k, const Experts<Codec>& experts,
                     const std::vector<bool>& present, Hold& hold, int threads, float* y) {
    const size_t y_bytes = size_t(tokens * experts.hidden) * sizeof(float);
    const Routing routing = route(index, weight, tokens, k, present, codec.panel_tokens());
    if (routing.panels.empty()) {
        std::memset(y, 0, y_bytes);
        return kOk;
    }
    typename Codec::Activations in(codec, routing, experts.hidden, experts.gate_up_group,
                                   Of::kTokens);
    typename Codec::Activations h(codec, routing, experts.intermediate, experts.down_group,
                                  Of::kPairs);
    const GateUp<Codec> gate_up(codec, experts, routing);
    std::memset(y, 0, y_bytes);
    const std::vector<ExpertPanels>& chosen = routing.experts;
    bool filled = false;
    for (size_t first = 0; first < chosen.size();) {
        const size_t last = hold.begin(chosen, first);
        if (!filled)  // while the first experts are read
            parallel(threads, in.items(), 1, [&](int64_t begin, int64_t end) {
                for (int64_t item = begin; item < end; ++item) in.fill(item, x);
            });
        filled = true;
        std::vector<ExpertPanels> waiting(chosen.begin() + ptrdiff_t(first),
                                          chosen.begin() + ptrdiff_t(last));
        while (!waiting.empty()) {
            const std::vector<ExpertPanels> ready = hold.take_ready(waiting);
            if (ready.empty()) return hold.failure();
            gate_up.run(ready, in, h, threads);
        }
        if (!hold.wait(chosen, first, last)) return hold.failure();
        add_down(codec, experts, routing, h, chosen[first].first, chosen[last - 1].last, threads,
                 y);
        hold.end(chosen, first, last);
        first = last;
    }
    return kOk;
}

template <class Codec>
Result run_experts(const Codec& codec, const float* x, int64_t tokens, const int64_t* index,
                   const float* weight, int64_t k, const Experts<Codec>& experts,
                   const Stored& stored, int threads, float* y) {
    std::vector<bool> present;
    for (const auto& matrix : experts.gate_up) present.push_back(matrix.bits > 0);
    Hold hold(stored.store, stored.layer, tokens_of(index, tokens, k, present), tokens);
    if (hold.failure() != kOk) return hold.failure();
    const int64_t most = portion(tokens, Codec::kChunkTokens);
    for (int64_t first = 0; first < tokens;) {
        const int64_t count = std::min(tokens - first, most);
        const Result result = experts_chunk(
            codec, x + first * experts.hidden, count, index + first * k, weight + first * k, k,
            experts, present, hold, threads, y + first * experts.hidden);
        if (result != kOk) return result;
        first += count;
    }
    return kOk;
}

}  // namespace moepress
