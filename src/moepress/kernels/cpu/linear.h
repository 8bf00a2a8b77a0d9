// A linear: y = x W^T + bias, for either codec.
//
//     1. prepare the tokens, in panels
//     2. an item of work is a strip of rows of W: its products with all panels
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "codec.h"
#include "numbers.h"
#include "routing.h"
#include "strip.h"
#include "threads.h"

namespace moepress {

// y [tokens][rows]; x [tokens][cols]; bias [rows] or null. At most kChunkTokens tokens.
template <class Codec>
void linear_chunk(const Codec& codec, const float* x, int64_t tokens,
                  const typename Codec::Matrix& w, const float* bias, int threads, float* y) {
    const Routing routing = route_all(tokens, codec.panel_tokens());
    typename Codec::Activations activations(codec, routing, w.cols, w.group, Of::kTokens);
    parallel(threads, activations.items(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) activations.fill(item, x);
    });

    const int64_t strips = codec.strips(w);
    const int64_t grain = codec.linear_grain(strips, threads);
    parallel(threads, strips, grain, [&](int64_t begin, int64_t end) {
        Products<Codec> products;
        for (size_t i = 0; i < routing.panels.size(); ++i) {
            const Panel& panel = routing.panels[i];
            for (int64_t strip = begin; strip < end; ++strip)
                multiply_strip(codec, w, strip, activations, i, panel, products,
                               [&](int t, int64_t row, int64_t rows, const float* values) {
                                   float* to = y + (panel.first + t) * w.rows + row;
                                   for (int64_t r = 0; r < rows; ++r)
                                       to[r] = values[r] + (bias ? bias[row + r] : 0);
                               });
        }
    });
}

// y [tokens][rows]; x [tokens][cols]: floats, or bfloat16.
template <class Codec>
void run_linear(const Codec& codec, const void* x, int64_t tokens,
                const typename Codec::Matrix& w, const float* bias, int threads, bool bfloat16,
                void* y) {
    const int64_t width = bfloat16 ? 2 : 4;
    const int64_t most = portion(tokens, Codec::kChunkTokens);
    for (int64_t first = 0; first < tokens;) {
        const int64_t count = std::min(tokens - first, most);
        in_floats(static_cast<const char*>(x) + first * w.cols * width, count * w.cols,
                  static_cast<char*>(y) + first * w.rows * width, count * w.rows, bfloat16, threads,
                  [&](const float* from, float* to) {
                      linear_chunk(codec, from, count, w, bias, threads, to);
                      return kOk;
                  });
        first += count;
    }
}

}  // namespace moepress
