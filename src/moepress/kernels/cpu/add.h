// Sums of two arrays (isa.h, Add), as residual streams have them.
#pragma once

#include <cstdint>

#include "number_kinds.h"

namespace moepress {
namespace {

inline void add(const void* a, const void* b, int64_t n, int32_t numbers, void* y) {
    with_kind(numbers, [&](auto kind) {
        using Raw = typename decltype(kind)::Raw;
        const auto *from = static_cast<const Raw*>(a), *other = static_cast<const Raw*>(b);
        auto* to = static_cast<Raw*>(y);
        for (int64_t i = 0; i < n; ++i)
            to[i] = kind.narrow(kind.wide(from[i]) + kind.wide(other[i]));
    });
}

}  // namespace
}  // namespace moepress
