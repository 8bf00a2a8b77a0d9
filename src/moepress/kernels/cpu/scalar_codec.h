// The codec of scalar matrices, for the driver (codec.h says what the members mean).
//
// Each panel of tokens has rounded activations of its own, interleaved as the kernel reads them
// (isa.h, ScalarPanel). With activation bits 16 a token takes two columns of its panel, the high
// and the low halves of its codes (two planes), whose products `multiply` adds.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <memory>
#include <vector>

#include "codec.h"
#include "isa.h"
#include "routing.h"
#include "scalar_format.h"
#include "scalar_matrix.h"
#include "threads.h"

namespace moepress {

class ScalarActivations;

class ScalarCodec {
  public:
    using Matrix = ScalarMatrix;
    using Activations = ScalarActivations;
    static constexpr int kStripRows = kBlockRows;
    static constexpr bool kMixesColumns = false;
    // Bounds the memory between the products. Of 512 experts with 10 for a token, each still gets
    // 80 of so many.
    static constexpr int64_t kChunkTokens = 4096;
    static constexpr int kProductTokens = kMaxWidth;

    ScalarCodec(const Isa& isa, int activation_bits)
        : isa_(isa), activation_bits_(activation_bits), planes_(activation_bits / 8) {}

    const Isa& isa() const { return isa_; }
    int activation_bits() const { return activation_bits_; }
    int planes() const { return planes_; }
    int panel_tokens() const { return isa_.max_width / planes_; }

    static int64_t strips(const Matrix& w) { return w.blocks(); }
    inline void multiply(const Matrix& w, int64_t block, const Activations& activations, size_t i,
                         const Panel& panel, float* out) const;
    void glu(const MoepressGate& gate, float* g, float* up, int n) const {
        isa_.glu(gate, g, up, n);
    }

    static int64_t linear_grain(int64_t blocks, int threads) {
        return grain_for(blocks, threads, 8);
    }
    static int64_t gate_up_grain(int64_t items, int threads) {
        return grain_for(items, threads, 4);
    }

    // With few tokens, reading the weights is the cost. Then a thread takes runs of some 100 KB,
    // since a run starts without what is prefetched later; but 8 runs for each thread are enough.
    static int64_t down_grain(const Matrix& w, int64_t tokens, int threads) {
        const int64_t blocks = w.blocks();
        if (tokens > kMaxWidth) return grain_for(blocks, threads, 4);
        const int64_t bytes = blocks * w.bytes_per_block();
        const int64_t runs = std::clamp<int64_t>(bytes / (threads * int64_t(100'000)), 1, 8);
        return (blocks + threads * runs - 1) / (threads * runs);
    }

    // Panels of an expert that one item of work multiplies with gate and up: their kRunWidth
    // columns bound the buffers of an item to 64 KB on a thread's stack, of which small ones have
    // 128 KB. Their activations and one block's codes fit the second-level cache.
    static constexpr int kRunWidth = 64;
    size_t panels_per_run() const { return size_t(kRunWidth / isa_.max_width); }

  private:
    const Isa& isa_;
    int activation_bits_, planes_;
};

class ScalarActivations {
  public:
    ScalarActivations(const ScalarCodec& codec, const Routing& routing, int64_t cols, int group,
                      Of of)
        : codec_(codec), routing_(routing), cols_(cols), group_(group) {
        const int64_t groups = cols / group;
        const size_t count = one_for_all(of) ? 1 : routing.panels.size();
        int64_t columns = 0;
        for (size_t i = 0; i < count; ++i) columns += width_of(routing.panels[i]);
        codes_.reset(new int8_t[size_t(columns * cols)]);
        floats_.reset(new float[size_t(2 * columns * groups)]);
        int8_t* codes = codes_.get();
        float* floats = floats_.get();
        for (size_t i = 0; i < count; ++i) {
            const int64_t width = width_of(routing.panels[i]);
            panels_.push_back({codes, floats, floats + width * groups, int(width)});
            if (routing.panels[i].count * codec.planes() < width) {  // columns without a token
                std::memset(codes, 0, size_t(width * cols));
                std::memset(floats, 0, size_t(2 * width * groups) * sizeof(float));
            }
            codes += width * cols;
            floats += 2 * width * groups;
        }
    }

    int64_t items() const { return int64_t(panels_.size()); }

    void fill(int64_t item, const float* x) {
        const Panel& panel = routing_.panels[size_t(item)];
        for (int t = 0; t < panel.count; ++t)
            codec_.isa().scalar_round(x + routing_.token[size_t(panel.first + t)] * cols_, cols_,
                                      group_, codec_.activation_bits(), panels_[size_t(item)],
                                      t * codec_.planes());
    }

    // h [group]
    void fill_group(size_t i, int t, int64_t j, const float* h) {
        const ScalarPanel& all = panels_[i];
        const ScalarPanel here = {all.codes + j * group_ * all.width, all.scale + j * all.width,
                                  all.sum + j * all.width, all.width};
        codec_.isa().scalar_round(h, group_, group_, codec_.activation_bits(), here,
                                  t * codec_.planes());
    }

    const ScalarPanel& operator[](size_t i) const { return panels_[panels_.size() == 1 ? 0 : i]; }

  private:
    // A single token that chose no expert twice: all its panels are the same, and one is kept.
    bool one_for_all(Of of) const {
        return of == Of::kTokens && routing_.tokens == 1 &&
               std::all_of(routing_.panels.begin(), routing_.panels.end(),
                           [](const Panel& panel) { return panel.count == 1; });
    }

    // The least width that holds a panel's tokens.
    int64_t width_of(const Panel& panel) const {
        return *std::find_if(
            std::begin(kWidths), std::end(kWidths) - 1,
            [&](int width) { return width >= panel.count * codec_.planes(); });
    }

    const ScalarCodec& codec_;
    const Routing& routing_;
    int64_t cols_;
    int group_;
    std::unique_ptr<int8_t[]> codes_;
    std::unique_ptr<float[]> floats_;
    std::vector<ScalarPanel> panels_;
};

inline void ScalarCodec::multiply(const Matrix& w, int64_t block, const Activations& activations,
                                  size_t i, const Panel& panel, float* out) const {
    const ScalarPanel& x = activations[i];
    isa_.scalar_dot[w.bits][__builtin_ctz(unsigned(x.width))](w.block(block), w.cols, w.group, x,
                                                              out);
    if (planes_ == 1) return;
    for (int t = 0; t < panel.count; ++t) {
        const float* high = out + 2 * kBlockRows * t;
        const float* low = high + kBlockRows;
        for (int r = 0; r < kBlockRows; ++r) out[kBlockRows * t + r] = high[r] + low[r];
    }
}

}  // namespace moepress
