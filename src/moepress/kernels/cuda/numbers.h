// Tensors whose dtype is known when a kernel runs: loads as float32, stores rounded to the dtype.
#pragma once

#include "device.h"

enum Dtype { kFloat32, kFloat16, kBfloat16 };  // as DTYPES in launch.py

DEVICE float load_number(const void* p, int64_t i, int64_t dtype) {
    if (dtype == kFloat32) return static_cast<const float*>(p)[i];
    const uint16_t bits = static_cast<const uint16_t*>(p)[i];
    return dtype == kFloat16 ? half_to_float(bits) : bfloat_to_float(bits);
}

DEVICE void store_number(void* p, int64_t i, int64_t dtype, float value) {
    if (dtype == kFloat32)
        static_cast<float*>(p)[i] = value;
    else
        static_cast<uint16_t*>(p)[i] =
            dtype == kFloat16 ? float_to_half(value) : float_to_bfloat(value);
}

// A number as a tensor of the dtype would hold it.
DEVICE float rounded_to(int64_t dtype, float value) {
    if (dtype == kFloat32) return value;
    return dtype == kFloat16 ? half_to_float(float_to_half(value))
                             : bfloat_to_float(float_to_bfloat(value));
}

// n neighbouring numbers from an address that is a multiple of n of them, or of 4. n = 1, 2, 4 or 8.
template <int n>
DEVICE void load_numbers(const void* p, int64_t i, int64_t dtype, float (&out)[n]) {
    if (n >= 4 && dtype == kFloat32) {
        const float4* at = reinterpret_cast<const float4*>(static_cast<const float*>(p) + i);
#pragma unroll
        for (int j = 0; j + 4 <= n; j += 4) {
            const float4 v = at[j / 4];
            out[j] = v.x, out[j + 1 < n ? j + 1 : 0] = v.y;
            out[j + 2 < n ? j + 2 : 0] = v.z, out[j + 3 < n ? j + 3 : 0] = v.w;
        }
    } else if (n >= 4) {
        const uint2* at = reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(p) + i);
#pragma unroll
        for (int j = 0; j < n; ++j) {
            const uint2 v = at[j / 4];
            const uint16_t bits = uint16_t((j / 2 % 2 ? v.y : v.x) >> 16 * (j % 2));
            out[j] = dtype == kFloat16 ? half_to_float(bits) : bfloat_to_float(bits);
        }
    } else {
#pragma unroll
        for (int j = 0; j < n; ++j) out[j] = load_number(p, i + j, dtype);
    }
}

// The same for stores of one number, or of 8 to an address that is a multiple of 16 bytes.
template <int n>
DEVICE void store_numbers(void* p, int64_t i, int64_t dtype, const float (&value)[n]) {
    static_assert(n == 1 || n == 8);
    if (n == 1) {
        store_number(p, i, dtype, value[0]);
    } else if (dtype == kFloat32) {
        float4* at = reinterpret_cast<float4*>(static_cast<float*>(p) + i);
#pragma unroll
        for (int j = 0; j + 4 <= n; j += 4)
            at[j / 4] = make_float4(value[j], value[j + 1], value[j + 2], value[j + 3]);
    } else {
        uint32_t two[4] = {};
#pragma unroll
        for (int j = 0; j < n; ++j) {
            const uint16_t bits =
                dtype == kFloat16 ? float_to_half(value[j]) : float_to_bfloat(value[j]);
            two[j / 2] |= uint32_t(bits) << 16 * (j % 2);
        }
        *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p) + i) =
            make_uint4(two[0], two[1], two[2], two[3]);
    }
}
