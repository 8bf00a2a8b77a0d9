// Linears and experts of trellis codes: rotate and round the inputs, then slabs of 64 rows.
//
// experts   1. sort the chosen (token, expert) pairs by expert; rotate and round the tokens
//           2. an item is a slab of one expert's gate and up: its products for all its tokens
//           3. an item is a pair: activation, and rotation and rounding for `down`
//           4. an item is a slab of output rows: down for all experts, weighted, summed in the order
//              of the experts. No two threads write the same output.
//
// At most kTokens tokens at a time, so that what is kept between 2 and 4 stays bounded.

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <vector>

#include "experts.h"
#include "isa.h"
#include "moepress.h"
#include "threads.h"

namespace moepress {
namespace {

constexpr int64_t kTokens = 256;
constexpr int64_t kMost = int64_t(1) << 29;  // rows or columns

struct Trellis {
    const uint8_t* bytes;
    int64_t rows, cols;
    int bits, group;

    bool exists() const {
        return bits >= 1 && bits <= 4 && (group == 32 || group == 64 || group == 128) && rows > 0 &&
               rows <= 2 * kMost && cols > 0 && cols <= kMost && cols % group == 0;
    }
    int64_t slabs() const { return (rows + kSlabRows - 1) / kSlabRows; }
    int64_t slab_bytes() const { return kSlabRows / 8 * cols * bits; }
    int64_t nbytes() const { return slabs() * (slab_bytes() + 2 * kSlabRows); }

    // out [tokens][64] = rows of slab s times tokens first .. first + tokens - 1
    void dot(const Isa& isa, int64_t s, const Rounded& x, int64_t first, int64_t tokens,
             float* out) const {
        const uint8_t* above = bytes + (s > 0 ? s - 1 : slabs() - 1) * slab_bytes();
        const uint8_t* scales = bytes + slabs() * slab_bytes() + 2 * kSlabRows * s;
        isa.slab_dot[bits - 1](above, bytes + s * slab_bytes(), cols, group, x, first, tokens,
                               scales, out);
    }
};

// Memory for rounded activations.
struct Activations {
    std::unique_ptr<int16_t[]> codes;
    std::unique_ptr<float[]> scale;
    std::unique_ptr<int32_t[]> sum;

    Activations(int64_t tokens, int64_t cols, int group)
        : codes(new int16_t[size_t(tokens * cols)]),
          scale(new float[size_t(tokens * (cols / group))]),
          sum(new int32_t[size_t(tokens * (cols / group))]) {}
    Rounded view() const { return {codes.get(), scale.get(), sum.get()}; }
};

int64_t grain_for(int64_t items, int threads) {
    return std::clamp<int64_t>(items / (8 * int64_t(threads)), 1, 16);
}

// Rotate and round rows [count][cols] that start `stride` apart, which are overwritten.
void rotate_rows(const Isa& isa, float* rows, int64_t stride, int64_t count, int64_t cols, int group,
                 int threads, const Rounded& out) {
    parallel(threads, count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            isa.rotate(rows + i * stride, cols);
            isa.round_token(rows + i * stride, cols, group, out, i);
        }
    });
}

void do_linear(const float* x, int64_t tokens, const Trellis& w, const float* bias, int threads,
               float* y) {
    const Isa& isa = *isa_in_use();
    const int64_t most = std::min(tokens, kTokens);
    const Activations memory(most, w.cols, w.group);
    const std::unique_ptr<float[]> rows(new float[size_t(most * w.cols)]);
    for (int64_t first = 0; first < tokens; first += kTokens) {
        const int64_t here = std::min(kTokens, tokens - first);
        std::memcpy(rows.get(), x + first * w.cols, size_t(here * w.cols) * sizeof(float));
        rotate_rows(isa, rows.get(), w.cols, here, w.cols, w.group, threads, memory.view());
        parallel(threads, w.slabs(), grain_for(w.slabs(), threads), [&](int64_t begin, int64_t end) {
            alignas(64) float product[kTokens * kSlabRows];
            for (int64_t s = begin; s < end; ++s) {
                w.dot(isa, s, memory.view(), 0, here, product);
                const int64_t row = s * kSlabRows, count = std::min<int64_t>(kSlabRows, w.rows - row);
                for (int64_t t = 0; t < here; ++t)
                    for (int64_t r = 0; r < count; ++r)
                        y[(first + t) * w.rows + row + r] =
                            product[t * kSlabRows + r] + (bias ? bias[row + r] : 0);
            }
        });
    }
}

