// The two instructions of AVX-VNNI that the kernels take, in plain C++.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// sum [8] int32 += the products of each 4 bytes: `a` without sign, `b` with.
inline __m256i emulated_dpbusd(__m256i sum, __m256i a, __m256i b) {
    uint32_t total[8];  // modulo 2^32
    uint8_t first[32];
    int8_t second[32];
    std::memcpy(total, &sum, 32);
    std::memcpy(first, &a, 32);
    std::memcpy(second, &b, 32);
    for (int i = 0; i < 32; ++i) total[i / 4] += uint32_t(first[i] * second[i]);
    std::memcpy(&sum, total, 32);
    return sum;
}

// sum [8] int32 += the products of each 2 words, both with signs.
inline __m256i emulated_dpwssd(__m256i sum, __m256i a, __m256i b) {
    uint32_t total[8];
    int16_t first[16], second[16];
    std::memcpy(total, &sum, 32);
    std::memcpy(first, &a, 32);
    std::memcpy(second, &b, 32);
    for (int i = 0; i < 16; ++i) total[i / 2] += uint32_t(first[i] * second[i]);
    std::memcpy(&sum, total, 32);
    return sum;
}

#define _mm256_dpbusd_avx_epi32 emulated_dpbusd
#define _mm256_dpwssd_avx_epi32 emulated_dpwssd
