// The biases of one matrix of each expert.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "number_kinds.h"

namespace moepress {

struct Biases {
    const void* at;  // [experts][rows], or null: none
    bool bfloat16;   // numbers are bfloat16, else float
    int64_t rows;

    // Copy the biases first .. first + n - 1 of an expert to `out` as floats. Returns `out`, or
    // null if there are none.
    const float* copy(size_t expert, int64_t first, int64_t n, float* out) const {
        if (at == nullptr) return nullptr;
        const size_t place = size_t(rows) * expert + size_t(first);
        if (bfloat16)
            widen_numbers<Bfloat16>(static_cast<const uint16_t*>(at) + place, n, out);
        else
            std::memcpy(out, static_cast<const float*>(at) + place, size_t(n) * sizeof(float));
        return out;
    }
};

// to [n] = values [n], plus bias [n] unless it is null.
inline void store_biased(float* to, const float* values, const float* bias, int64_t n) {
    if (bias == nullptr) return void(std::memcpy(to, values, size_t(n) * sizeof(float)));
    for (int64_t i = 0; i < n; ++i) to[i] = values[i] + bias[i];
}

}  // namespace moepress
