// Attention of few queries over many keys.
//
// Positions are cut into chunks of kAttentionChunk, from the first on, whatever the mask shows.
// An item of work is a chunk of the keys and values of one head: all queries that share them, one
// piece for each few rows. The thread that ends the last chunk of a head puts the parts of its
// queries together, in the order of the chunks. So results depend neither on the number of threads
// nor on their order.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "attention.h"
#include "attention_mask.h"
#include "checks.h"
#include "isa.h"
#include "moepress.h"
#include "threads.h"

using namespace moepress;

namespace {

constexpr int64_t kMost = int64_t(1) << 30;  // of each size, and of the queries
// Products of numbers that are worth a thread: some 10 microseconds.
constexpr double kThreadProducts = 1 << 19;

// Numbers [B][heads][T or S][D], those of a head one after another.
struct Heads {
    const void* at;
    int64_t batch, head, row;  // strides, in numbers
    int64_t width;             // bytes of a number

    const void* find(int64_t b, int64_t h, int64_t r) const {
        return static_cast<const char*>(at) + (b * batch + h * head + r * row) * width;
    }
};

struct Mask {
    const void* at;  // null: none
    int32_t numbers;
    int64_t batch, head, token, position;  // strides, in numbers

    MaskRow row(int64_t b, int64_t h, int64_t t) const {
        if (at == nullptr) return {nullptr, 0, 0};
        const int64_t width = numbers == kMoepressBool ? 1 : numbers == kFloat32 ? 4 : 2;
        const int64_t offset = b * batch + h * head + t * token;
        return {static_cast<const char*>(at) + offset * width, position, numbers};
    }
};

struct Call {
    Heads q, k, v;
    Mask mask;
    int64_t batches, query_heads, heads, tokens, positions;
    int32_t numbers;
    int size;
    float scale;
    char* y;

    int64_t group() const { return query_heads / heads; }
    int64_t rows() const { return group() * tokens; }  // queries that share keys
    int64_t padded() const { return (size + 15) / 16 * 16; }
};

// The queries of a head in an order in which those with one row of the mask follow each other.
struct Order {
    bool by_head, by_token;  // whether the mask differs
    int64_t group, tokens;

    explicit Order(const Call& call)
        : by_head(call.mask.at != nullptr && call.mask.head != 0 && call.group() > 1),
          by_token(call.mask.at != nullptr && call.mask.token != 0 && call.tokens > 1),
          group(call.group()),
          tokens(call.tokens) {}

    int64_t alike() const { return (by_head ? 1 : group) * (by_token ? 1 : tokens); }
    int64_t head(int64_t row) const { return by_token ? row % group : row / tokens; }
    int64_t token(int64_t row) const { return by_token ? row / group : row % tokens; }
};

class Run {
  public:
    explicit Run(const Call& call)
        : call_(call), order_(call), isa_(*isa_in_use()), sets_(call.rows() / order_.alike()) {
        shown_.reserve(size_t(call.batches * call.heads * sets_));
        Positions all{call.positions, 0};
        for (int64_t head = 0; head < call.batches * call.heads; ++head)
            for (int64_t set = 0; set < sets_; ++set) {
                const Positions some = mask_row(head, set).shown(call.positions);
                shown_.push_back(some);
                if (some.empty()) continue;
                const int64_t of_position = (order_.alike() + 4) * call.size;
                products_ += double(some.end - some.first) * double(of_position);
                all = {std::min(all.first, some.first), std::max(all.end, some.end)};
            }
        if (!all.empty()) {
            first_chunk_ = all.first / kAttentionChunk;
            chunks_ = (all.end - 1) / kAttentionChunk + 1 - first_chunk_;
        }
        const int64_t parts = call.batches * call.heads * call.rows() * chunks_;
        sums_.reset(new float[size_t(2 * parts)]);
        memory_.reset(new float[size_t(parts * call.padded() + 16)]);
        void* at = memory_.get();
        size_t space = size_t(parts * call.padded() + 16) * sizeof(float);
        out_ = static_cast<float*>(std::align(64, size_t(parts * call.padded()) * sizeof(float), at,
                                              space));
        left_.reset(new std::atomic<int64_t>[size_t(call.batches * call.heads)]);
        for (int64_t i = 0; i < call.batches * call.heads; ++i) left_[size_t(i)] = chunks_;
    }

    void run(int threads) {
        const int64_t heads = call_.batches * call_.heads;
        if (chunks_ == 0) {
            for (int64_t head = 0; head < heads; ++head) merge(head);
            return;
        }
        threads = int(std::min<double>(threads, 1 + products_ / kThreadProducts));
        parallel(threads, heads * chunks_, 1, [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; ++item) {
                const int64_t head = item / chunks_;
                attend(head, item % chunks_);
                if (left_[size_t(head)].fetch_sub(1, std::memory_order_acq_rel) == 1) merge(head);
            }
        });
    }

  private:
    MaskRow mask_row(int64_t head, int64_t set) const {
        const int64_t row = set * order_.alike();
        return call_.mask.row(head / call_.heads, query_head(head, row), order_.token(row));
    }
    int64_t query_head(int64_t head, int64_t row) const {
        return head % call_.heads * call_.group() + order_.head(row);
    }

