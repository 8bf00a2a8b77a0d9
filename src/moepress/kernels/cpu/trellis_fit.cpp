// Sums over the columns of a rounded matrix, from which the best scale of each row follows. The
// definition and oracle is `add_in_order` of rounding/fit.py. One pass: the matrices are read from
// memory once, and nothing of their size is made.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "moepress.h"
#include "number_kinds.h"
#include "threads.h"
#include "trellis_code.h"

namespace moepress {
namespace {

constexpr int64_t kRows = 512;  // what is in work of eight columns fits in the first-level cache

struct Sums {
    float product[kRows], energy[kRows];
};

// One column of some rows of R^T w, in units of the scales.
struct Weighted {
    const void* at;  // [cols][rows] float or bfloat16
    bool bfloat16;
    const float* per_scale;  // [rows], or null: 1
    int64_t rows;

    void read(int64_t column, int64_t first, int count, float* out) const {
        const int64_t place = column * rows + first;
        if (bfloat16)
            widen_numbers<Bfloat16>(static_cast<const uint16_t*>(at) + place, count, out);
        else
            std::memcpy(out, static_cast<const float*>(at) + place, size_t(count) * sizeof(float));
        if (per_scale != nullptr)
            for (int n = 0; n < count; ++n) out[n] *= per_scale[first + n];
    }
};

// Add column j of a block of eight. `residual` [8][rows] r of the block, at the first of the rows;
// `block` [8][8] of R, upper triangular: E R = r R_BB.
template <int j>
void add_column(const float* weighted, const float* residual, int64_t rows, const float* block,
                float curvature, int count, Sums& sums) {
    for (int n = 0; n < count; ++n) {
        float error = 0.0f;
        for (int i = 0; i <= j; ++i) error += block[8 * i + j] * residual[i * rows + n];
        const float code = weighted[n] - error;
        sums.product[n] += curvature * weighted[n] * code;
        sums.energy[n] += curvature * code * code;
    }
}

template <int... j>
void add_block(const Weighted& weighted, const float* residual, const float* block,
               const float* curvature, int64_t column, int64_t first, int count, Sums& sums,
               std::integer_sequence<int, j...>) {
    float some[kRows];
    (..., (weighted.read(column + j, first, count, some),
           add_column<j>(some, residual + column * weighted.rows + first, weighted.rows, block,
                         curvature[column + j], count, sums)));
}

}  // namespace
}  // namespace moepress

using namespace moepress;

int32_t moepress_trellis_fit(const void* weighted, int32_t bfloat16, const float* per_scale,
                             const float* residual, const float* blocks, const float* curvature,
                             int64_t cols, int64_t rows, int32_t threads, float* product,
                             float* energy) {
    if (rows < 1 || cols < 1 || cols % kTileColumns != 0 || threads < 1) return kBadShape;
    const Weighted all{weighted, bfloat16 != 0, per_scale, rows};
    parallel(threads, (rows + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t first = begin * kRows; first < std::min(end * kRows, rows); first += kRows) {
            const int count = int(std::min(kRows, rows - first));
            Sums sums{};
            for (int64_t column = 0; column < cols; column += kTileColumns)
                add_block(all, residual, blocks + column * kTileColumns, curvature, column, first,
                          count, sums, std::make_integer_sequence<int, kTileColumns>());
            for (int n = 0; n < count; ++n) {
                product[first + n] += sums.product[n];
                energy[first + n] += sums.energy[n];
            }
        }
    });
    return kOk;
}
