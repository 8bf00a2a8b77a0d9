// The two instructions of AVX-VNNI that the kernels take, in plain C++.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// sum [8] int32 += the products of numbers that follow each other: of each 4 bytes, or 2 words.
template <class First, class Second>
inline __m256i emulated_products(__m256i sum, __m256i a, __m256i b) {
    constexpr int count = 32 / int(sizeof(First)), each = count / 8;
    uint32_t total[8];  // modulo 2^32
    First first[count];
    Second second[count];
    std::memcpy(total, &sum, 32);
    std::memcpy(first, &a, 32);
    std::memcpy(second, &b, 32);
    for (int i = 0; i < count; ++i) total[i / each] += uint32_t(first[i] * second[i]);
    std::memcpy(&sum, total, 32);
    return sum;
}

#define _mm256_dpbusd_avx_epi32 (emulated_products<uint8_t, int8_t>)
#define _mm256_dpwssd_avx_epi32 (emulated_products<int16_t, int16_t>)
