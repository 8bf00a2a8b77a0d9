// `Lanes` for every machine: sixteen rows in four vectors of 16 bytes, which GCC and Clang lower to
// what the machine has: NEON on ARM, SSE2 on old x86, plain integers elsewhere.
//
// This is the plainest of the lanes_*.h, so it says what `Lanes` means to its users. A `Lanes`
// computes 16 rows of a matrix side by side.
//
//     max_width       most tokens of a scalar panel: their sums must fit the registers
//     sums_any_byte   whether a Dot can sum any bytes without overflow: then codes of fewer bits
//                     may stay where they are in their bytes (scalar_product.h, kInPlace)
//     byte_offset     how much less than their value low_products and average_products store bytes;
//                     0 except where only signed bytes can be multiplied
//     sums            sums that one token should have, to hide the latency of an addition
//     most_sums       sums that one token may have where codes stay where they are
//
//     Codes           [16 rows][4 columns] uint8: a quad of scalar codes
//     load            64 bytes of packed codes
//     field           bits of each byte; with_high: a third bit from another plane
//     Dot<bits>       [16 rows] int32, a sum of products of `bits`-bit codes and 8-bit activations.
//       add           a quad times the activations of its 4 columns, 4 int8 in an int32
//       carry         called after 8 quads
//       join          add another sum, shifted right by `shift` where codes were left in place
//       value         the sum as floats
//
//     tokens, runs    of a trellis panel and slab that are multiplied together: their sums must fit
//                     the registers (trellis_product.h, add_group)
//     cheap_windows   whether `window` takes one or two instructions
//     Words           [16 rows][2 columns] uint16: a word of the 32 paths of a trellis tile
//     words           load 64 bytes
//     window          of each path, the 16 bits that end at bit `end` (trellis_product.h)
//     shift_right, masked     per word
//     byte_sums       per word, see `code_value` (trellis_code.h)
//     low_products, average_products   if sums_any_byte: bytes of the products that it sums, or
//                     averages of these bytes: `Form` (trellis_tile.h)
//     average_sums    else: the sums of these averages
//     Pairs           [16 rows] int32, a sum over pairs of columns
//       add           words times the activations of their 2 columns, 2 int16 in an int32
//       add_bytes     if sums_any_byte: bytes [16 rows][2 columns][2] times the activations of
//                     their 2 columns, 4 int8 in an int32
//       multiply      by 2; for many tokens, if sums_any_byte, by 3 and 4 too
//       value         (sum - less) as floats
//
// For many tokens (trellis_many.h):
//
//     many_tokens, many_runs  tokens, and runs of 16 rows, multiplied together: their sums and the
//                     operands of the runs must fit the registers. NEON has none of what follows
//     crosses         whether two additions of 16-bit numbers and a product cost less than two
//                     products: then CrossedWords are best
//     splat_four      4 bytes, 16 times
//     add_words       sums of words
//     Pairs::add_words        words times words, all with signs
//     Pairs::negate
//     if sums_any_byte (trellis_bytes.h):
//     halves, thirds  of two registers of products, or of sums of bytes t: (byte0 + byte1 + 1) div 2,
//                     or (10923 t + 2^14) div 2^15, which is t / 3, rounded; each a byte [16 rows][2
//                     columns][2 registers]
//
//     Float           [16 rows] float
//     zero, splat, load_floats, store, mul, mul_add, mul_sub
//     bfloat16, bytes      16 numbers of that type as floats
//     prefetch             into the second-level cache. Always inlined: GCC takes a function that
//                          does no more for one without effects, and drops calls of it
#pragma once

#include <cstdint>
#include <cstring>

namespace moepress {
namespace {

struct PortableLanes {
    static constexpr int max_width = 4;
    static constexpr bool sums_any_byte = false;  // 16 bits are too few
    static constexpr int byte_offset = 0;
    static constexpr int sums = 1, most_sums = 1;

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

    // Products are taken in 16 bits, which every machine multiplies: first the even columns of a
    // quad, then the odd ones. A product is at most 127 * 15, and a quad adds two of them to a sum:
    // eight quads stay below 2^15. `carry` then moves them into 32 bits. 8-bit codes are split into
    // two nibbles, which are summed separately.
    template <int bits>
    struct Dot {
        Int4 sum[4] = {};
        Short part[4] = {}, nibble[4] = {};

        void add(const Codes& codes, int32_t four) {
            const Short x = (Short)(Word{} + (uint32_t)four);
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

    // Bits `shift` to `shift + bits - 1` of each byte, moved to bit 0. Never in place here.
    template <int bits, int shift, bool in_place = false>
    static Codes field(Codes chunk) {
        static_assert(!in_place);
        if constexpr (bits < 8)
            for (Word& part : chunk.part) part = part >> shift & 0x01010101u * ((1u << bits) - 1);
        return chunk;
    }

    // `low`, with bit `shift` of each byte of `high` as bit 2.
    template <int shift>
    static Codes with_high(Codes low, const Codes& high) {
        const Codes bit = field<1, shift>(high);
        for (int i = 0; i < 4; ++i) low.part[i] |= bit.part[i] << 2;
        return low;
    }

    [[gnu::always_inline]] static void prefetch(const uint8_t* at) { __builtin_prefetch(at, 0, 2); }

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
        for (int r = 0; r < 16; ++r)
            bits[r] = uint32_t(at[2 * r]) << 16 | uint32_t(at[2 * r + 1]) << 24;
        std::memcpy(&out, bits, 64);
        return out;
    }
    static Float bytes(const uint8_t* at) {  // [16] uint8
        Float out;
        for (int r = 0; r < 16; ++r) out.part[r / 4][r % 4] = at[r];
        return out;
    }
    static Float load_floats(const float* at) {
        Float out;
        std::memcpy(&out, at, 64);
        return out;
    }

