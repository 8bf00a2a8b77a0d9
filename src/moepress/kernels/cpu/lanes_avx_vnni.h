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
    static constexpr bool crosses = false;

    struct Sums {  // [16 rows] int32
        Int low = {}, high = {};
        void add_vector(Codes codes, Codes x) {
            low = (Int)_mm256_dpbusd_avx_epi32((__m256i)low, codes.low, x.low);
            high = (Int)_mm256_dpbusd_avx_epi32((__m256i)high, codes.high, x.high);
        }
        void add_bytes(Codes codes, int32_t four) {
            add_vector(codes, {_mm256_set1_epi32(four), _mm256_set1_epi32(four)});
        }
    };

    // vpdpbusd adds four products into 32 bits without saturating, so nothing needs to be carried.
    template <int bits>
    struct Dot : Sums {
        void add(Codes codes, int32_t four) { this->add_bytes(codes, four); }
        void carry() {}
        void join(const Dot& other, int shift) {
            this->low += (Int)_mm256_srai_epi32((__m256i)other.low, shift);
            this->high += (Int)_mm256_srai_epi32((__m256i)other.high, shift);
        }
        Float value() const { return {floats(this->low), floats(this->high)}; }
    };

    static Words low_products(Words a, int multiplier) {
        const __m256i m = _mm256_set1_epi16(int16_t(multiplier));
        return {_mm256_mullo_epi16(a.low, m), _mm256_mullo_epi16(a.high, m)};
    }
    static Words high_products(Words a, int multiplier) {
        const __m256i m = _mm256_set1_epi16(int16_t(multiplier));
        return {_mm256_mulhi_epu16(a.low, m), _mm256_mulhi_epu16(a.high, m)};
    }
    static Words average_products(Words a, int multiplier) {
        const Words low = low_products(a, multiplier), high = high_products(a, multiplier);
        return {_mm256_avg_epu8(low.low, high.low), _mm256_avg_epu8(low.high, high.high)};
    }
    static Words halves(Words a, Words b) {
        return {half_averages(a.low, b.low), half_averages(a.high, b.high)};
    }
    static Words thirds(Words a, Words b) {
        return {half_thirds(a.low, b.low), half_thirds(a.high, b.high)};
    }
    struct Pairs : Sums {
        template <int by>  // 2, 3 or 4
        void multiply() {
            low = by == 3 ? (low << 1) + low : low << by / 2;
            high = by == 3 ? (high << 1) + high : high << by / 2;
        }
        void add_words(Words a, Words b) {
            low = (Int)_mm256_dpwssd_avx_epi32((__m256i)low, a.low, b.low);
            high = (Int)_mm256_dpwssd_avx_epi32((__m256i)high, a.high, b.high);
        }
        void negate() {
            low = -low;
            high = -high;
        }
        void add(Words a, int32_t pair) { add_words(a, splat_four(pair)); }
        Float value(int32_t less) const {
            return {floats(low - uint32_t(less)), floats(high - uint32_t(less))};
        }
    };

  private:
    static __m256i half_averages(__m256i a, __m256i b) {
        const __m256i low = _mm256_set1_epi16(255);
        return _mm256_avg_epu8(
            _mm256_blendv_epi8(b, a, low),
            _mm256_or_si256(_mm256_srli_epi16(a, 8), _mm256_slli_epi16(b, 8)));
    }
    static __m256i half_thirds(__m256i a, __m256i b) {
        const __m256i third = _mm256_set1_epi16(10923);  // of 2^15
        return _mm256_or_si256(_mm256_mulhrs_epi16(a, third),
                               _mm256_slli_epi16(_mm256_mulhrs_epi16(b, third), 8));
    }
};

}  // namespace
}  // namespace moepress
