// `Lanes` for AVX2 and FMA (x86 since 2013): sixteen rows in two 256-bit registers. The members are
// explained in lanes_portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace moepress {
namespace {

struct Avx2Lanes {
    static constexpr int max_width = 4;  // 8 of 16 registers hold integer sums
    static constexpr bool sums_any_byte = false;  // 16 bits are too few
    static constexpr int byte_offset = 0;
    static constexpr int sums = 2, most_sums = 2;

    struct Codes {  // [16 rows][4 columns] uint8
        __m256i low, high;
    };
    struct Float {  // [16]
        __m256 low, high;
    };

    // vpmaddubsw adds two products into 16 bits and saturates. A product is at most 127 * (2^bits -
    // 1) and a quad adds two of them to a sum, so 2^14 / (127 * (2^bits - 1)) quads fit: 128, 43,
    // 18, 8 at 1, 2, 3, 4 bits. After eight quads, `carry` moves the sums into 32 bits. 8-bit codes
    // are split into two nibbles, which are summed separately.
    template <int bits>
    struct Dot {
        __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};      // [8] int32
        __m256i part[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};     // [16] int16
        __m256i nibble[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};   // 8 bits only

        void add(Codes codes, int32_t four) {
            const __m256i x = _mm256_set1_epi32(four);
            add_half(0, codes.low, x);
            add_half(1, codes.high, x);
        }
        void carry() {
            const __m256i ones = _mm256_set1_epi16(1);
            for (int i = 0; i < 2; ++i) {
                sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(part[i], ones));
                part[i] = _mm256_setzero_si256();
                if constexpr (bits == 8) {
                    const __m256i high = _mm256_madd_epi16(nibble[i], ones);
                    sum[i] = _mm256_add_epi32(sum[i], _mm256_slli_epi32(high, 4));
                    nibble[i] = _mm256_setzero_si256();
                }
            }
        }
        void join(const Dot& other, int) {
            for (int i = 0; i < 2; ++i) sum[i] = _mm256_add_epi32(sum[i], other.sum[i]);
        }
        Float value() const { return {_mm256_cvtepi32_ps(sum[0]), _mm256_cvtepi32_ps(sum[1])}; }