    // Trellis matrices (trellis_product.h).

    static constexpr int tokens = 1, runs = 4;
    static constexpr int many_tokens = 2, many_runs = 1;
    static constexpr bool crosses = true;
    static constexpr bool cheap_windows = false;
    typedef uint16_t Word8 __attribute__((vector_size(16)));
    struct Words {
        Word8 part[4];
    };
    static Words words(const uint8_t* at) {
        Words out;
        std::memcpy(&out, at, 64);
        return out;
    }
    // Of each word: the low 16 - end bits of `before`, then the high `end` bits of `word`.
    template <int end>
    static Words window(const Words& before, Words word) {
        for (int i = 0; i < 4; ++i)
            word.part[i] = word.part[i] >> (16 - end) | before.part[i] << end;
        return word;
    }
    template <int n>
    static Words shift_right(Words a) {
        for (Word8& part : a.part) part = part >> n;
        return a;
    }
    static Words masked(Words a, int mask) {
        for (Word8& part : a.part) part &= uint16_t(mask);
        return a;
    }
    // Of each word * multiplier, 32 bits: the low half.
    static Words low_products(Words a, int multiplier) {
        for (Word8& part : a.part) part *= uint16_t(multiplier);
        return a;
    }
    // Of the same: the averages of byte 0 and byte 2, and of byte 1 and byte 3, rounded up.
    static Words average_products(Words a, int multiplier) {
        for (Word8& part : a.part) {
            const Word8 low = part * uint16_t(multiplier), high = high_half(part, multiplier);
            part = half((low & 255) | high << 8) | half(low >> 8 | (high & 0xFF00)) << 8;
        }
        return a;
    }
    // The sum of these two.
    static Words average_sums(Words a, int multiplier) {
        a = average_products(a, multiplier);
        for (Word8& part : a.part) part = (part & 255) + (part >> 8);
        return a;
    }
    // Of the same: the sum of the low two bytes, or of all four.
    template <bool four>
    static Words byte_sums(Words a, int multiplier) {
        for (Word8& part : a.part) {
            const Word8 low = part * uint16_t(multiplier);
            Word8 sum = (low & 255) + (low >> 8);
            if constexpr (four) {
                const Word8 high = high_half(part, multiplier);
                sum += (high & 255) + (high >> 8);
            }
            part = sum;
        }
        return a;
    }
    static Words splat_four(int32_t four) {
        const Word8 part = (Word8)(Word{} + uint32_t(four));
        return {part, part, part, part};
    }
    static Words add_words(Words a, const Words& b) {
        for (int i = 0; i < 4; ++i) a.part[i] += b.part[i];
        return a;
    }
    struct Pairs {  // [16 rows] int32: sums over pairs of columns
        Int4 sum[4] = {};
        void add_words(const Words& a, const Words& b) {
            for (int i = 0; i < 4; ++i) {
                const Int4 x = (Int4)a.part[i], y = (Int4)b.part[i];
                // Modulo 2^32, so without signs.
                sum[i] = (Int4)((Word)sum[i] + (Word)((x << 16 >> 16) * (y << 16 >> 16)) +
                                (Word)((x >> 16) * (y >> 16)));
            }
        }
        void negate() {
            for (Int4& part : sum) part = (Int4)(-(Word)part);
        }
        template <int by>
        void multiply() {
            for (Int4& part : sum) part = (Int4)((Word)part * by);
        }
        void add_bytes(const Words& a, int32_t four) {  // bytes without sign times int8
            for (int i = 0; i < 4; ++i)
                for (int byte = 0; byte < 32; byte += 8)
                    sum[i] += (Int4)((Word)a.part[i] >> byte & 255) * int8_t(four >> byte);
        }
        void add(const Words& a, int32_t pair) {
            const int32_t first = int16_t(pair), second = pair >> 16;
            for (int i = 0; i < 4; ++i) {
                const Word both = (Word)a.part[i];
                sum[i] += (Int4)(both & 0xFFFF) * first + (Int4)(both >> 16) * second;
            }
        }
        Float value(int32_t less) const {
            Float out;
            for (int i = 0; i < 4; ++i)
                out.part[i] =
                    __builtin_convertvector((Int4)((Word)sum[i] - uint32_t(less)), Float4);
            return out;
        }
    };
    static Words halves(Words a, const Words& b) {
        for (int i = 0; i < 4; ++i)
            a.part[i] = half(a.part[i]) | half(b.part[i]) << 8;
        return a;
    }
    static Words thirds(Words a, const Words& b) {
        for (int i = 0; i < 4; ++i)
            a.part[i] = third(a.part[i]) | third(b.part[i]) << 8;
        return a;
    }

  private:
    static Word8 high_half(Word8 a, int multiplier) {
        for (int i = 0; i < 8; ++i) a[i] = uint16_t(uint32_t(a[i]) * uint32_t(multiplier) >> 16);
        return a;
    }
    static Word8 half(Word8 a) { return ((a & 255) + (a >> 8) + 1) >> 1; }
    static Word8 third(Word8 a) {
        for (int i = 0; i < 8; ++i) a[i] = uint16_t((uint32_t(a[i]) * 10923 + (1 << 14)) >> 15);
        return a;
    }
};

}  // namespace
}  // namespace moepress