    // One chunk of a head of keys: parts number `part` of its queries.
    void attend(int64_t head, int64_t part) const {
        const int64_t b = head / call_.heads, h = head % call_.heads;
        const int64_t beginning = (first_chunk_ + part) * kAttentionChunk;
        int32_t positions[kAttentionChunk + kAttentionBlock];
        float bias[kAttentionChunk];
        AttentionPiece piece{};
        piece.numbers = call_.numbers;
        piece.size = call_.size;
        piece.scale = call_.scale;
        piece.k = call_.k.find(b, h, beginning);
        piece.v = call_.v.find(b, h, beginning);
        piece.k_stride = call_.k.row;
        piece.v_stride = call_.v.row;
        piece.positions = positions;
        piece.out_stride = chunks_ * call_.padded();
        piece.sums_stride = chunks_ * 2;
        for (int64_t set = 0; set < sets_; ++set) {
            const Positions some = shown_[size_t(head * sets_ + set)].meet(
                {beginning, beginning + kAttentionChunk});
            bool adds = false;
            piece.count = some.empty() ? 0
                                       : mask_row(head, set).list(some, beginning, positions, bias,
                                                                  adds);
            piece.bias = adds ? bias : nullptr;
            const int64_t end = (set + 1) * order_.alike();
            for (int64_t row = set * order_.alike(); row < end; row += kAttentionRows) {
                piece.rows = int(std::min<int64_t>(kAttentionRows, end - row));
                const int64_t place = (head * call_.rows() + row) * chunks_ + part;
                piece.out = out_ + place * call_.padded();
                piece.sums = sums_.get() + place * 2;
                if (piece.count == 0) {
                    for (int r = 0; r < piece.rows; ++r) {
                        piece.sums[r * piece.sums_stride] = -INFINITY;
                        piece.sums[r * piece.sums_stride + 1] = 0;
                    }
                    continue;
                }
                for (int r = 0; r < piece.rows; ++r)
                    piece.q[r] =
                        call_.q.find(b, query_head(head, row + r), order_.token(row + r));
                isa_.attend(piece);
            }
        }
    }

    // The results of the queries that share a head of keys.
    void merge(int64_t head) const {
        const int64_t b = head / call_.heads;
        for (int64_t row = 0; row < call_.rows(); ++row) {
            const int64_t place = (head * call_.rows() + row) * chunks_;
            const int64_t to = (b * call_.tokens + order_.token(row)) * call_.query_heads +
                               query_head(head, row);
            isa_.merge_attention({out_ + place * call_.padded(), sums_.get() + place * 2, chunks_,
                                  call_.size, int(call_.padded())},
                                 call_.numbers, call_.y + to * call_.size * call_.q.width);
        }
    }

    const Call& call_;
    const Order order_;
    const Isa& isa_;
    const int64_t sets_;  // of queries with one row of the mask, of each head of keys
    std::vector<Positions> shown_;  // [heads of all batches][sets]
    double products_ = 0;
    int64_t first_chunk_ = 0, chunks_ = 0;
    std::unique_ptr<float[]> sums_, memory_;  // of each query and chunk, as AttentionParts
    float* out_ = nullptr;
    std::unique_ptr<std::atomic<int64_t>[]> left_;  // chunks of each head that are not done
};

}  // namespace

int32_t moepress_attention(const void* q, int64_t q_batch, int64_t q_head, int64_t q_token,
                           const void* k, int64_t k_batch, int64_t k_head, int64_t k_position,
                           const void* v, int64_t v_batch, int64_t v_head, int64_t v_position,
                           const void* mask, int32_t mask_numbers, int64_t mask_batch,
                           int64_t mask_head, int64_t mask_token, int64_t mask_position,
                           int64_t batches, int64_t query_heads, int64_t heads, int64_t tokens,
                           int64_t positions, int64_t size, float scale, int32_t numbers,
                           int32_t threads, void* y) {
    for (const int64_t n : {batches, query_heads, heads, tokens, positions})
        if (n < 0 || n >= kMost) return kBadShape;
    if (size < 1 || size > kAttentionSize || threads < 1) return kBadShape;
    if (heads == 0 || query_heads % heads != 0) return kBadShape;
    if (!moepress::is_kind(numbers)) return kBadShape;
    if (mask_numbers < kFloat32 || mask_numbers > kMoepressBool) return kBadShape;
    if (batches * query_heads >= kMost || batches * query_heads * tokens >= kMost) return kBadShape;
    if (batches * query_heads * tokens == 0) return kOk;
    const int64_t width = numbers == kFloat32 ? 4 : 2;
    const Call call{{q, q_batch, q_head, q_token, width},
                    {k, k_batch, k_head, k_position, width},
                    {v, v_batch, v_head, v_position, width},
                    {mask, mask_numbers, mask_batch, mask_head, mask_token, mask_position},
                    batches, query_heads, heads, tokens, positions,
                    numbers, int(size), scale, static_cast<char*>(y)};
    return guarded([&] {
        Run(call).run(threads);
        return kOk;
    });
}
