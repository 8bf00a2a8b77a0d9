// The codec of trellis matrices, for the driver (codec.h says what the members mean).
//
// The activations of a token are rotated, which mixes its columns, and rounded. All tokens lie in one array, under Of::kPairs with one row for each pair; a panel lists the rows that
// it takes (isa.h, TrellisPanel).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "codec.h"
#include "isa.h"
#include "routing.h"
#include "threads.h"
#include "trellis_code.h"
#include "trellis_matrix.h"

namespace moepress {

class TrellisActivations;

class TrellisCodec {
  public:
    using Matrix = TrellisMatrix;
    using Activations = TrellisActivations;
    static constexpr int kStripRows = kSlabRows;
    static constexpr bool kMixesColumns = true;
    static constexpr int64_t kChunkTokens = 256;  // bounds the memory between gate, up and down
    static constexpr int kProductTokens = 256;    // 64 KB on the stack: small stacks have 128 KB

    TrellisCodec(const Isa& isa, int activation_bits)
        : isa_(isa), activation_bits_(activation_bits) {}

    const Isa& isa() const { return isa_; }
    int activation_bits() const { return activation_bits_; }
    static int panel_tokens() { return kProductTokens; }

    static int64_t strips(const Matrix& w) { return w.slabs(); }
    inline void multiply(const Matrix& w, int64_t slab, const Activations& activations, size_t i,
                         const Panel& panel, float* out) const;
    void glu(const MoepressGate& gate, float* g, float* up, int n) const {
        isa_.glu(gate, g, up, n);
    }

    static int64_t linear_grain(int64_t slabs, int threads) {
        return grain_for(slabs, threads, 16);
    }
    static int64_t gate_up_grain(int64_t items, int threads) {
        return grain_for(items, threads, 16);
    }
    static int64_t down_grain(const Matrix& w, int64_t, int threads) {
        return grain_for(w.slabs(), threads, 16);
    }

  private:
    const Isa& isa_;
    int activation_bits_;
};

class TrellisActivations {
  public:
    TrellisActivations(const TrellisCodec& codec, const Routing& routing, int64_t cols, int group,
                       Of of)
        : codec_(codec), cols_(cols), group_(group), tokens_(routing.tokens) {
        if (of == Of::kTokens) {
            scratch_.reset(new float[size_t(tokens_ * cols)]);
            places_ = routing.token.data();
        } else {
            each_.resize(size_t(routing.pairs()));
            std::iota(each_.begin(), each_.end(), 0);
            places_ = each_.data();
        }
        const int64_t rows = of == Of::kTokens ? tokens_ : routing.pairs(), groups = cols / group;
        codes_.reset(new int16_t[size_t(rows * cols)]);
        scale_.reset(new float[size_t(rows * groups)]);
        sum_.reset(new int32_t[size_t(rows * groups)]);
        crossed_.reset(new int32_t[size_t(rows * groups)]);
        if (codec.activation_bits() == 8) bytes_.reset(new int8_t[size_t(rows * cols)]);
    }

    int64_t items() const { return tokens_; }

    void fill(int64_t item, const float* x) {
        float* row = scratch_.get() + item * cols_;
        std::memcpy(row, x + item * cols_, size_t(cols_) * sizeof(float));
        fill_row(item, row);
    }

    void fill_row(int64_t place, float* row) {
        codec_.isa().trellis_rotate(row, cols_);
        codec_.isa().trellis_round(row, cols_, group_, codec_.activation_bits(), all(), place);
    }

    TrellisPanel panel(const Panel& panel) const {
        return {all(), places_ + panel.first, panel.count};
    }

  private:
    TrellisTokens all() const {
        return {codes_.get(), scale_.get(), sum_.get(), bytes_.get(), crossed_.get()};
    }

    const TrellisCodec& codec_;
    int64_t cols_;
    int group_;
    int64_t tokens_;
    std::unique_ptr<float[]> scratch_;  // [tokens][cols], for rotating the inputs
    std::vector<int64_t> each_;         // 0, 1, 2, ...: the places of pairs
    const int64_t* places_;             // [pairs], of their activations
    std::unique_ptr<int16_t[]> codes_;
    std::unique_ptr<float[]> scale_;
    std::unique_ptr<int32_t[]> sum_, crossed_;
    std::unique_ptr<int8_t[]> bytes_;
};

inline void TrellisCodec::multiply(const Matrix& w, int64_t slab, const Activations& activations,
                                   size_t, const Panel& panel, float* out) const {
    const auto& dot = isa_.trellis_dot[activation_bits_ / 8 - 1];
    dot[w.bits](w.slab_above(slab), w.slab(slab), w.cols, w.group,
                activations.panel(panel), w.scales(slab), out);
}

}  // namespace moepress
