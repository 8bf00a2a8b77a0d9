// The first half of the experts: for each pair, h = act(gate x) * up x (with biases, limits, or
// without a gate where experts are so), prepared for the product with down. There are two ways, because a codec that mixes columns can prepare h only when all of
// it is known. `GateUp` is the one that a codec takes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "biases.h"
#include "codec.h"
#include "isa.h"
#include "routing.h"
#include "strip.h"
#include "threads.h"

namespace moepress {

// The experts of a layer.
template <class Codec>
struct Experts {
    std::vector<typename Codec::Matrix> gate_up, down;  // by expert; 0 bits: left out
    int64_t hidden, intermediate;
    int gate_up_group, down_group;
    MoepressGate gate;
    Biases gate_up_bias, down_bias;

    int parts() const { return gate.gated ? 2 : 1; }  // of gate_up's rows, `intermediate` each
};

// Group by group. An item of work is an expert, some of its panels, and a group of intermediate
// columns: the strips of gate and of up that make them, activation, preparation.
template <class Codec>
class GateUpByGroup {
  public:
    GateUpByGroup(const Codec& codec, const Experts<Codec>& experts, const Routing& routing)
        : codec_(codec), experts_(experts), routing_(routing) {}

    // For some of the experts.
    void run(const std::vector<ExpertPanels>& some, const typename Codec::Activations& in,
             typename Codec::Activations& out, int threads) const {
        std::vector<Item> items;
        for (const ExpertPanels& e : some)
            for (size_t first = e.first; first < e.last;) {
                const size_t last = std::min(first + codec_.panels_per_run(), e.last);
                for (int64_t j = 0; j < experts_.intermediate / experts_.down_group; ++j)
                    items.push_back({j, first, last});
                first = last;
            }
        const int64_t count = int64_t(items.size());
        const int64_t grain = codec_.gate_up_grain(count, threads);
        parallel(threads, count, grain, [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; ++item) do_item(items[size_t(item)], in, out);
        });
    }

  private:
    struct Item {
        int64_t group;
        size_t first, last;  // panels first .. last - 1 of one expert
    };

    void do_item(const Item& item, const typename Codec::Activations& in,
                 typename Codec::Activations& out) const {
        const size_t expert = routing_.panels[item.first].expert;
        const auto& w = experts_.gate_up[expert];
        const int group = experts_.down_group, panel_tokens = codec_.panel_tokens();
        const int64_t column = item.group * group;
        alignas(64) float gate[Codec::kRunWidth * kMaxGroup];  // [panels][panel_tokens][group]
        alignas(64) float up[Codec::kRunWidth * kMaxGroup];
        float* const sides[] = {gate, up};
        float some_biases[Codec::kStripRows];
        Products<Codec> products;
        const auto start = [&](size_t i) {
            return (i - item.first) * size_t(panel_tokens * group);
        };
        for (int strip = 0; strip < group / Codec::kStripRows; ++strip)
            for (size_t i = item.first; i < item.last; ++i)
                for (int part = 0; part < experts_.parts(); ++part) {
                    const int64_t row =
                        part * experts_.intermediate + column + strip * Codec::kStripRows;
                    float* to = sides[part] + start(i) + strip * Codec::kStripRows;
                    const float* bias = experts_.gate_up_bias.copy(expert, row, Codec::kStripRows,
                                                                   some_biases);
                    multiply_strip(codec_, w, row / Codec::kStripRows, in, i,
                                   routing_.panels[i], products,
                                   [&](int t, int64_t, int64_t, const float* values) {
                                       store_biased(to + t * group, values, bias,
                                                    Codec::kStripRows);
                                   });
                }
        for (size_t i = item.first; i < item.last; ++i)
            for (int t = 0; t < routing_.panels[i].count; ++t) {
                float* h = gate + start(i) + t * group;
                float* u = experts_.gate.gated ? up + start(i) + t * group : nullptr;
                codec_.glu(experts_.gate, h, u, group);
                out.fill_group(i, t, item.group, h);
            }
    }

    const Codec& codec_;
    const Experts<Codec>& experts_;
    const Routing& routing_;
};

// Row by row. An item of work is first an expert and a strip of gate and up, whose products are
// kept; then a pair: activation, preparation.
template <class Codec>
class GateUpByRow {
  public:
    GateUpByRow(const Codec& codec, const Experts<Codec>& experts, const Routing& routing)
        : codec_(codec), experts_(experts), routing_(routing),
          columns_(experts.parts() * experts.intermediate),
          products_(new float[size_t(routing.pairs() * columns_)]) {}

    // For some of the experts.
    void run(const std::vector<ExpertPanels>& some, const typename Codec::Activations& in,
             typename Codec::Activations& out, int threads) const {
        const int64_t strips = codec_.strips(experts_.gate_up[some.front().expert]);
        const int64_t items = strips * int64_t(some.size());
        const int64_t grain = codec_.gate_up_grain(items, threads);
        parallel(threads, items, grain, [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; ++item)
                do_strip(some[size_t(item / strips)], item % strips, in);
        });
        std::vector<int64_t> pairs;
        for (const ExpertPanels& e : some) {
            const Panel &first = routing_.panels[e.first], &last = routing_.panels[e.last - 1];
            for (int64_t pair = first.first; pair < last.first + last.count; ++pair)
                pairs.push_back(pair);
        }
        parallel(threads, int64_t(pairs.size()), 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t pair = pairs[size_t(i)];
                float* gate = products_of(pair);
                float* up = experts_.gate.gated ? gate + experts_.intermediate : nullptr;
                codec_.glu(experts_.gate, gate, up, int(experts_.intermediate));
                out.fill_row(pair, gate);
            }
        });
    }

  private:
    float* products_of(int64_t pair) const { return products_.get() + pair * columns_; }

    void do_strip(const ExpertPanels& e, int64_t strip,
                  const typename Codec::Activations& in) const {
        Products<Codec> products;
        float some_biases[Codec::kStripRows];
        const int64_t first = strip * Codec::kStripRows;
        const int64_t count = std::min<int64_t>(Codec::kStripRows, columns_ - first);
        const float* bias = experts_.gate_up_bias.copy(e.expert, first, count, some_biases);
        for (size_t i = e.first; i < e.last; ++i) {
            const Panel& panel = routing_.panels[i];
            multiply_strip(codec_, experts_.gate_up[e.expert], strip, in, i, panel, products,
                           [&](int t, int64_t row, int64_t rows, const float* values) {
                               store_biased(products_of(panel.first + t) + row, values, bias,
                                            rows);
                           });
        }
    }

    const Codec& codec_;
    const Experts<Codec>& experts_;
    const Routing& routing_;
    const int64_t columns_;              // gate's, then up's
    std::unique_ptr<float[]> products_;  // [pairs][columns_]: gate x, then up x
};

template <class Codec>
using GateUp =
    std::conditional_t<Codec::kMixesColumns, GateUpByRow<Codec>, GateUpByGroup<Codec>>;

}  // namespace moepress
