// Numbers of a router, whose kinds (MoepressNumbers) are known when it is called. Internal linkage:
// each instruction set compiles its own copy.
#pragma once

#include <cstdint>

#include "moepress.h"
#include "number_kinds.h"

namespace moepress {
namespace {

inline int64_t bytes_of(int32_t numbers) { return numbers == kFloat32 ? 4 : 2; }

inline void widen_numbers(const void* from, int32_t numbers, int64_t n, float* to) {
    with_kind(numbers, [&](auto kind) {
        using Kind = decltype(kind);
        widen_numbers<Kind>(static_cast<const typename Kind::Raw*>(from), n, to);
    });
}

inline void narrow_numbers(const float* from, int64_t n, int32_t numbers, void* to) {
    with_kind(numbers, [&](auto kind) {
        using Kind = decltype(kind);
        narrow_numbers<Kind>(from, n, static_cast<typename Kind::Raw*>(to));
    });
}

// x [n] as if it had been written and read.
inline void round_numbers(float* x, int64_t n, int32_t numbers) {
    if (numbers == kFloat32) return;
    with_kind(numbers, [&](auto kind) {
        for (int64_t i = 0; i < n; ++i) x[i] = kind.wide(kind.narrow(x[i]));
    });
}

inline float rounded_number(float x, int32_t numbers) {
    round_numbers(&x, 1, numbers);
    return x;
}

}  // namespace
}  // namespace moepress
