// Small operations of decoding: norms, sums, rotary embeddings, a token into a cache.

#include "small.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "isa.h"
#include "moepress.h"
#include "number_kinds.h"
#include "threads.h"

namespace moepress {
namespace {

constexpr int64_t kAlone = int64_t(1) << 16;  // numbers up to which one thread works

// The product of sizes; -1 if one is below 0 or the product is out of range.
int64_t product_of(std::initializer_list<int64_t> sizes) {
    int64_t product = 1;
    for (const int64_t size : sizes)
        if (size < 0 || __builtin_mul_overflow(product, size, &product)) return -1;
    return product;
}

// work(first, last) for ranges of `items`, which have `numbers` together.
template <class Work>
void share(int threads, int64_t items, int64_t numbers, Work work) {
    if (numbers <= kAlone) return work(int64_t(0), items);
    parallel(threads, items, grain_for(items, threads, items), work);
}

// `count` rows of `bytes`, of `heads` heads of each batch. All strides are in bytes.
struct Rows {
    uint8_t* to;
    int64_t to_batch, to_head;
    const uint8_t* from;
    int64_t from_batch, from_head, bytes;

    void copy(int64_t batches, int64_t heads) const {
        if (bytes == 0) return;
        for (int64_t b = 0; b < batches; ++b)
            for (int64_t h = 0; h < heads; ++h)
                std::memmove(to + b * to_batch + h * to_head, from + b * from_batch + h * from_head,
                             size_t(bytes));
    }
};

}  // namespace
}  // namespace moepress

int32_t moepress_rms_norm(const void* x, int32_t x_numbers, int64_t outer, int64_t outer_stride,
                          int64_t rows, int64_t row_stride, int64_t size, const void* weight,
                          int32_t weight_numbers, float epsilon, int32_t formula, int32_t threads,
                          void* y) {
    using namespace moepress;
    const int64_t all = product_of({outer, rows, size});
    if (all < 0 || threads < 1 || formula < 0 || formula >= kFormulas) return kBadShape;
    if (!is_kind(x_numbers) || (weight != nullptr && !is_kind(weight_numbers))) return kBadShape;
    if (all == 0) return kOk;
    const NormCall call{x, x_numbers, rows, outer_stride, row_stride, size, weight, weight_numbers,
                        epsilon, NormFormula(formula), y};
    const NormRows norm_rows = isa_in_use()->norm_rows;
    share(threads, outer * rows, all,
          [&](int64_t first, int64_t last) { norm_rows(call, first, last); });
    return kOk;
}

int32_t moepress_add(const void* a, const void* b, int64_t n, int32_t numbers, void* y) {
    if (n < 0 || !moepress::is_kind(numbers)) return kBadShape;
    moepress::isa_in_use()->add(a, b, n, numbers, y);
    return kOk;
}

int32_t moepress_rotary(const void* q, int64_t q_batch, int64_t q_head, int64_t q_token,
                        int64_t q_heads, const void* k, int64_t k_batch, int64_t k_head,
                        int64_t k_token, int64_t k_heads, int32_t numbers, const void* cos,
                        const void* sin, int64_t angle_batch, int64_t angle_token,
                        int32_t angle_numbers, int64_t batches, int64_t tokens, int64_t size,
                        int64_t rotated, int32_t turn, int32_t threads, void* q_out,
                        int64_t q_out_batch, int64_t q_out_head, int64_t q_out_token, void* k_out,
                        int64_t k_out_batch, int64_t k_out_head, int64_t k_out_token) {
    using namespace moepress;
    const int64_t of_q = product_of({batches, tokens, q_heads, size});
    const int64_t of_k = product_of({batches, tokens, k_heads, size});
    if (of_q < 0 || of_k < 0 || threads < 1) return kBadShape;
    if (rotated < 0 || rotated > size || rotated % 2 != 0) return kBadShape;
    const int32_t all_bits = kNeighboursIn | kNeighboursOut | kOfPairs | kWide;
    const bool wide = turn & kWide;
    if (!is_kind(numbers) || !is_kind(angle_numbers) || (turn & ~all_bits)) return kBadShape;
    if (!wide && angle_numbers != numbers) return kBadShape;
    if (of_q == 0 && of_k == 0) return kOk;
    const RotaryCall call{{{q, q_batch, q_head, q_token, q_heads, q_out, q_out_batch, q_out_head,
                            q_out_token},
                           {k, k_batch, k_head, k_token, k_heads, k_out, k_out_batch, k_out_head,
                            k_out_token}},
                          numbers, cos, sin, angle_batch, angle_token, angle_numbers, tokens, size,
                          rotated, bool(turn & kNeighboursIn), bool(turn & kNeighboursOut),
                          bool(turn & kOfPairs), wide};
    const TurnTokens turn_tokens = isa_in_use()->turn_tokens;
    share(threads, batches * tokens, std::max(of_q, of_k),
          [&](int64_t first, int64_t last) { turn_tokens(call, first, last); });
    return kOk;
}

int32_t moepress_cache_write(void* keys, int64_t keys_batch, int64_t keys_head,
                             int64_t keys_position, const void* key, int64_t key_batch,
                             int64_t key_head, int64_t key_size, int32_t key_bytes, void* values,
                             int64_t values_batch, int64_t values_head, int64_t values_position,
                             const void* value, int64_t value_batch, int64_t value_head,
                             int64_t value_size, int32_t value_bytes, int64_t batches,
                             int64_t heads, int64_t room, const int64_t* position) {
    using namespace moepress;
    const auto rows = [&](void* to, int64_t batch, int64_t head, int64_t step, const void* from,
                          int64_t from_batch, int64_t from_head, int64_t size, int64_t bytes) {
        return Rows{static_cast<uint8_t*>(to) + *position * step * bytes, batch * bytes,
                    head * bytes, static_cast<const uint8_t*>(from), from_batch * bytes,
                    from_head * bytes, size * bytes};
    };
    if (room < 0 || key_bytes < 1 || value_bytes < 1 ||
        product_of({batches, heads, key_size, key_bytes}) < 0 ||
        product_of({batches, heads, value_size, value_bytes}) < 0)
        return kBadShape;
    if (*position < 0 || *position >= room) return kBadPosition;
    rows(keys, keys_batch, keys_head, keys_position, key, key_batch, key_head, key_size, key_bytes)
        .copy(batches, heads);
    rows(values, values_batch, values_head, values_position, value, value_batch, value_head,
         value_size, value_bytes)
        .copy(batches, heads);
    return kOk;
}
