// Attention of some queries over one chunk of positions, and the chunks' results together
// (attention.h). Scores and sums are float.
//
// Queries that share keys are rows of one block: a key is widened once for `Vectors::rows` of them.
// In a block of scores, registers hold parts of D, and `Vectors::totals` adds their numbers up. Its
// results lie together: scores, and the weights made from them, are [position][row].
#pragma once

#include <cmath>
#include <cstdint>

#include "attention.h"
#include "moepress.h"
#include "number_kinds.h"
#include "vectors.h"

namespace moepress {
namespace {

template <class V>
struct Attention {
    using Float = typename V::Float;
    using Word = typename V::Word;
    static constexpr int width = V::width;

    // e^x for x <= 0, or NaN, within 2 units in the last place; 0 below -86. The polynomial is that
    // of the Cephes library.
    static Float exponential(Float x) {
        const Float round = V::splat(12582912.0f);  // 1.5 * 2^23: the last place has the value 1
        const Float sum = V::mul_add(x, V::splat(1.44269504f), round);
        const Float n = sum - round;
        Float r = V::mul_add(n, V::splat(-0.693359375f), x);
        r = V::mul_add(n, V::splat(2.12194440e-4f), r);
        Float p = V::splat(1.9875691500e-4f);
        p = V::mul_add(p, r, V::splat(1.3981999507e-3f));
        p = V::mul_add(p, r, V::splat(8.3334519073e-3f));
        p = V::mul_add(p, r, V::splat(4.1665795894e-2f));
        p = V::mul_add(p, r, V::splat(1.6666665459e-1f));
        p = V::mul_add(p, r, V::splat(5.0000001201e-1f));
        p = V::mul_add(p, r * r, r) + V::splat(1);
        const Float power = (Float)((Word)p + ((Word)sum << 23));
        const Float kept = x < V::splat(-86) ? V::splat(0) : power;
        return x == x ? kept : x;
    }
    static Float larger(Float a, Float b) { return a > b ? a : b; }  // b if one is NaN

    // Rows first .. first + R - 1 of a piece; those behind its last row are computed and dropped.
    template <class Number, int R>
    struct Block {
        static constexpr int positions = V::sums / R;  // that are multiplied together
        static_assert(V::sums % R == 0 && V::sums % width == 0 && width % R == 0);
        static_assert(positions <= kAttentionBlock);

        const AttentionPiece& piece;
        const int first, rows;
        alignas(64) float q[R * (kAttentionSize + width)];  // [D / width][R][width], scaled
        // [position][R], first scores, then weights
        alignas(64) float weights[R * (kAttentionChunk + kAttentionBlock) + width];

        Block(const AttentionPiece& piece, int first, int rows)
            : piece(piece), first(first), rows(rows) {}

        void run() {
            for (int r = 0; r < R; ++r) load_query(r);
            for (int j = 0; j < piece.count; j += positions) score(j);
            if (piece.bias != nullptr)
                for (int j = 0; j < piece.count; ++j)
                    for (int r = 0; r < R; ++r) weights[j * R + r] += piece.bias[j];
            weigh();
            constexpr int most = V::sums / R;
            int at = 0;
            const int whole = piece.size / width;
            if constexpr (most >= 8)
                for (; at + 8 <= whole; at += 8) add_values<8>(at);
            if constexpr (most >= 4)
                for (; at + 4 <= whole; at += 4) add_values<4>(at);
            if constexpr (most >= 2)
                for (; at + 2 <= whole; at += 2) add_values<2>(at);
            for (; at < whole; ++at) add_values<1>(at);
            if (piece.size % width) add_values<1, true>(whole);
        }

        void load_query(int r) {
            const int whole = piece.size / width, rest = piece.size % width;
            const Number* from = nullptr;
            if (r < rows) from = static_cast<const Number*>(piece.q[first + r]);
            const Float scale = V::splat(piece.scale);
            for (int i = 0; i < whole + (rest > 0); ++i) {
                Float x = V::splat(0);
                if (from != nullptr)
                    x = i < whole ? V::widen(from + i * width)
                                  : V::widen_some(from + i * width, rest);
                V::store(q + (i * R + r) * width, x * scale);
            }
        }

        // The scores of some positions.
        void score(int j) {
            const int whole = piece.size / width, rest = piece.size % width;
            const Number* key[positions];
#pragma GCC unroll 16
            for (int p = 0; p < positions; ++p)
                key[p] = static_cast<const Number*>(piece.k) +
                         piece.positions[j + p] * piece.k_stride;
            Float sum[V::sums] = {};
            for (int i = 0; i < whole; ++i)
                multiply(sum, q + i * R * width,
                         [&](int p) { return V::widen(key[p] + i * width); });
            if (rest)
                multiply(sum, q + whole * R * width,
                         [&](int p) { return V::widen_some(key[p] + whole * width, rest); });
#pragma GCC unroll 16
            for (int i = 0; i < V::sums; i += width)
                V::store(weights + j * R + i, V::totals(sum + i));
        }

        // Each operand is loaded once.
        template <class Key>
        static void multiply(Float (&sum)[V::sums], const float* query, Key key) {
            if constexpr (R >= positions) {
                Float x[positions];
#pragma GCC unroll 16
                for (int p = 0; p < positions; ++p) x[p] = key(p);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const Float y = V::load(query + r * width);
#pragma GCC unroll 16
                    for (int p = 0; p < positions; ++p)
                        sum[p * R + r] = V::mul_add(y, x[p], sum[p * R + r]);
                }
            } else {
                Float y[R];
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) y[r] = V::load(query + r * width);
#pragma GCC unroll 16
                for (int p = 0; p < positions; ++p) {
                    const Float x = key(p);
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r)
                        sum[p * R + r] = V::mul_add(y[r], x, sum[p * R + r]);
                }
            }
        }

