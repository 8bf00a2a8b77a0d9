// One strip of a matrix (codec.h) times one panel, for each user of the products: linear.h,
// gate_up.h and experts.h.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "routing.h"

namespace moepress {

// A thread's memory for the products of one strip: [tokens][kStripRows].
template <class Codec>
struct Products {
    alignas(64) float at[Codec::kProductTokens * Codec::kStripRows];
};

// Multiply a strip of `w` with panel number `i` and hand on the products of each token: take(t,
// row, rows, values): values [rows] are rows row .. row + rows - 1 of w times token t of the panel.
template <class Codec, class Take>
void multiply_strip(const Codec& codec, const typename Codec::Matrix& w, int64_t strip,
                    const typename Codec::Activations& activations, size_t i, const Panel& panel,
                    Products<Codec>& products, Take take) {
    codec.multiply(w, strip, activations, i, panel, products.at);
    const int64_t row = strip * Codec::kStripRows;
    const int64_t rows = std::min<int64_t>(Codec::kStripRows, w.rows - row);
    for (int t = 0; t < panel.count; ++t)
        take(t, row, rows, products.at + t * Codec::kStripRows);
}

}  // namespace moepress
