// The three operations: checks, the plan of the work, and who does which part of it.
//
// linear     quantize the tokens into panels | for every block of 16 rows: dot with every panel
// experts    1. sort the chosen (token, expert) pairs by expert, cut each expert's into panels
//            2. quantize the tokens into the panels
//            3. an item is an expert and a group of its intermediate columns: the blocks of gate
//               and of up that make them, activation, and quantization again for `down`
//            4. an item is a run of output rows: down for all experts, weighted, summed in the
//               order of the experts. No two threads write the same output, so that results do not
//               depend on the number of threads.
//
// With 16-bit activations a token is two tokens, its high and its low codes, whose products are
// added (isa.h, Quantize).

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <vector>

#include "experts.h"
#include "isa.h"
#include "matrix.h"
#include "moepress.h"
#include "threads.h"

namespace moepress {

namespace {

// Rows (tokens times planes) whose intermediate values a thread keeps at a time, on its stack (64 KB): small stacks have
// 128 KB. Their activations and one block's codes fit the second-level cache.
constexpr int kChunkRows = 64;

int place_of(const int (&list)[5], int value) {
    return int(std::find(list, list + 5, value) - list);
}

int width_for(int64_t rows) {
    return *std::find_if(std::begin(kWidths), std::end(kWidths) - 1,
                         [&](int width) { return width >= rows; });
}

BlockDot dot_for(const Isa& isa, const Matrix& matrix, int width) {
    return isa.dot[place_of(kBits, matrix.bits)][place_of(kWidths, width)];
}

// At most 16 rows: some tokens of one expert, each `planes` rows.
struct Part {
    int64_t first;  // first token, a place in the list of tokens
    int tokens;
    int width;  // of the panel, at least tokens * planes
    int expert;
};

// Cut `tokens` tokens into parts.
void cut(const Isa& isa, int64_t first, int64_t tokens, int planes, int expert,
         std::vector<Part>& parts) {
    const int most = isa.max_width / planes;
    for (int64_t done = 0; done < tokens; done += most) {
        const int here = int(std::min<int64_t>(most, tokens - done));
        parts.push_back({first + done, here, width_for(here * planes), expert});
    }
}

// The quantized activations of some parts, one panel each, of `cols` columns; their memory.
class Activations {
  public:
    Activations(int64_t cols, int group, int planes, const Part* parts, size_t count)
        : group_(group) {
        const int64_t groups = cols / group;
        int64_t rows = 0;
        for (size_t i = 0; i < count; ++i) rows += parts[i].width;
        codes_.reset(new int8_t[size_t(rows * cols)]);
        sides_.reset(new float[size_t(2 * rows * groups)]);
        int8_t* codes = codes_.get();
        float* side = sides_.get();
        for (size_t i = 0; i < count; ++i) {
            const int64_t width = parts[i].width;
            panels_.push_back({codes, side, side + width * groups, int(width)});
            if (parts[i].tokens * planes < width) {  // rows that no token fills
                std::memset(codes, 0, size_t(width * cols));
                std::memset(side, 0, size_t(2 * width * groups) * sizeof(float));
            }
            codes += width * cols;
            side += 2 * width * groups;
        }
    }
    // A single panel stands for all.
    const Panel& operator[](size_t i) const { return panels_[panels_.size() == 1 ? 0 : i]; }
    int group() const { return group_; }