struct Slot {  // one chosen expert of one token
    int64_t token;
    float weight;
};

// The experts of one call.
struct Block {
    std::vector<Trellis> gate_up, down;
    int64_t hidden, intermediate;
    int activation;

    int64_t experts() const { return int64_t(gate_up.size()); }
};

// y [tokens][hidden] += the experts of at most kTokens tokens
void add_experts(const float* x, int64_t tokens, const int64_t* index, const float* weight, int64_t k,
                 const Block& b, int threads, float* y) {
    const Isa& isa = *isa_in_use();
    std::vector<int64_t> starts(size_t(b.experts()) + 1, 0);  // first slot of each expert
    for (int64_t i = 0; i < tokens * k; ++i)
        if (runs(b.gate_up, index[i])) ++starts[size_t(index[i]) + 1];
    std::vector<int64_t> used;
    for (size_t e = 0; e + 1 < starts.size(); ++e) {
        if (starts[e + 1] > 0) used.push_back(int64_t(e));
        starts[e + 1] += starts[e];
    }
    if (used.empty()) return;
    const int64_t count = starts.back();
    std::vector<Slot> slots(static_cast<size_t>(count));
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t i = 0; i < tokens * k; ++i)
        if (runs(b.gate_up, index[i]))
            slots[size_t(next[size_t(index[i])]++)] = {i / k, weight[i]};

    const int in_group = b.gate_up.front().group, group = b.down.front().group;
    const Activations in(count, b.hidden, in_group), between(count, b.intermediate, group);
    const Activations once(tokens, b.hidden, in_group);
    const std::unique_ptr<float[]> rows(new float[size_t(tokens * b.hidden)]);
    const std::unique_ptr<float[]> inner(new float[size_t(count * 2 * b.intermediate)]);
    std::memcpy(rows.get(), x, size_t(tokens * b.hidden) * sizeof(float));
    rotate_rows(isa, rows.get(), b.hidden, tokens, b.hidden, in_group, threads, once.view());
    const int64_t groups = b.hidden / in_group;
    for (int64_t i = 0; i < count; ++i) {  // in the order of the slots
        const int64_t t = slots[size_t(i)].token;
        std::memcpy(in.codes.get() + i * b.hidden, once.codes.get() + t * b.hidden,
                    size_t(b.hidden) * sizeof(int16_t));
        std::memcpy(in.scale.get() + i * groups, once.scale.get() + t * groups,
                    size_t(groups) * sizeof(float));
        std::memcpy(in.sum.get() + i * groups, once.sum.get() + t * groups,
                    size_t(groups) * sizeof(int32_t));
    }

    const int64_t slabs = b.gate_up.front().slabs();
    const int64_t items = slabs * int64_t(used.size());
    parallel(threads, items, grain_for(items, threads), [&](int64_t begin, int64_t end) {
        alignas(64) float product[kTokens * kSlabRows];
        for (int64_t item = begin; item < end; ++item) {
            const size_t e = size_t(used[size_t(item / slabs)]);
            const Trellis& w = b.gate_up[e];
            const int64_t s = item % slabs, row = s * kSlabRows;
            const size_t size = size_t(std::min<int64_t>(kSlabRows, w.rows - row)) * sizeof(float);
            for (int64_t first = starts[e]; first < starts[e + 1]; first += kTokens) {
                const int64_t here = std::min(kTokens, starts[e + 1] - first);
                w.dot(isa, s, in.view(), first, here, product);
                for (int64_t t = 0; t < here; ++t)
                    std::memcpy(inner.get() + (first + t) * w.rows + row, product + t * kSlabRows,
                                size);
            }
        }
    });

    parallel(threads, count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            float* gate = inner.get() + i * 2 * b.intermediate;
            isa.glu(b.activation, gate, gate + b.intermediate, int(b.intermediate));
            isa.rotate(gate, b.intermediate);
            isa.round_token(gate, b.intermediate, group, between.view(), i);
        }
    });

    const int64_t outputs = b.down.front().slabs();
    parallel(threads, outputs, grain_for(outputs, threads), [&](int64_t begin, int64_t end) {
        alignas(64) float product[kTokens * kSlabRows];
        for (const int64_t e : used)
            for (int64_t s = begin; s < end; ++s) {
                const Trellis& w = b.down[size_t(e)];
                const int64_t row = s * kSlabRows, size = std::min<int64_t>(kSlabRows, w.rows - row);
                const int64_t last = starts[size_t(e) + 1];
                for (int64_t first = starts[size_t(e)]; first < last; first += kTokens) {
                    const int64_t here = std::min(kTokens, last - first);
                    w.dot(isa, s, between.view(), first, here, product);
                    for (int64_t t = 0; t < here; ++t) {
                        const Slot& slot = slots[size_t(first + t)];
                        float* to = y + slot.token * b.hidden + row;
                        for (int64_t r = 0; r < size; ++r)
                            to[r] += slot.weight * product[t * kSlabRows + r];
                    }
                }
            }
    });
}

}  // namespace
}  // namespace moepress

