// Which positions the mask of an attention shows to a query.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "moepress.h"
#include "number_kinds.h"

namespace moepress {
namespace {

// Whether a number of a mask shows its position. NaN does, and reaches the result.
inline bool shows(uint8_t x) { return x != 0; }
inline bool shows(float x) { return x != -INFINITY; }
inline bool shows(Bfloat16 x) { return x.bits != 0xFF80; }
inline bool shows(Float16 x) { return x.bits != 0xFC00; }
inline float added(uint8_t) { return 0; }
template <class Number>
float added(Number x) {
    return wide(x);
}

constexpr int64_t kManyShown = 64;  // numbers that `none_shown` takes

template <class Number>
bool none_shown(const Number* at) {
    unsigned any = 0;
    for (int64_t i = 0; i < kManyShown; ++i) any |= shows(at[i]);
    return any == 0;
}
inline bool none_shown(const uint8_t* at) {
    uint64_t words[kManyShown / 8], any = 0;
    std::memcpy(words, at, sizeof words);
    for (const uint64_t word : words) any |= word;
    return any == 0;
}

struct Positions {
    int64_t first, end;
    bool empty() const { return first >= end; }
    Positions meet(Positions other) const {
        return {std::max(first, other.first), std::min(end, other.end)};
    }
};

// One row of a mask, that of a query. at null: all is shown.
struct MaskRow {
    const void* at;
    int64_t stride;
    int32_t numbers;  // MoepressNumbers, or kMoepressBool

    // run(row), with the type of its numbers.
    template <class Run>
    auto with_numbers(Run run) const {
        switch (numbers) {
            case kFloat32: return run(static_cast<const float*>(at));
            case kBfloat16: return run(static_cast<const Bfloat16*>(at));
            case kFloat16: return run(static_cast<const Float16*>(at));
            default: return run(static_cast<const uint8_t*>(at));
        }
    }

    // From the first to the last of n positions that are shown.
    Positions shown(int64_t n) const {
        if (at == nullptr) return {0, n};
        return with_numbers([&](auto* row) { return range(row, n); });
    }

    // List the positions within `part` that are shown, counted from its beginning, and what is
    // added to their scores. Returns how many; `adds`: whether anything but 0 is added.
    int list(Positions part, int64_t beginning, int32_t* positions, float* bias, bool& adds) const {
        adds = false;
        const int before = int(part.first - beginning), n = int(part.end - part.first);
        if (at == nullptr || all_true(part)) {
            for (int i = 0; i < n; ++i) positions[i] = before + i;
            return n;
        }
        return with_numbers([&](auto* row) {
            int found = 0;
            for (int i = 0; i < n; ++i) {
                const auto x = row[(part.first + i) * stride];
                positions[found] = before + i;
                bias[found] = added(x);
                adds |= shows(x) && bias[found] != 0;
                found += shows(x);
            }
            return found;
        });
    }

  private:
    bool all_true(Positions part) const {
        return numbers == kMoepressBool && stride == 1 &&
               std::memchr(static_cast<const uint8_t*>(at) + part.first, 0,
                           size_t(part.end - part.first)) == nullptr;
    }

    template <class Number>
    Positions range(const Number* row, int64_t n) const {
        const bool dense = stride == 1;
        int64_t first = 0, end = n;
        while (dense && first + kManyShown <= n && none_shown(row + first)) first += kManyShown;
        while (first < n && !shows(row[first * stride])) ++first;
        while (dense && end - kManyShown >= first && none_shown(row + end - kManyShown))
            end -= kManyShown;
        while (end > first && !shows(row[(end - 1) * stride])) --end;
        return {first, end};
    }
};

}  // namespace
}  // namespace moepress