  private:
    int group_;
    std::unique_ptr<int8_t[]> codes_;
    std::unique_ptr<float[]> sides_;
    std::vector<Panel> panels_;
};

// out [width][16]: add the low plane's rows to the high plane's, leaving one row for each token.
void join_planes(float* out, int tokens, int planes) {
    if (planes == 1) return;
    for (int t = 0; t < tokens; ++t)
        for (int r = 0; r < kRows; ++r) out[16 * t + r] = out[32 * t + r] + out[32 * t + 16 + r];
}

int64_t grain_for(int64_t items, int threads, int64_t most) {
    return std::clamp<int64_t>(items / (8 * int64_t(threads)), 1, most);
}

// Blocks that a thread takes at a time where few tokens make reading the cost: runs of some 100 KB,
// since a run starts without what is prefetched later; but 8 runs for each thread are enough.
int64_t streaming_grain(int64_t blocks, int64_t block_bytes, int threads) {
    const int64_t runs = std::clamp<int64_t>(blocks * block_bytes / (threads * 100'000), 1, 8);
    return (blocks + threads * runs - 1) / (threads * runs);
}

void do_linear(const float* x, int64_t tokens, const Matrix& w, const float* bias, int bits,
               int threads, float* y) {
    const Isa& isa = *isa_in_use();
    const int planes = bits / 8;
    std::vector<Part> parts;
    cut(isa, 0, tokens, planes, 0, parts);
    const Activations acts(w.cols, w.group, planes, parts.data(), parts.size());
    parallel(threads, int64_t(parts.size()), 1, [&](int64_t begin, int64_t end) {
        for (size_t i = size_t(begin); i < size_t(end); ++i)
            for (int t = 0; t < parts[i].tokens; ++t)
                isa.quantize(x + (parts[i].first + t) * w.cols, w.cols, w.group, bits, acts[i],
                                t * planes);
    });
    const int64_t blocks = w.blocks();
    parallel(threads, blocks, grain_for(blocks, threads, 8), [&](int64_t begin, int64_t end) {
        alignas(64) float product[kMaxWidth * kRows];
        for (size_t i = 0; i < parts.size(); ++i) {
            const BlockDot dot = dot_for(isa, w, parts[i].width);
            for (int64_t block = begin; block < end; ++block) {
                dot(w.block(block), w.cols, w.group, acts[i], product);
                join_planes(product, parts[i].tokens, planes);
                const int64_t row = block * kRows;
                const int rows = int(std::min<int64_t>(kRows, w.rows - row));
                for (int t = 0; t < parts[i].tokens; ++t) {
                    float* to = y + (parts[i].first + t) * w.rows + row;
                    for (int r = 0; r < rows; ++r)
                        to[r] = product[16 * t + r] + (bias ? bias[row + r] : 0);
                }
            }
        }
    });
}

struct Slot {  // one chosen expert of one token
    int64_t token;
    float weight;
};

// What the experts of one call share.
struct Block {
    const Isa* isa;
    std::vector<Matrix> gate_up, down;  // by expert
    std::vector<Slot> slots;            // sorted by expert
    std::vector<int64_t> starts;        // [E + 1], first slot of each expert
    std::vector<Part> parts;            // in the order of slots
    std::vector<size_t> part_starts;    // [E + 1], first part of each expert
    int64_t hidden, intermediate;
    int activation, planes;
};

void sort_slots(const int64_t* index, const float* weight, int64_t tokens, int64_t k,
                int64_t experts, Block& b) {
    b.starts.assign(size_t(experts) + 1, 0);
    for (int64_t i = 0; i < tokens * k; ++i)
        if (runs(b.gate_up, index[i])) ++b.starts[size_t(index[i]) + 1];
    for (size_t e = 0; e < size_t(experts); ++e) b.starts[e + 1] += b.starts[e];
    b.slots.resize(size_t(b.starts.back()));
    std::vector<int64_t> next(b.starts.begin(), b.starts.end() - 1);
    for (int64_t i = 0; i < tokens * k; ++i)
        if (runs(b.gate_up, index[i]))
            b.slots[size_t(next[size_t(index[i])]++)] = {i / k, weight[i]};
    b.part_starts.assign(1, 0);
    for (int64_t e = 0; e < experts; ++e) {
        const int64_t first = b.starts[size_t(e)], last = b.starts[size_t(e) + 1];
        cut(*b.isa, first, last - first, b.planes, int(e), b.parts);
        b.part_starts.push_back(b.parts.size());
    }
}

// Group `j` of the intermediate columns of one expert, for its parts first .. last-1.
void intermediate_group(const Block& b, int64_t j, size_t first, size_t last,
                        const Activations& in, const Activations& out) {
    const Matrix& w = b.gate_up[size_t(b.parts[first].expert)];
    const int group = out.group();
    const int per_part = b.isa->max_width / b.planes;
    alignas(64) float gate[kChunkRows * kMaxGroup];  // [tokens][group]
    alignas(64) float up[kChunkRows * kMaxGroup];
    alignas(64) float product[kMaxWidth * kRows];
    for (int block = 0; block < group / kRows; ++block)
        for (size_t i = first; i < last; ++i) {
            const Part& part = b.parts[i];
            const BlockDot dot = dot_for(*b.isa, w, part.width);
            for (float* side : {gate, up}) {
                const int64_t row = (side == gate ? 0 : b.intermediate) + j * group + block * kRows;
                dot(w.block(row / kRows), w.cols, w.group, in[i], product);
                join_planes(product, part.tokens, b.planes);
                float* to = side + (i - first) * size_t(per_part * group) + block * kRows;
                for (int t = 0; t < part.tokens; ++t)
                    std::memcpy(to + t * group, product + 16 * t, kRows * sizeof(float));
            }
        }
    for (size_t i = first; i < last; ++i) {
        const size_t start = (i - first) * size_t(per_part * group);
        const Panel& all = out[i];
        const Panel here = {all.codes + j * group * all.width, all.scale + j * all.width,
                            all.sum + j * all.width, all.width};
        for (int t = 0; t < b.parts[i].tokens; ++t) {
            float* h = gate + start + t * group;
            b.isa->glu(b.activation, h, up + start + t * group, group);
            b.isa->quantize(h, group, group, 8 * b.planes, here, t * b.planes);
        }
    }
}

// Rows of output begin .. end-1, in blocks, of all experts.
void output_blocks(const Block& b, int64_t begin, int64_t end, const Activations& in, float* y) {
    alignas(64) float product[kMaxWidth * kRows];
    for (size_t i = 0; i < b.parts.size(); ++i) {
        const Part& part = b.parts[i];
        const Matrix& w = b.down[size_t(part.expert)];
        const BlockDot dot = dot_for(*b.isa, w, part.width);
        for (int64_t block = begin; block < end; ++block) {
            dot(w.block(block), w.cols, w.group, in[i], product);
            join_planes(product, part.tokens, b.planes);
            for (int t = 0; t < part.tokens; ++t) {
                const Slot& slot = b.slots[size_t(part.first + t)];
                float* to = y + slot.token * b.hidden + block * kRows;
                for (int r = 0; r < kRows; ++r) to[r] += slot.weight * product[16 * t + r];
            }
        }
    }
}

// Work for one thread: a group of intermediate columns, for some parts.
struct Item {
    int64_t group;
    size_t first, last;  // parts first .. last-1 of one expert
};

void do_experts(const float* x, int64_t tokens, const Block& b, int gate_up_group, int down_group,
                int threads, float* y) {
    if (b.parts.empty()) return void(std::memset(y, 0, size_t(tokens * b.hidden) * sizeof(float)));
    // One token that chooses every expert once: one panel serves all.
    const bool shared = tokens == 1 && std::all_of(b.parts.begin(), b.parts.end(),
                                                   [](const Part& part) { return part.tokens == 1; });
    const size_t distinct = shared ? 1 : b.parts.size();
    const Activations in(b.hidden, gate_up_group, b.planes, b.parts.data(), distinct);
    const Activations between(b.intermediate, down_group, b.planes, b.parts.data(), b.parts.size());
    std::vector<Item> items;
    for (size_t e = 0; e + 1 < b.part_starts.size(); ++e)
        for (size_t first = b.part_starts[e]; first < b.part_starts[e + 1];) {
            const size_t most = size_t(kChunkRows / b.isa->max_width);
            const size_t last = std::min(first + most, b.part_starts[e + 1]);
            for (int64_t j = 0; j < b.intermediate / down_group; ++j)
                items.push_back({j, first, last});
            first = last;
        }
    std::memset(y, 0, size_t(tokens * b.hidden) * sizeof(float));  // last: a failure leaves y alone
    parallel(threads, int64_t(distinct), 1, [&](int64_t begin, int64_t end) {
        for (size_t i = size_t(begin); i < size_t(end); ++i)
            for (int t = 0; t < b.parts[i].tokens; ++t)
                b.isa->quantize(x + b.slots[size_t(b.parts[i].first + t)].token * b.hidden,
                                b.hidden, gate_up_group, 8 * b.planes, in[i], t * b.planes);
    });

    const int64_t count = int64_t(items.size());
    parallel(threads, count, grain_for(count, threads, 4), [&](int64_t begin, int64_t end) {
        for (size_t i = size_t(begin); i < size_t(end); ++i)
            intermediate_group(b, items[i].group, items[i].first, items[i].last, in, between);
    });

    const int64_t blocks = b.hidden / kRows;
    const int64_t block_bytes = b.down[size_t(b.parts.front().expert)].block_bytes();
    const int64_t grain = tokens <= kMaxWidth ? streaming_grain(blocks, block_bytes, threads)
                                              : grain_for(blocks, threads, 4);
    parallel(threads, blocks, grain, [&](int64_t begin, int64_t end) {
        output_blocks(b, begin, end, between, y);
    });
}

constexpr int64_t kMost = int64_t(1) << 29;  // hidden or intermediate columns

template <class Body>
int32_t guarded(Body body) {
    try {
        return body();
    } catch (const std::exception&) {  // std::bad_alloc, or std::length_error of a vector
        return kNoMemory;
    }
}

}  // namespace
}  // namespace moepress

using namespace moepress;

int32_t moepress_linear(const float* x, int64_t tokens, int64_t cols, const uint8_t* packed,
                        int64_t packed_bytes, int64_t rows, int32_t bits, int32_t group,
                        const float* bias, int32_t activation_bits, int32_t threads, float* y) {
    return guarded([&] {
        const Matrix w{packed, rows, cols, bits, group};
        if (!w.exists()) return kBadCodec;
        if (w.nbytes() != packed_bytes) return kBadBytes;
        if (tokens < 0 || threads < 1) return kBadShape;
        if (activation_bits != 8 && activation_bits != 16) return kBadPrecision;
        if (tokens > 0) do_linear(x, tokens, w, bias, activation_bits, threads, y);
        return kOk;
    });
}

int32_t moepress_experts(const float* x, int64_t tokens, int64_t hidden, const int64_t* index,
                         const float* weight, int64_t k, const uint8_t* gate_up,
                         int64_t gate_up_bytes, const int64_t* gate_up_table,
                         int32_t gate_up_group, const uint8_t* down, int64_t down_bytes,
                         const int64_t* down_table, int32_t down_group, int64_t experts,
                         int64_t intermediate, int32_t activation, int32_t activation_bits,
                         int32_t threads, float* y) {
    return guarded([&] {
        if (tokens < 0 || k < 0 || experts < 0 || threads < 1) return kBadShape;
        if (hidden < 1 || hidden > kMost || intermediate < 1 || intermediate > kMost)
            return kBadShape;
        if (activation < 0 || activation >= kActivations) return kBadActivation;
        if (activation_bits != 8 && activation_bits != 16) return kBadPrecision;
        Block b;
        b.isa = isa_in_use();
        b.hidden = hidden;
        b.intermediate = intermediate;
        b.activation = activation;
        b.planes = activation_bits / 8;
        Result result = read_table(gate_up, gate_up_bytes, gate_up_table, experts,
                                   2 * intermediate, hidden, gate_up_group, b.gate_up);
        if (result != kOk) return result;
        result = read_table(down, down_bytes, down_table, experts, hidden, intermediate,
                            down_group, b.down);
        if (result != kOk) return result;
        if (!both_or_neither(b.gate_up, b.down)) return kBadCodec;
        if (tokens == 0) return kOk;
        sort_slots(index, weight, tokens, k, experts, b);
        do_experts(x, tokens, b, gate_up_group, down_group, threads, y);
        return kOk;
    });
}

int32_t moepress_embedding(const int64_t* ids, int64_t n, const uint8_t* packed,
                           int64_t packed_bytes, int64_t rows, int64_t cols, int32_t bits,
                           int32_t group, float* y) {
    const Matrix table{packed, rows, cols, bits, group};
    if (!table.exists()) return kBadCodec;
    if (table.nbytes() != packed_bytes) return kBadBytes;
    for (int64_t i = 0; i < n; ++i)
        if (ids[i] < 0 || ids[i] >= rows) return kBadId;
    for (int64_t i = 0; i < n; ++i) table.row(ids[i], y + i * cols);
    return kOk;
}