using namespace moepress;

int32_t moepress_trellis_linear(const float* x, int64_t tokens, int64_t cols, const uint8_t* packed,
                                int64_t packed_bytes, int64_t rows, int32_t bits, int32_t group,
                                const float* bias, int32_t threads, float* y) {
    try {
        const Trellis w{packed, rows, cols, bits, group};
        if (!w.exists()) return kBadCodec;
        if (w.nbytes() != packed_bytes) return kBadBytes;
        if (tokens < 0 || threads < 1) return kBadShape;
        if (tokens > 0) do_linear(x, tokens, w, bias, threads, y);
        return kOk;
    } catch (const std::exception&) {
        return kNoMemory;
    }
}

int32_t moepress_trellis_experts(const float* x, int64_t tokens, int64_t hidden,
                                 const int64_t* index, const float* weight, int64_t k,
                                 const uint8_t* gate_up, int64_t gate_up_bytes,
                                 const int64_t* gate_up_table, int32_t gate_up_group,
                                 const uint8_t* down, int64_t down_bytes, const int64_t* down_table,
                                 int32_t down_group, int64_t experts, int64_t intermediate,
                                 int32_t activation, int32_t threads, float* y) {
    try {
        if (tokens < 0 || k < 0 || experts < 0 || threads < 1) return kBadShape;
        if (hidden < 1 || hidden > kMost || intermediate < 1 || intermediate > kMost)
            return kBadShape;
        if (activation < 0 || activation >= kActivations) return kBadActivation;
        Block b{{}, {}, hidden, intermediate, activation};
        Result result = read_table(gate_up, gate_up_bytes, gate_up_table, experts, 2 * intermediate,
                                   hidden, gate_up_group, b.gate_up);
        if (result != kOk) return result;
        result = read_table(down, down_bytes, down_table, experts, hidden, intermediate, down_group,
                            b.down);
        if (result != kOk) return result;
        if (!both_or_neither(b.gate_up, b.down)) return kBadCodec;
        std::memset(y, 0, size_t(tokens * hidden) * sizeof(float));
        for (int64_t first = 0; first < tokens; first += kTokens)
            add_experts(x + first * hidden, std::min(kTokens, tokens - first), index + first * k,
                        weight + first * k, k, b, threads, y + first * hidden);
        return kOk;
    } catch (const std::exception&) {
        return kNoMemory;
    }
}
