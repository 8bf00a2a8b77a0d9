// Attention of few tokens, in bfloat16 or float16: one split of the positions, by tensor cores.
//
//   s = q K^T scale + mask      8 or 16 rows (the queries that share keys) x 16 positions of a warp
//   p = exp(s - greatest s)     kept as two 16-bit numbers, so that 16 bits of it count
//   y = p V
//
// A product of 16 columns does not ask which columns they are, if both factors agree. So a thread
// loads 16 neighbouring bytes of keys and values straight into the registers of the products: with
// g = lane / 4 and t = lane % 4, it has columns 32 j + 8 t .. + 7 of keys g and g + 8, and columns
// 64 c + 8 g .. + 7 of the values of positions 2 t, 2 t + 1, 2 t + 8, 2 t + 9. Scores come out where
// the weights go in: rows g and g + 8 of these same positions.
//
// Limit: keys and values are read once, at the speed of memory; with few positions, two loads
// (arguments, then everything at once) and the merge. All loads of a tile are under way before the
// first is used, but for heads above 128 numbers, whose values are loaded after the scores.
#include "attention.cuh"

namespace moepress {
namespace {

template <bool bfloat>
DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (bfloat) {
        mma_bf16(d, a, b);
    } else {
        mma_f16(d, a, b);
    }
}

// Two numbers as high + low, each two 16-bit numbers.
template <bool bfloat>
DEVICE void halve(float first, float second, uint32_t& high, uint32_t& low) {
    if constexpr (bfloat) {
        high = floats_to_bfloats(first, second);
        low = floats_to_bfloats(first - bfloat_to_float(uint16_t(high)),
                                second - bfloat_to_float(uint16_t(high >> 16)));
    } else {
        const uint16_t a = float_to_half(first), b = float_to_half(second);
        high = a | uint32_t(b) << 16;
        low = float_to_half(first - half_to_float(a)) |
              uint32_t(float_to_half(second - half_to_float(b))) << 16;
    }
}

DEVICE uint32_t word(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Rows 8 h + g of `halves` times 8, columns in `chunks` of 64.
template <bool bfloat, int chunks, int halves>
struct Split {
    const AttentionCall& call;
    const Rows& rows;
    const uint16_t *keys, *values;  // of this head
    uint4 q[halves][2 * chunks];
    float y[halves][chunks][4][4] = {};  // columns 64 c + 8 g + 2 i, + 1 x rows 2 t, 2 t + 1
    float most[halves], sum[halves] = {};
    int64_t mask[halves];  // where the mask of a row begins

    DEVICE Split(const AttentionCall& call, const Rows& rows)
        : call(call), rows(rows), keys(rows.head_of<uint16_t>(call.k, call.of_k)),
          values(rows.head_of<uint16_t>(call.v, call.of_v)) {
#pragma unroll
        for (int h = 0; h < halves; ++h) {
            const Query query = rows.query(call, 8 * h + lane_id() / 4);
            const uint16_t* at = static_cast<const uint16_t*>(call.q) + rows.at(call.of_q, query);
#pragma unroll
            for (int j = 0; j < 2 * chunks; ++j) {
                const int column = 32 * j + 8 * (lane_id() % 4);
                q[h][j] = load_stream_16_or_zero(at + column, column < int(call.size));
            }
            most[h] = nothing();
            mask[h] = rows.at(call.of_mask, query);
        }
    }

    // Positions and columns beyond the end are read at its edge: they count zero times.
    DEVICE const uint16_t* row_of(const uint16_t* p, const Strides& strides, int position) const {
        return p + int64_t(min(position, int(call.positions) - 1)) * int(strides.step);
    }
    DEVICE uint4 load(const uint16_t* at, int column, int lane_column) const {
        return load_stream_16_or_zero(at + column, column + lane_column < int(call.size));
    }

    DEVICE void load_values(int start, uint4 (&v)[chunks][4]) const {
        const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            const uint16_t* at = row_of(values, call.of_v, start + 2 * t + p % 2 + p / 2 * 8);
#pragma unroll
            for (int c = 0; c < chunks; ++c) v[c][p] = load(at + 8 * g, 64 * c, 8 * g);
        }
    }

    DEVICE void add(int start) {
        const int g = lane_id() / 4, t = lane_id() % 4;
        uint4 k[2][2 * chunks], v[chunks][4];
        float s[2][4] = {}, added[halves][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint16_t* at = row_of(keys, call.of_k, start + 8 * i + g);
#pragma unroll
            for (int j = 0; j < 2 * chunks; ++j)
                k[i][j] = load(at + 8 * t, 32 * j, 8 * t);
        }
        if constexpr (chunks <= 2) {
            load_values(start, v);
        }
        const int first = start + 2 * t, positions[4] = {first, first + 1, first + 8, first + 9};
#pragma unroll
        for (int h = 0; h < halves; ++h) read_mask(call, mask[h], positions, added[h]);
#pragma unroll
        for (int j = 0; j < 2 * chunks; ++j)
#pragma unroll
            for (int w = 0; w < 4; w += 2) {
                const uint4 &low = q[0][j], &high = q[halves - 1][j];
                const uint32_t a[4] = {word(low, w), halves > 1 ? word(high, w) : 0,
                                       word(low, w + 1), halves > 1 ? word(high, w + 1) : 0};
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const uint32_t b[2] = {word(k[i][j], w), word(k[i][j], w + 1)};
                    multiply<bfloat>(s[i], a, b);
                }
            }
        if constexpr (chunks > 2) {
            load_values(start, v);
        }
        uint32_t high[halves][2], low[halves][2];
#pragma unroll
        for (int h = 0; h < halves; ++h) {
            const float x[4] = {s[0][2 * h] * call.scale + added[h][0],
                                s[0][2 * h + 1] * call.scale + added[h][1],
                                s[1][2 * h] * call.scale + added[h][2],
                                s[1][2 * h + 1] * call.scale + added[h][3]};
            soften(h, x, high[h], low[h]);
        }
#pragma unroll
        for (int c = 0; c < chunks; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                uint32_t a[4];
#pragma unroll
                for (int p = 0; p < 4; p += 2) {
                    a[p] = __byte_perm(word(v[c][p], i), word(v[c][p + 1], i), 0x5410);
                    a[p + 1] = __byte_perm(word(v[c][p], i), word(v[c][p + 1], i), 0x7632);
                }
#pragma unroll
                for (int h = 0; h < halves; ++h) {
                    multiply<bfloat>(y[h][c][i], a, high[h]);
                    multiply<bfloat>(y[h][c][i], a, low[h]);
                }
            }
    }

