// The biases of one matrix of each expert.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

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
        const auto* bytes = static_cast<const uint8_t*>(at) + place * (bfloat16 ? 2 : 4);
        if (!bfloat16) {
            std::memcpy(out, bytes, size_t(n) * sizeof(float));
            return out;
        }
        for (int64_t i = 0; i < n; ++i) {
            uint16_t high;
            std::memcpy(&high, bytes + 2 * i, 2);
            const uint32_t bits = uint32_t(high) << 16;
            std::memcpy(out + i, &bits, 4);
        }
        return out;
    }
};

// to [n] = values [n], plus bias [n] unless it is null.
inline void store_biased(float* to, const float* values, const float* bias, int64_t n) {
    if (bias == nullptr) return void(std::memcpy(to, values, size_t(n) * sizeof(float)));
    for (int64_t i = 0; i < n; ++i) to[i] = values[i] + bias[i];
}

}  // namespace moepress
