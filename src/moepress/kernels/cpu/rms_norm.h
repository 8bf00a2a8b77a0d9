// Root mean square norms of rows: x / sqrt(mean(x^2) + epsilon), times a weight. A row's result
// depends neither on the instruction set nor on the other rows. Internal linkage: each instruction
// set compiles its own copy.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "floats.h"
#include "number_kinds.h"
#include "small.h"

namespace moepress {
namespace {

constexpr int64_t kNormFloats = 2048;  // numbers of a row that are floats at a time

// A sum of squares in 32 sums: number i adds to sum i modulo 32. Then sums 16, 8, .. 1 apart.
class SquareSum {
  public:
    // n: a multiple of 32, but of the last numbers. Behind those there is memory up to one.
    void add(float* x, int64_t n) {
        const int64_t end = (n + kSums - 1) / kSums * kSums;
        for (int64_t i = n; i < end; ++i) x[i] = 0;
        for (int64_t i = 0; i < end; i += kSums)
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) {
                Floats some;
                std::memcpy(&some, x + i + v * kFloats, sizeof some);
                sums_[v] += some * some;
            }
    }

    float total() const {
        Floats left[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) left[v] = sums_[v];
#pragma GCC unroll 8
        for (int half = kVectors / 2; half; half /= 2)
#pragma GCC unroll 8
            for (int v = 0; v < half; ++v) left[v] += left[v + half];
        float last[kFloats];
        std::memcpy(last, left, sizeof last);
#pragma GCC unroll 8
        for (int half = kFloats / 2; half; half /= 2)
#pragma GCC unroll 8
            for (int i = 0; i < half; ++i) last[i] += last[i + half];
        return last[0];
    }

  private:
    static constexpr int kSums = 32, kVectors = kSums / kFloats;
    Floats sums_[kVectors] = {};
};

// The normed numbers n of x [count], which are floats, times a weight: y = weigh(n, w).
template <class Kind, class Weigh>
void write_normed(const float* __restrict x, const float* __restrict w, int64_t count,
                  float inverse, typename Kind::Raw* __restrict y, Weigh weigh) {
    for (int64_t i = 0; i < count; ++i) y[i] = Kind::narrow(weigh(x[i] * inverse, w[i]));
}

template <class Kind>
void write_normed(const NormCall& call, const float* x, const float* w, int64_t count,
                  float inverse, int64_t at) {
    auto* y = static_cast<typename Kind::Raw*>(call.y) + at;
    if (call.weight == nullptr)
        return write_normed<Kind>(x, x, count, inverse, y, [](float n, float) { return n; });
    switch (call.formula) {
        case kWideNorm:
            return write_normed<Kind>(x, w, count, inverse, y,
                                      [](float n, float w) { return n * w; });
        case kCenteredNorm:
            return write_normed<Kind>(x, w, count, inverse, y,
                                      [](float n, float w) { return n * (1 + w); });
        default:
            break;
    }
    const auto rounded = [](float n, float w) { return w * Kind::rounded(n); };
    if (call.weight_numbers == call.x_numbers)
        return write_normed<Kind>(x, w, count, inverse, y, rounded);
    write_normed<Float32>(x, w, count, inverse, static_cast<float*>(call.y) + at, rounded);
}

template <class Kind>
void norm_rows_of(const NormCall& call, int64_t first, int64_t last) {
    alignas(64) float x[kNormFloats], weight[kNormFloats];
    const int64_t some = std::min(call.size, kNormFloats);
    const bool whole = some == call.size;  // then x and weight hold all numbers of a row
    const auto* numbers = static_cast<const typename Kind::Raw*>(call.x);
    const auto read_weight = [&](int64_t at, int64_t n) {
        if (call.weight == nullptr) return;
        with_kind(call.weight_numbers, [&](auto kind) {
            using Raw = typename decltype(kind)::Raw;
            widen_numbers<decltype(kind)>(static_cast<const Raw*>(call.weight) + at, n, weight);
        });
    };
    if (whole) read_weight(0, some);
    for (int64_t row = first; row < last; ++row) {
        const int64_t outer = row / call.rows, inner = row - outer * call.rows;
        const auto* from = numbers + outer * call.outer_stride + inner * call.row_stride;
        SquareSum squares;
        for (int64_t at = 0; at < call.size; at += some) {
            const int64_t n = std::min(some, call.size - at);
            widen_numbers<Kind>(from + at, n, x);
            squares.add(x, n);
        }
        const float mean = squares.total() / float(call.size);
        const float inverse = 1 / std::sqrt(mean + call.epsilon);
        for (int64_t at = 0; at < call.size; at += some) {
            const int64_t n = std::min(some, call.size - at);
            if (!whole) {
                widen_numbers<Kind>(from + at, n, x);
                read_weight(at, n);
            }
            write_normed<Kind>(call, x, weight, n, inverse, row * call.size + at);
        }
    }
}

inline void norm_rows(const NormCall& call, int64_t first, int64_t last) {
    with_kind(call.x_numbers,
              [&](auto kind) { norm_rows_of<decltype(kind)>(call, first, last); });
}

}  // namespace
}  // namespace moepress