    // Weights of the scores of a row, and what was summed so far relative to the new greatest score.
    DEVICE void soften(int h, const float (&x)[4], uint32_t (&high)[2], uint32_t (&low)[2]) {
        const int t = lane_id() % 4;
        float greatest = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
        greatest = fmaxf(greatest, __shfl_xor_sync(~0u, greatest, 1));
        greatest = fmaxf(most[h], fmaxf(greatest, __shfl_xor_sync(~0u, greatest, 2)));
        const float shrunk = weight(most[h], greatest);
        most[h] = greatest;
        float p[4];
        sum[h] *= shrunk;
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[h] += p[i] = weight(x[i], greatest);
        halve<bfloat>(p[0], p[1], high[0], low[0]);
        halve<bfloat>(p[2], p[3], high[1], low[1]);
        // Lane 4 g knows row g.
        const float even = __shfl_sync(~0u, shrunk, 8 * t), odd = __shfl_sync(~0u, shrunk, 8 * t + 4);
#pragma unroll
        for (int c = 0; c < chunks; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) y[h][c][i][j] *= j % 2 ? odd : even;
    }

    DEVICE void write() {
        constexpr int all = 8 * halves, width = 64 * chunks + 4;  // 4: against bank conflicts
        auto* shared = shared_memory<Shared<all>>();
        const int g = lane_id() / 4, t = lane_id() % 4, warp = warp_id();
#pragma unroll
        for (int h = 0; h < halves; ++h) {
            sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
            sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
            if (t == 0) {
                shared->most[warp][8 * h + g] = most[h];
                shared->sum[warp][8 * h + g] = sum[h];
            }
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) {
                const int row = 8 * h + 2 * t + odd;
                float* to = shared->values + (warp * all + row) * width + 8 * g;
                if (row < rows.count)
#pragma unroll
                    for (int c = 0; c < chunks; ++c)
#pragma unroll
                        for (int i = 0; i < 4; i += 2)
                            *reinterpret_cast<float4*>(to + 64 * c + 2 * i) =
                                make_float4(y[h][c][i][odd], y[h][c][i][odd + 2],
                                            y[h][c][i + 1][odd], y[h][c][i + 1][odd + 2]);
            }
        }
        write_part<all>(call, rows, shared, width);
    }
};

template <bool bfloat, int size, int halves>
DEVICE void attention(const AttentionCall& call) {
    const Rows rows(call, 8 * halves);
    Split<bfloat, size / 64, halves> split(call, rows);
    each_tile(call, rows, [&](int start) { split.add(start); });
    split.write();
}

}  // namespace
}  // namespace moepress

// Heads of at most GROUP numbers, a multiple of 8; blocks of 8 * PLANES rows. Threads: 128. Dynamic
// shared memory: 4 * 8 * PLANES * (GROUP + 6) floats. Grid and parameters: attention.cuh.
#define MOEPRESS_ATTENTION_NAMED(type, bfloat, GROUP, PLANES)           \
    MOEPRESS_ATTENTION_KERNEL(moepress_attention_##type##_g##GROUP##_p##PLANES, \
                              (GROUP * PLANES <= 128 ? 3 : 2), (moepress::attention<bfloat, GROUP, PLANES>))
#define MOEPRESS_ATTENTION(GROUP, PLANES)                  \
    MOEPRESS_ATTENTION_NAMED(bf16, true, GROUP, PLANES)    \
    MOEPRESS_ATTENTION_NAMED(f16, false, GROUP, PLANES)

#ifdef MOEPRESS_GROUP
MOEPRESS_ATTENTION(MOEPRESS_GROUP, MOEPRESS_PLANES)
#else
MOEPRESS_ATTENTION(64, 1)
MOEPRESS_ATTENTION(64, 2)
MOEPRESS_ATTENTION(128, 1)
MOEPRESS_ATTENTION(128, 2)
MOEPRESS_ATTENTION(192, 1)
MOEPRESS_ATTENTION(256, 1)
#endif
