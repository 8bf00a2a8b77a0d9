// `Lanes` for AVX-512 with VNNI (Intel Ice Lake, AMD Zen 4 and later): sixteen rows in one 512-bit
// register. The members are explained in lanes_portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace moepress {
namespace {

struct Avx512Lanes {
    static constexpr int max_width = 16;  // 32 registers: 16 integer and 16 float sums
    static constexpr bool sums_any_byte = true;
    static constexpr int byte_offset = 0;
    static constexpr int sums = 4;  // vpdpbusd takes 4 cycles, and one starts every cycle
    static constexpr int most_sums = 8;

    using Codes = __m512i;  // [16 rows][4 columns] uint8
    // [16] int32, modulo 2^32. A type of its own, since GCC copies a sum that is an __m512i at each
    // addition.
    typedef uint32_t Int __attribute__((vector_size(64)));
    using Float = __m512;   // [16] float

    // vpdpbusd adds four products into 32 bits without saturating, so nothing needs to be carried.
    template <int bits>
    struct Dot {
        Int sum = {};
        void add(Codes codes, int32_t four) { sum = dpbusd(sum, codes, _mm512_set1_epi32(four)); }
        void carry() {}
        void join(const Dot& other, int shift) {
            sum += (Int)_mm512_srai_epi32((__m512i)other.sum, unsigned(shift));
        }
        Float value() const { return _mm512_cvtepi32_ps((__m512i)sum); }
    };

    static Codes load(const uint8_t* chunk) { return _mm512_loadu_si512(chunk); }

    // Bits `shift` to `shift + bits - 1` of each byte, moved to bit 0; in place: not moved.
    template <int bits, int shift, bool in_place = false>
    static Codes field(Codes chunk) {
        if constexpr (bits == 8) return chunk;
        constexpr int mask = ((1 << bits) - 1) << (in_place ? shift : 0);
        if constexpr (!in_place) chunk = _mm512_srli_epi32(chunk, shift);
        return _mm512_and_si512(chunk, _mm512_set1_epi8(int8_t(mask)));
    }

    // `low`, with bit `shift` of each byte of `high` as bit 2.
    template <int shift>
    static Codes with_high(Codes low, Codes high) {
        if constexpr (shift > 2) high = _mm512_srli_epi32(high, shift - 2);
        if constexpr (shift < 2) high = _mm512_slli_epi32(high, 2 - shift);
        return _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi8(4), 0xF8);  // a | (b & c)
    }

    [[gnu::always_inline]] static void prefetch(const uint8_t* at) {
        _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
    }

    static Float zero() { return _mm512_setzero_ps(); }
    static Float splat(float value) { return _mm512_set1_ps(value); }
    static void store(float* at, Float value) { _mm512_storeu_ps(at, value); }
    static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
    static Float mul_add(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }   // ab + c
    static Float mul_sub(Float a, Float b, Float c) { return _mm512_fmsub_ps(a, b, c); }   // ab - c

    static Float bfloat16(const uint8_t* at) {  // [16] bfloat16
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    static Float bytes(const uint8_t* at) {  // [16] uint8
        const __m128i byte = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(byte));
    }
    static Float load_floats(const float* at) { return _mm512_loadu_ps(at); }

    // Trellis matrices (trellis_product.h).

    static constexpr int tokens = 4, runs = 4;  // 16 of 32 registers hold sums
    static constexpr int many_tokens = 8, many_runs = 2;
    static constexpr bool crosses = false;  // except on AMD: dispatch.cpp
    static constexpr bool cheap_windows = false;
    using Words = __m512i;
    static Words words(const uint8_t* at) { return load(at); }
    // Of each word: the low 16 - end bits of `before`, then the high `end` bits of `word`.
    template <int end>
    static Words window(Words before, Words word) {
        return _mm512_or_si512(shift_right<16 - end>(word), _mm512_slli_epi16(before, end));
    }
    template <int n>
    static Words shift_right(Words a) {
        return _mm512_srli_epi16(a, n);
    }
    static Words masked(Words a, int mask) {
        return _mm512_and_si512(a, _mm512_set1_epi16(int16_t(mask)));
    }
    // Of each word * multiplier, 32 bits: the low half, the high half.
    static Words low_products(Words a, int multiplier) {
        return _mm512_mullo_epi16(a, _mm512_set1_epi16(int16_t(multiplier)));
    }
    static Words high_products(Words a, int multiplier) {
        return _mm512_mulhi_epu16(a, _mm512_set1_epi16(int16_t(multiplier)));
    }
    // Of the same: the averages of byte 0 and byte 2, and of byte 1 and byte 3, rounded up.
    static Words average_products(Words a, int multiplier) {
        return _mm512_avg_epu8(low_products(a, multiplier), high_products(a, multiplier));
    }
    // Of the same: the sum of the low two bytes, or of all four.
    template <bool four>
    static Words byte_sums(Words a, int multiplier) {
        const __m512i ones = _mm512_set1_epi8(1);
        __m512i sum = _mm512_maddubs_epi16(low_products(a, multiplier), ones);
        if constexpr (four)
            sum = _mm512_add_epi16(sum,
                                   _mm512_maddubs_epi16(high_products(a, multiplier), ones));
        return sum;
    }
    static Words splat_four(int32_t four) { return _mm512_set1_epi32(four); }
    static Words add_words(Words a, Words b) { return _mm512_add_epi16(a, b); }
    struct Pairs {  // [16 rows] int32: sums over pairs of columns
        Int sum = {};
        void add(Words a, int32_t pair) { add_words(a, splat_four(pair)); }
        void add_bytes(Words a, int32_t four) { sum = dpbusd(sum, a, splat_four(four)); }
        void add_words(Words a, Words b) {
            sum = (Int)_mm512_dpwssd_epi32((__m512i)sum, a, b);
        }
        template <int by>  // 2, 3 or 4
        void multiply() {
            sum = by == 3 ? (sum << 1) + sum : sum << by / 2;
        }
        void negate() { sum = -sum; }
        Float value(int32_t less) const {
            return _mm512_cvtepi32_ps(_mm512_sub_epi32((__m512i)sum, splat_four(less)));
        }
    };
    static Words halves(Words a, Words b) { return averages(a, b, window<8>(b, a)); }
    static Words thirds(Words a, Words b) {
        const __m512i third = _mm512_set1_epi16(10923);  // of 2^15
        return _mm512_or_si512(_mm512_mulhrs_epi16(a, third),
                               _mm512_slli_epi16(_mm512_mulhrs_epi16(b, third), 8));
    }

  protected:
    // Each byte of `crossed` is the other one of its word: the high bytes of a, the low ones of b.
    static Words averages(Words a, Words b, Words crossed) {
        // 0xCA: bits of the second where the first has ones, else of the third.
        const __m512i low = _mm512_set1_epi16(255);
        return _mm512_avg_epu8(_mm512_ternarylogic_epi32(low, a, b, 0xCA), crossed);
    }

  private:
    static Int dpbusd(Int sum, __m512i a, __m512i b) {
        return (Int)_mm512_dpbusd_epi32((__m512i)sum, a, b);
    }
};

}  // namespace
}  // namespace moepress
