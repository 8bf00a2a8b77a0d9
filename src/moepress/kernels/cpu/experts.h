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
#include "numbers.h"
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

// y [tokens][hidden] += the experts of a wave; x [tokens][hidden]; index, weight [tokens][k]. At most
// kChunkTokens tokens. `present` [experts]: those of the wave.
template <class Codec>
Result add_experts(const Codec& codec, const float* x, int64_t tokens, const int64_t* index,
                   const float* weight, int64_t k, const Experts<Codec>& experts,
                   const std::vector<bool>& present, Hold& hold, int threads, float* y) {
    const Routing routing = route(index, weight, tokens, k, present, codec.panel_tokens());
    if (routing.panels.empty()) return kOk;
    typename Codec::Activations in(codec, routing, experts.hidden, experts.gate_up_group,
                                   Of::kTokens);
    typename Codec::Activations h(codec, routing, experts.intermediate, experts.down_group,
                                  Of::kPairs);
    const GateUp<Codec> gate_up(codec, experts, routing);
    parallel(threads, in.items(), 1, [&](int64_t begin, int64_t end) {  // while experts are read
        for (int64_t item = begin; item < end; ++item) in.fill(item, x);
    });
    std::vector<ExpertPanels> waiting = routing.experts;
    while (!waiting.empty()) {
        const std::vector<ExpertPanels> ready = hold.take_ready(waiting);
        if (ready.empty()) return hold.failure();
        gate_up.run(ready, in, h, threads);
    }
    if (!hold.wait(routing.experts)) return hold.failure();
    add_down(codec, experts, routing, h, threads, y);
    return kOk;
}

// y [tokens][hidden] = the experts, in the waves of `hold`; x [tokens][hidden].
template <class Codec>
Result run_waves(const Codec& codec, const float* x, int64_t tokens, const int64_t* index,
                 const float* weight, int64_t k, const Experts<Codec>& experts,
                 const std::vector<bool>& present, Hold& hold, int threads, float* y) {
    const int64_t most = portion(tokens, Codec::kChunkTokens);
    std::memset(y, 0, size_t(tokens * experts.hidden) * sizeof(float));
    for (size_t wave = 0; wave < hold.waves().size(); ++wave) {
        if (hold.begin(wave) != kOk) break;
        std::vector<bool> here(present.size());
        for (size_t e = hold.waves()[wave].first; e < hold.waves()[wave].last; ++e)
            here[e] = present[e];
        for (int64_t first = 0; first < tokens; first += most) {
            const Result result = add_experts(
                codec, x + first * experts.hidden, std::min(tokens - first, most),
                index + first * k, weight + first * k, k, experts, here, hold, threads,
                y + first * experts.hidden);
            if (result != kOk) return result;
        }
        hold.end(wave);
    }
    return hold.failure();
}

// y [tokens][hidden]; x [tokens][hidden]: floats, or bfloat16.
template <class Codec>
Result run_experts(const Codec& codec, const void* x, int64_t tokens, const int64_t* index,
                   const float* weight, int64_t k, const Experts<Codec>& experts,
                   const Stored& stored, int threads, bool bfloat16, void* y) {
    std::vector<bool> present;
    for (const auto& matrix : experts.gate_up) present.push_back(matrix.bits > 0);
    Hold hold(stored.store, stored.layer, tokens_of(index, tokens, k, present), tokens);
    // Tokens that are floats at a time. With a store all: each of its waves adds to all results.
    const int64_t most = stored.store ? tokens : portion(tokens, Codec::kChunkTokens);
    for (int64_t first = 0; first < tokens; first += most) {
        const int64_t count = std::min(tokens - first, most), numbers = count * experts.hidden;
        const int64_t at = first * experts.hidden * (bfloat16 ? 2 : 4);
        const Result result = in_floats(
            static_cast<const char*>(x) + at, numbers, static_cast<char*>(y) + at, numbers, bfloat16,
            threads, [&](const float* from, float* to) {
                return run_waves(codec, from, count, index + first * k, weight + first * k, k,
                                 experts, present, hold, threads, to);
            });
        if (result != kOk) return result;
    }
    return kOk;
}

}  // namespace moepress
