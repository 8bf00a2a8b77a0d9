// Rotary embeddings: pairs (a, b) of numbers of a head become (a cos - b sin, b cos' + a sin').
// Internal linkage: each instruction set compiles its own copy.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "number_kinds.h"
#include "small.h"

namespace moepress {
namespace {

constexpr int64_t kPairs = 128;  // of a head that are turned at a time

// The cosines of some pairs, or their sines: of the first and of the second numbers.
struct Angles {
    alignas(64) float a[kPairs], b[kPairs];
};

// Angles of the pairs first .. first + n - 1 of a token, whose columns begin at `row`.
inline void read_angles(const RotaryCall& call, const void* columns, int64_t row, int64_t first,
                        int64_t n, Angles& to) {
    with_kind(call.angle_numbers, [&](auto kind) {
        using Kind = decltype(kind);
        const auto* x = static_cast<const typename Kind::Raw*>(columns) + row;
        if (call.of_pairs) {
            widen_numbers<Kind>(x + first, n, to.a);
            widen_numbers<Kind>(x + first, n, to.b);
        } else if (call.neighbours_in) {
            for (int64_t i = 0; i < n; ++i) to.a[i] = Kind::wide(x[2 * (first + i)]);
            for (int64_t i = 0; i < n; ++i) to.b[i] = Kind::wide(x[2 * (first + i) + 1]);
        } else {
            widen_numbers<Kind>(x + first, n, to.a);
            widen_numbers<Kind>(x + call.rotated / 2 + first, n, to.b);
        }
    });
}

// n pairs: neighbours at x, or the first numbers at x and the second ones at x2; likewise y.
// Products are rounded to `Rounding`, and sums to `Kind`, as they are written.
template <class Kind, class Rounding, bool neighbours_in, bool neighbours_out>
void turn_pairs(const typename Kind::Raw* __restrict x, const typename Kind::Raw* __restrict x2,
                const Angles& __restrict cos, const Angles& __restrict sin, int64_t n,
                typename Kind::Raw* __restrict y, typename Kind::Raw* __restrict y2) {
    for (int64_t i = 0; i < n; ++i) {
        const float a = Kind::wide(neighbours_in ? x[2 * i] : x[i]);
        const float b = Kind::wide(neighbours_in ? x[2 * i + 1] : x2[i]);
        const float one = Rounding::rounded(a * cos.a[i]) - Rounding::rounded(b * sin.a[i]);
        const float other = Rounding::rounded(b * cos.b[i]) + Rounding::rounded(a * sin.b[i]);
        (neighbours_out ? y[2 * i] : y[i]) = Kind::narrow(one);
        (neighbours_out ? y[2 * i + 1] : y2[i]) = Kind::narrow(other);
    }
}

// All heads of a token.
template <class Kind, class Rounding, bool neighbours_in, bool neighbours_out>
void turn_token(const RotaryCall& call, int64_t batch, int64_t token) {
    using Raw = typename Kind::Raw;
    constexpr int in_step = neighbours_in ? 2 : 1, out_step = neighbours_out ? 2 : 1;
    const int64_t pairs = call.rotated / 2, rest = call.size - call.rotated;
    const int64_t row = batch * call.angle_batch + token * call.angle_token;
    for (int64_t first = 0; first == 0 || first < pairs; first += kPairs) {
        const int64_t n = std::min(kPairs, pairs - first);
        Angles cos, sin;
        read_angles(call, call.cos, row, first, n, cos);
        read_angles(call, call.sin, row, first, n, sin);
        for (const Heads& heads : call.heads) {
            const Raw* x = static_cast<const Raw*>(heads.from) + batch * heads.batch +
                           token * heads.token;
            Raw* y = static_cast<Raw*>(heads.to) + batch * heads.to_batch + token * heads.to_token;
            for (int64_t head = 0; head < heads.count; ++head) {
                const Raw* from = x + head * heads.head;
                Raw* to = y + head * heads.to_head;
                turn_pairs<Kind, Rounding, neighbours_in, neighbours_out>(
                    from + in_step * first, from + pairs + first, cos, sin, n,
                    to + out_step * first, to + pairs + first);
                if (first == 0 && rest > 0)
                    std::memcpy(to + call.rotated, from + call.rotated, sizeof(Raw) * size_t(rest));
            }
        }
    }
}

template <class Kind, class Rounding>
void turn_some(const RotaryCall& call, int64_t first, int64_t last) {
    const auto turn = call.neighbours_in
                          ? (call.neighbours_out ? turn_token<Kind, Rounding, true, true>
                                                 : turn_token<Kind, Rounding, true, false>)
                          : (call.neighbours_out ? turn_token<Kind, Rounding, false, true>
                                                 : turn_token<Kind, Rounding, false, false>);
    for (int64_t i = first; i < last; ++i) turn(call, i / call.tokens, i % call.tokens);
}

inline void turn_tokens(const RotaryCall& call, int64_t first, int64_t last) {
    with_kind(call.numbers, [&](auto kind) {
        using Kind = decltype(kind);
        if (call.wide)
            turn_some<Kind, Float32>(call, first, last);
        else
            turn_some<Kind, Kind>(call, first, last);
    });
}

}  // namespace
}  // namespace moepress
