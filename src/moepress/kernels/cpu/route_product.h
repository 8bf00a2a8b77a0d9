// A row of a router's weight times a token (isa.h, RouteProduct). The weights of a router come from
// memory at each token, so what counts is that reads are under way before they are needed.
//
// Sums have the same order on every machine: column c is added to sum c mod 64, and products are
// rounded before they are added.
#pragma once

#include <cstdint>

#include "isa.h"
#include "moepress.h"
#include "route_numbers.h"

namespace moepress {
namespace {

constexpr int64_t kRouteAhead = 4096;  // bytes: how far ahead is prefetched

// 16 numbers as floats.
template <class Lanes, int numbers>
typename Lanes::Float sixteen(const uint8_t* at) {
    if constexpr (numbers == kBfloat16) return Lanes::bfloat16(at);
    if constexpr (numbers == kFloat32)
        return Lanes::load_floats(reinterpret_cast<const float*>(at));
    alignas(64) float wide[16];
    widen_numbers(at, numbers, 16, wide);
    return Lanes::load_floats(wide);
}

template <class Lanes>
struct RouteSums {
    using Float = typename Lanes::Float;
    Float sum[4] = {Lanes::zero(), Lanes::zero(), Lanes::zero(), Lanes::zero()};

    // Add products of 64 columns.
    template <int numbers>
    void add(const uint8_t* row, const float* x) {
        const Float one = Lanes::splat(1);
        for (int i = 0; i < 4; ++i) {
            const Float w = sixteen<Lanes, numbers>(row + 16 * i * (numbers == kFloat32 ? 4 : 2));
            const Float product = Lanes::mul(w, Lanes::load_floats(x + 16 * i));
            sum[i] = Lanes::mul_add(product, one, sum[i]);
        }
    }

    float total() const {
        const Float one = Lanes::splat(1);
        alignas(64) float part[16];
        Lanes::store(part, Lanes::mul_add(Lanes::mul_add(sum[0], one, sum[1]), one,
                                          Lanes::mul_add(sum[2], one, sum[3])));
        for (int half = 8; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) part[i] += part[i + half];
        return part[0];
    }
};

template <class Lanes, int numbers>
float route_product(const uint8_t* row, int64_t cols, const float* x) {
    constexpr int64_t size = numbers == kFloat32 ? 4 : 2;
    RouteSums<Lanes> sums;
    int64_t c = 0;
    for (; c + 64 <= cols; c += 64) {
        for (int64_t line = 0; line < 64 * size; line += 64)
            Lanes::prefetch(row + c * size + line + kRouteAhead);
        sums.template add<numbers>(row + c * size, x + c);
    }
    if (c < cols) {
        alignas(64) float rest[64] = {};
        widen_numbers(row + c * size, numbers, cols - c, rest);
        sums.template add<kFloat32>(reinterpret_cast<const uint8_t*>(rest), x + c);
    }
    return sums.total();
}

}  // namespace
}  // namespace moepress
