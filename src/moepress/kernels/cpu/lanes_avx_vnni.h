// `Lanes` for AVX2 with AVX-VNNI (Intel since Alder Lake, AMD Zen 5): those of lanes_avx2.h, except
// that one instruction sums the products of any bytes. The members are explained in
// lanes_portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "lanes_avx2.h"

namespace moepress {
namespace {

struct AvxVnniLanes : Avx2Lanes {
    static constexpr bool sums_any_byte = true;
    static constexpr int sums = 2, most_sums = 4;  // 8 of 16 registers

    struct Sums {  // [16 rows] int32
        __m256i low = _mm256_setzero_si256(), high = _mm256_setzero_si256();
        void add_bytes(Codes codes, int32_t four) {
            const __m256i x = _mm256_set1_epi32(four);
            low = _mm256_dpbusd_avx_epi32(low, codes.low, x);
            high = _mm256_dpbusd_avx_epi32(high, codes.high, x);
        }
    };

    // vpdpbusd adds four products into 32 bits without saturating, so nothing needs to be carried.
    template <int bits>
    struct Dot : Sums {
        void add(Codes codes, int32_t four) { this->add_bytes(codes, four); }
        void carry() {}
        void join(const Dot& other, int shift) {
            this->low = _mm256_add_epi32(this->low, _mm256_srai_epi32(other.low, shift));
            this->high = _mm256_add_epi32(this->high, _mm256_srai_epi32(other.high, shift));
        }
        Float value() const { return {_mm256_cvtepi32_ps(this->low), _mm256_cvtepi32_ps(this->high)}; }
    };

    static Words low_products(Words a, int multiplier) {
        const __m256i m = _mm256_set1_epi16(int16_t(multiplier));
        return {_mm256_mullo_epi16(a.low, m), _mm256_mullo_epi16(a.high, m)};
    }
    static Words high_products(Words a, int multiplier) {
        const __m256i m = _mm256_set1_epi16(int16_t(multiplier));
        return {_mm256_mulhi_epu16(a.low, m), _mm256_mulhi_epu16(a.high, m)};
    }
    struct Pairs : Sums {
        void add(Words a, int32_t pair) {
            const __m256i x = _mm256_set1_epi32(pair);
            low = _mm256_dpwssd_avx_epi32(low, a.low, x);
            high = _mm256_dpwssd_avx_epi32(high, a.high, x);
        }
        Float value(int32_t less) const {
            const __m256i all = _mm256_set1_epi32(less);
            return {_mm256_cvtepi32_ps(_mm256_sub_epi32(low, all)),
                    _mm256_cvtepi32_ps(_mm256_sub_epi32(high, all))};
        }
    };
};

}  // namespace
}  // namespace moepress