        // Scores become weights.
        void weigh() {
            const int count = piece.count * R, padded = (count + width - 1) / width * width;
            for (int i = count; i < padded; ++i) weights[i] = -INFINITY;
            Float most = V::splat(-INFINITY);
            for (int i = 0; i < padded; i += width) most = larger(V::load(weights + i), most);
            alignas(64) float of[width];  // by place: row i % R
            V::store(of, most);
            float max[R], total[R] = {};
            for (int r = 0; r < R; ++r) {
                max[r] = of[r];
                for (int i = r; i < width; i += R) max[r] = of[i] > max[r] ? of[i] : max[r];
            }
            // Of no number but -inf and NaN: e^-inf is 0, e^NaN is NaN.
            for (int i = 0; i < width; ++i) of[i] = max[i % R] == -INFINITY ? 0 : max[i % R];
            const Float base = V::load(of);
            Float sum = V::splat(0);
            for (int i = 0; i < padded; i += width) {
                const Float weight = exponential(V::load(weights + i) - base);
                V::store(weights + i, weight);
                sum += weight;
            }
            V::store(of, sum);
            for (int i = 0; i < width; ++i) total[i % R] += of[i];
            for (int r = 0; r < rows; ++r) {
                float* to = piece.sums + (first + r) * piece.sums_stride;
                to[0] = max[r];
                to[1] = total[r];
            }
        }

        // Numbers at * width .. (at + C) * width - 1 of the results.
        template <int C, bool some = false>
        void add_values(int at) {
            const Number* values = static_cast<const Number*>(piece.v) + at * width;
            Float sum[R][C] = {};
            for (int j = 0; j < piece.count; ++j) {
                const Number* value = values + piece.positions[j] * piece.v_stride;
                Float x[C];
#pragma GCC unroll 8
                for (int c = 0; c < C; ++c)
                    x[c] = some ? V::widen_some(value, piece.size % width)
                                : V::widen(value + c * width);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const Float weight = V::splat(weights[j * R + r]);
#pragma GCC unroll 8
                    for (int c = 0; c < C; ++c) sum[r][c] = V::mul_add(weight, x[c], sum[r][c]);
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                if (r >= rows) break;
                float* to = piece.out + (first + r) * piece.out_stride + at * width;
#pragma GCC unroll 8
                for (int c = 0; c < C; ++c) V::store(to + c * width, sum[r][c]);
            }
        }
    };

    template <class Number>
    static void attend(const AttentionPiece& piece) {
        for (int i = 0; i < kAttentionBlock - 1; ++i)  // their scores are dropped
            piece.positions[piece.count + i] = piece.positions[piece.count - 1];
        for (int first = 0; first < piece.rows;) {
            const int left = piece.rows - first;
            if (V::rows >= 8 && left > 4)
                first += run<Number, V::rows>(piece, first);
            else if (left > 2)
                first += run<Number, 4>(piece, first);
            else if (left == 2)
                first += run<Number, 2>(piece, first);
            else
                first += run<Number, 1>(piece, first);
        }
    }

    template <class Number, int R>
    static int run(const AttentionPiece& piece, int first) {
        const int rows = piece.rows - first < R ? piece.rows - first : R;
        Block<Number, R>(piece, first, rows).run();
        return rows;
    }

    template <class Number>
    static void merge(const AttentionParts& parts, Number* y) {
        float most = -INFINITY, total = 0;
        for (int64_t i = 0; i < parts.chunks; ++i)
            most = parts.sums[2 * i] > most ? parts.sums[2 * i] : most;
        for (int64_t i = 0; i < parts.chunks; ++i) {
            float& max = parts.sums[2 * i];
            // Of no number but NaN: the sum is NaN.
            const bool one = max == most || max == -INFINITY;
            max = one ? 1 : exponential(V::splat(max - most))[0];
            total += max * parts.sums[2 * i + 1];  // it is a factor now
        }
        const Float inverse = V::splat(total == 0 ? 0 : 1 / total);
        alignas(64) float out[kAttentionSize + width];
        for (int d = 0; d < parts.size; d += width) {
            Float sum = V::splat(0);
            for (int64_t i = 0; i < parts.chunks; ++i)
                if (parts.sums[2 * i + 1] != 0)
                    sum = V::mul_add(V::splat(parts.sums[2 * i]),
                                     V::load(parts.out + i * parts.padded + d), sum);
            V::store(out + d, sum * inverse);
        }
        for (int d = 0; d < parts.size; ++d) narrow_to(out[d], y[d]);
    }
};

inline void attend(const AttentionPiece& piece) {
    using Here = Attention<Vectors>;
    switch (piece.numbers) {
        case kFloat32: return Here::attend<float>(piece);
        case kBfloat16: return Here::attend<Bfloat16>(piece);
        default: return Here::attend<Float16>(piece);
    }
}

inline void merge_attention(const AttentionParts& parts, int32_t numbers, void* y) {
    using Here = Attention<Vectors>;
    switch (numbers) {
        case kFloat32: return Here::merge(parts, static_cast<float*>(y));
        case kBfloat16: return Here::merge(parts, static_cast<Bfloat16*>(y));
        default: return Here::merge(parts, static_cast<Float16*>(y));
    }
}

}  // namespace
}  // namespace moepress
