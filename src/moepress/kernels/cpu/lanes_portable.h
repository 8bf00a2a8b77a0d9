// Sixteen rows in four vectors of 16 bytes, which GCC and Clang lower to whatever the machine has:
// NEON on ARM, SSE2 on old x86, plain integers elsewhere.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct Lanes {
    static constexpr int max_width = 4;
    static constexpr bool sums_any_byte = false;  // 16 bits are too few
    static constexpr int sums = 1;

    typedef uint32_t Word __attribute__((vector_size(16)));  // [4 rows], 4 columns to a word
    typedef int32_t Int4 __attribute__((vector_size(16)));   // [4 rows]
    typedef int16_t Short __attribute__((vector_size(16)));  // [4 rows][2]
    typedef float Float4 __attribute__((vector_size(16)));   // [4 rows]

    struct Codes {
        Word part[4];
    };
    struct Float {
        Float4 part[4];
    };

    // Products are taken in 16 bits, where every machine multiplies: of the even columns of a quad,
    // then of the odd ones. A product is at most 127 * 15, a lane gets two for each quad: eight
    // quads stay below 2^15 and are then carried into 32 bits. 8-bit codes are split into two
    // nibbles, each carried for itself.
    template <int bits>
    struct Dot {
        Int4 sum[4] = {};
        Short part[4] = {}, nibble[4] = {};

        void add(const Codes& codes, int32_t quad) {
            const Short x = (Short)(Word{} + (uint32_t)quad);
            const Short even = x << 8 >> 8, odd = x >> 8;  // with their signs
            for (int i = 0; i < 4; ++i) {
                const Word c = codes.part[i];
                if constexpr (bits == 8) {
                    part[i] += product<0x000F000Fu>(c, even, odd);
                    nibble[i] += product<0x000F000Fu>(c >> 4, even, odd);
                } else {
                    part[i] += product<0x00FF00FFu>(c, even, odd);
                }
            }
        }
        void carry() {
            for (int i = 0; i < 4; ++i) {
                sum[i] += halves(part[i]);
                part[i] = Short{};
                if constexpr (bits == 8) {
                    sum[i] += halves(nibble[i]) * 16;
                    nibble[i] = Short{};
                }
            }
        }
        void join(const Dot& other, int) {
            for (int i = 0; i < 4; ++i) sum[i] += other.sum[i];
        }
        Float value() const {
            Float out;
            for (int i = 0; i < 4; ++i) out.part[i] = __builtin_convertvector(sum[i], Float4);
            return out;
        }

      private:
        template <uint32_t mask>
        static Short product(Word codes, Short even, Short odd) {
            return (Short)(codes & mask) * even + (Short)(codes >> 8 & mask) * odd;
        }
        static Int4 halves(Short pair) { return ((Int4)pair << 16 >> 16) + ((Int4)pair >> 16); }
    };

    static Codes load(const uint8_t* chunk) {
        Codes out;
        std::memcpy(&out, chunk, 64);
        return out;
    }

    // `bits` bits at `shift` of each byte
    template <int bits, int shift, bool in_place = false>
    static Codes field(Codes chunk) {
        static_assert(!in_place);
        if constexpr (bits < 8)
            for (Word& part : chunk.part) part = part >> shift & 0x01010101u * ((1u << bits) - 1);
        return chunk;
    }

    // low | bit `shift` of each byte of `high`, moved to bit 2
    template <int shift>
    static Codes with_high(Codes low, const Codes& high) {
        const Codes bit = field<1, shift>(high);
        for (int i = 0; i < 4; ++i) low.part[i] |= bit.part[i] << 2;
        return low;
    }

    static void prefetch(const uint8_t* at) { __builtin_prefetch(at, 0, 2); }

    static Float zero() { return splat(0); }
    static Float splat(float value) {
        const Float4 part = {value, value, value, value};
        return {part, part, part, part};
    }
    static void store(float* at, const Float& value) { std::memcpy(at, &value, 64); }
    static Float mul(Float a, const Float& b) {
        for (int i = 0; i < 4; ++i) a.part[i] *= b.part[i];
        return a;
    }
    static Float mul_add(Float a, const Float& b, const Float& c) {  // ab + c
        for (int i = 0; i < 4; ++i) a.part[i] = a.part[i] * b.part[i] + c.part[i];
        return a;
    }
    static Float mul_sub(Float a, const Float& b, const Float& c) {  // ab - c
        for (int i = 0; i < 4; ++i) a.part[i] = a.part[i] * b.part[i] - c.part[i];
        return a;
    }

    static Float bfloat16(const uint8_t* at) {  // [16] bfloat16, little endian
        Float out;
        uint32_t bits[16];
        for (int r = 0; r < 16; ++r) bits[r] = uint32_t(at[2 * r]) << 16 | uint32_t(at[2 * r + 1]) << 24;
        std::memcpy(&out, bits, 64);
        return out;
    }
    static Float bytes(const uint8_t* at) {  // [16] uint8
        Float out;
        for (int r = 0; r < 16; ++r) out.part[r / 4][r % 4] = at[r];
        return out;
    }
};

}  // namespace