      private:
        void add_half(int i, __m256i codes, __m256i x) {
            if constexpr (bits == 8) {
                const __m256i mask = _mm256_set1_epi8(15);
                const __m256i high = _mm256_and_si256(_mm256_srli_epi32(codes, 4), mask);
                nibble[i] = _mm256_add_epi16(nibble[i], _mm256_maddubs_epi16(high, x));
                codes = _mm256_and_si256(codes, mask);
            }
            part[i] = _mm256_add_epi16(part[i], _mm256_maddubs_epi16(codes, x));
        }
    };

    static Codes load(const uint8_t* chunk) {
        return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(chunk)),
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(chunk + 32))};
    }

    // Bits `shift` to `shift + bits - 1` of each byte, moved to bit 0; in place: not moved.
    template <int bits, int shift, bool in_place = false>
    static Codes field(Codes chunk) {
        if constexpr (bits == 8) return chunk;
        constexpr int moved = in_place ? 0 : shift, kept = in_place ? shift : 0;
        const __m256i mask = _mm256_set1_epi8(int8_t(((1 << bits) - 1) << kept));
        return {_mm256_and_si256(_mm256_srli_epi32(chunk.low, moved), mask),
                _mm256_and_si256(_mm256_srli_epi32(chunk.high, moved), mask)};
    }

    // `low`, with bit `shift` of each byte of `high` as bit 2.
    template <int shift>
    static Codes with_high(Codes low, Codes high) {
        const Codes bit = field<1, shift>(high);
        return {_mm256_or_si256(low.low, _mm256_slli_epi32(bit.low, 2)),
                _mm256_or_si256(low.high, _mm256_slli_epi32(bit.high, 2))};
    }

    [[gnu::always_inline]] static void prefetch(const uint8_t* at) {
        _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
    }

    static Float zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static Float splat(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
    static void store(float* at, Float value) {
        _mm256_storeu_ps(at, value.low);
        _mm256_storeu_ps(at + 8, value.high);
    }
    static Float mul(Float a, Float b) {
        return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
    }
    static Float mul_add(Float a, Float b, Float c) {  // ab + c
        return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
    }
    static Float mul_sub(Float a, Float b, Float c) {  // ab - c
        return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
    }

    static Float bfloat16(const uint8_t* at) { return {wide(at), wide(at + 16)}; }  // [16] bfloat16
    static Float bytes(const uint8_t* at) {                                         // [16] uint8
        const __m128i byte = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
        return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(byte)),
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(byte, 8)))};
    }

    static Float load_floats(const float* at) {
        return {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)};
    }

    // Trellis matrices (trellis_product.h).

    static constexpr int tokens = 2, runs = 2;  // 8 of 16 registers hold sums
    static constexpr int many_tokens = 4, many_runs = 1;
    static constexpr bool crosses = true;
    static constexpr bool cheap_windows = false;
    using Words = Codes;
    static Words words(const uint8_t* at) { return load(at); }
    // Of each word: the low 16 - end bits of `before`, then the high `end` bits of `word`.
    template <int end>
    static Words window(Words before, Words word) {
        return {half_window<end>(before.low, word.low), half_window<end>(before.high, word.high)};
    }
    template <int n>
    static Words shift_right(Words a) {
        return {_mm256_srli_epi16(a.low, n), _mm256_srli_epi16(a.high, n)};
    }
    static Words masked(Words a, int mask) {
        const __m256i all = _mm256_set1_epi16(int16_t(mask));
        return {_mm256_and_si256(a.low, all), _mm256_and_si256(a.high, all)};
    }
    // Of each word * multiplier, 32 bits: the sum of the low two bytes, or of all four.
    template <bool four>
    static Words byte_sums(Words a, int multiplier) {
        const __m256i m = _mm256_set1_epi16(int16_t(multiplier));
        return {half_sums<four>(a.low, m), half_sums<four>(a.high, m)};
    }
    // Of the same: the average of byte 0 and byte 2 plus that of byte 1 and byte 3, rounded up.
    static Words average_sums(Words a, int multiplier) {
        const __m256i m = _mm256_set1_epi16(int16_t(multiplier));
        return {half_average_sums(a.low, m), half_average_sums(a.high, m)};
    }
    static Words splat_four(int32_t four) {
        return {_mm256_set1_epi32(four), _mm256_set1_epi32(four)};
    }
    static Words add_words(Words a, Words b) {
        return {_mm256_add_epi16(a.low, b.low), _mm256_add_epi16(a.high, b.high)};
    }
    // [8] int32, modulo 2^32. A type of its own, since GCC copies a sum that is an __m256i at each
    // addition.
    typedef uint32_t Int __attribute__((vector_size(32)));
    struct Pairs {  // [16 rows] int32: sums over pairs of columns
        Int low = {}, high = {};
        void add(Words a, int32_t pair) { add_words(a, splat_four(pair)); }
        void add_words(Words a, Words b) {
            low += (Int)_mm256_madd_epi16(a.low, b.low);
            high += (Int)_mm256_madd_epi16(a.high, b.high);
        }
        void negate() {
            low = -low;
            high = -high;
        }
        template <int by>  // 2
        void multiply() {
            static_assert(by == 2);
            low += low;
            high += high;
        }
        Float value(int32_t less) const {
            return {floats(low - uint32_t(less)), floats(high - uint32_t(less))};
        }
    };

  protected:
    static __m256 floats(Int a) { return _mm256_cvtepi32_ps((__m256i)a); }

  private:
    template <int end>
    static __m256i half_window(__m256i before, __m256i word) {
        return _mm256_or_si256(_mm256_srli_epi16(word, 16 - end), _mm256_slli_epi16(before, end));
    }
    template <bool four>
    static __m256i half_sums(__m256i a, __m256i m) {
        const __m256i ones = _mm256_set1_epi8(1);
        __m256i sum = _mm256_maddubs_epi16(_mm256_mullo_epi16(a, m), ones);
        if constexpr (four)
            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(_mm256_mulhi_epu16(a, m), ones));
        return sum;
    }
    static __m256i half_average_sums(__m256i a, __m256i m) {
        const __m256i pairs = _mm256_avg_epu8(_mm256_mullo_epi16(a, m), _mm256_mulhi_epu16(a, m));
        return _mm256_maddubs_epi16(pairs, _mm256_set1_epi8(1));
    }
    static __m256 wide(const uint8_t* at) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
};

}  // namespace
}  // namespace moepress
