// `Lanes` for 64-bit ARM with the dot products of bytes: sixteen rows in four vectors of 16 bytes.
// NeonLanes serves both kinds of dot product; `Bytes` is the kind:
//
//     SignedBytes     dotprod (sdot), here: Apple M1, AWS Graviton2, Arm since 2018
//     UnsignedBytes   i8mm (usdot), lanes_neon_i8mm.h
//
// sdot multiplies signed bytes with signed ones. So a byte b of 0 to 255 is stored as b - 128, its
// highest bit flipped, and 128 times the sum of the activations makes up for it (byte_offset).
// Codes of up to 4 bits are below 128 and need none of this. The members are explained in
// lanes_portable.h.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace moepress {
namespace {

// A kind of dot product: sums [4] int32 += products of bytes [4][4] and activations [4][4] int8.
struct SignedBytes {
    static constexpr int offset = 128;
    static constexpr bool matrices = false;
    static uint8x16_t stored(uint8x16_t bytes) { return veorq_u8(bytes, vdupq_n_u8(128)); }
    static uint8x16_t averages(uint8x16_t a, uint8x16_t b) {  // of stored bytes, as stored
        return vreinterpretq_u8_s8(vrhaddq_s8(vreinterpretq_s8_u8(a), vreinterpretq_s8_u8(b)));
    }
    static int32x4_t dot(int32x4_t sum, uint8x16_t bytes, int8x16_t x) {
        return vdotq_s32(sum, vreinterpretq_s8_u8(bytes), x);
    }
};

template <class Bytes>
struct NeonLanes {
    static constexpr int max_width = 4;  // 16 of 32 registers hold integer sums
    static constexpr bool sums_any_byte = true;
    static constexpr int byte_offset = Bytes::offset;
    // A dot product takes 3 cycles or less, and up to four start in one: Apple's CPUs, Neoverse V1.
    // A sum has four of them.
    static constexpr int sums = 4, most_sums = 4;

    struct Codes {  // [4][4 rows][4 columns] uint8
        uint8x16_t part[4];
    };
    struct Float {  // [4][4 rows]
        float32x4_t part[4];
    };

    // Dot products add into 32 bits, so nothing needs to be carried.
    template <int bits>
    struct Dot {
        static constexpr bool offset = bits == 8 && byte_offset != 0;
        int32x4_t sum[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
        int32x4_t activations = vdupq_n_s32(0);  // if `offset`: their sum, four times

        void add(const Codes& codes, int32_t four) {
            const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(four));
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) sum[i] = Bytes::dot(sum[i], codes.part[i], x);
            if constexpr (offset) activations = vdotq_s32(activations, vdupq_n_s8(1), x);
        }
        void carry() {}
        void join(const Dot& other, int shift) {
            if (shift + bits == 8) shift = 0;  // the highest field of a byte is moved, see `field`
            const int32x4_t by = vdupq_n_s32(-shift);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)
                sum[i] = vaddq_s32(sum[i], vshlq_s32(other.sum[i], by));
            if constexpr (offset) activations = vaddq_s32(activations, other.activations);
        }
        Float value() const {
            Float out;
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                int32x4_t all = sum[i];
                if constexpr (offset) all = vmlaq_n_s32(all, activations, byte_offset);
                out.part[i] = vcvtq_f32_s32(all);
            }
            return out;
        }
    };

    static Codes load(const uint8_t* chunk) {
        return {{vld1q_u8(chunk), vld1q_u8(chunk + 16), vld1q_u8(chunk + 32),
                 vld1q_u8(chunk + 48)}};
    }

    // Bits `shift` to `shift + bits - 1` of each byte, moved to bit 0; in place: not moved, except
    // the highest. A shift moves that one without a mask, and it would be the sign of signed bytes.
    template <int bits, int shift, bool in_place = false>
    static Codes field(Codes chunk) {
        constexpr int mask = ((1 << bits) - 1) << (in_place ? shift : 0);
#pragma GCC unroll 4
        for (uint8x16_t& part : chunk.part) {
            if constexpr (bits == 8) {
                part = Bytes::stored(part);
            } else if constexpr (shift + bits == 8) {
                part = vshrq_n_u8(part, shift);
            } else {
                if constexpr (!in_place && shift > 0) part = vshrq_n_u8(part, shift);
                part = vandq_u8(part, vdupq_n_u8(mask));
            }
        }
        return chunk;
    }

    // `low`, with bit `shift` of each byte of `high` as bit 2.
    template <int shift>
    static Codes with_high(Codes low, Codes high) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            if constexpr (shift > 2) high.part[i] = vshrq_n_u8(high.part[i], shift - 2);
            if constexpr (shift < 2) high.part[i] = vshlq_n_u8(high.part[i], 2 - shift);
            low.part[i] = vbslq_u8(vdupq_n_u8(4), high.part[i], low.part[i]);
        }
        return low;
    }

    [[gnu::always_inline]] static void prefetch(const uint8_t* at) { __builtin_prefetch(at, 0, 2); }

    static Float zero() { return splat(0); }
    static Float splat(float value) {
        const float32x4_t part = vdupq_n_f32(value);
        return {{part, part, part, part}};
    }
    static void store(float* at, const Float& value) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) vst1q_f32(at + 4 * i, value.part[i]);
    }
    static Float mul(Float a, const Float& b) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) a.part[i] = vmulq_f32(a.part[i], b.part[i]);
        return a;
    }
    static Float mul_add(const Float& a, const Float& b, Float c) {  // ab + c
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) c.part[i] = vfmaq_f32(c.part[i], a.part[i], b.part[i]);
        return c;
    }
    static Float mul_sub(const Float& a, const Float& b, Float c) {  // ab - c
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
            c.part[i] = vfmaq_f32(vnegq_f32(c.part[i]), a.part[i], b.part[i]);
        return c;
    }

    static Float bfloat16(const uint8_t* at) {  // [16] bfloat16
        Float out;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const uint16x4_t half = vreinterpret_u16_u8(vld1_u8(at + 8 * i));
            out.part[i] = vreinterpretq_f32_u32(vshll_n_u16(half, 16));
        }
        return out;
    }
    static Float bytes(const uint8_t* at) {  // [16] uint8
        const uint8x16_t byte = vld1q_u8(at);
        const uint16x8_t low = vmovl_u8(vget_low_u8(byte)), high = vmovl_high_u8(byte);
        return {{vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))), vcvtq_f32_u32(vmovl_high_u16(low)),
                 vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))),
                 vcvtq_f32_u32(vmovl_high_u16(high))}};
    }
    static Float load_floats(const float* at) {
        return {{vld1q_f32(at), vld1q_f32(at + 4), vld1q_f32(at + 8), vld1q_f32(at + 12)}};
    }

    // Trellis matrices (trellis_product.h).

    static constexpr int tokens = 2, runs = 2;  // 16 of 32 registers hold sums
    static constexpr bool crosses = false;
    static constexpr bool cheap_windows = true;
    struct Words {  // [4][4 rows][2 columns] uint16
        uint16x8_t part[4];
    };
    static Words words(const uint8_t* at) {
        const Codes bytes = load(at);
        return {{vreinterpretq_u16_u8(bytes.part[0]), vreinterpretq_u16_u8(bytes.part[1]),
                 vreinterpretq_u16_u8(bytes.part[2]), vreinterpretq_u16_u8(bytes.part[3])}};
    }
    // Of each word: the low 16 - end bits of `before`, then the high `end` bits of `word`.
    template <int end>
    static Words window(Words before, const Words& word) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
            before.part[i] =
                vsriq_n_u16(vshlq_n_u16(before.part[i], end), word.part[i], 16 - end);
        return before;
    }
    template <int n>
    static Words shift_right(Words a) {
#pragma GCC unroll 4
        for (uint16x8_t& part : a.part) part = vshrq_n_u16(part, n);
        return a;
    }
    static Words masked(Words a, int mask) {
#pragma GCC unroll 4
        for (uint16x8_t& part : a.part) part = vandq_u16(part, vdupq_n_u16(uint16_t(mask)));
        return a;
    }
    // Of each word * multiplier, 32 bits: the low half; the averages of its bytes and those of the
    // high half, rounded up. As `Bytes` stores bytes.
    static Words low_products(Words a, int multiplier) {
#pragma GCC unroll 4
        for (uint16x8_t& part : a.part) part = stored(low(part, multiplier));
        return a;
    }
    static Words average_products(Words a, int multiplier) {
#pragma GCC unroll 4
        for (uint16x8_t& part : a.part)
            part = stored(vreinterpretq_u16_u8(
                vrhaddq_u8(vreinterpretq_u8_u16(low(part, multiplier)),
                           vreinterpretq_u8_u16(high(part, multiplier)))));
        return a;
    }
    // Of the same: the sum of the low two bytes, or of all four.
    template <bool four>
    static Words sums_in_order(Words a, int multiplier) {
#pragma GCC unroll 4
        for (uint16x8_t& part : a.part) {
            uint16x8_t sum = vpaddlq_u8(vreinterpretq_u8_u16(low(part, multiplier)));
            if constexpr (four)
                sum = vpadalq_u8(sum, vreinterpretq_u8_u16(high(part, multiplier)));
            part = sum;
        }
        return a;
    }
    // Bytes of two registers, as `Bytes` stores them: of products, of sums in order.
    static uint8x16_t halves(uint16x8_t a, uint16x8_t b) {
        const uint8x16_t first = vreinterpretq_u8_u16(a), second = vreinterpretq_u8_u16(b);
        return Bytes::averages(vtrn1q_u8(first, second), vtrn2q_u8(first, second));
    }
    static uint8x16_t thirds(uint16x8_t a, uint16x8_t b) {
        constexpr int16_t third = 10923;  // of 2^15
        const int16x8_t first = vqrdmulhq_n_s16(vreinterpretq_s16_u16(a), third);
        const int16x8_t second = vqrdmulhq_n_s16(vreinterpretq_s16_u16(b), third);
        return Bytes::stored(vtrn1q_u8(vreinterpretq_u8_s16(first), vreinterpretq_u8_s16(second)));
    }
    // Sums, of each eight rows the first columns, then the second ones: the order in which Pairs
    // multiplies.
    template <bool four>
    static Words byte_sums(const Words& state, int multiplier) {
        const Words a = sums_in_order<four>(state, multiplier);
        return {{vuzp1q_u16(a.part[0], a.part[1]), vuzp2q_u16(a.part[0], a.part[1]),
                 vuzp1q_u16(a.part[2], a.part[3]), vuzp2q_u16(a.part[2], a.part[3])}};
    }
    struct Pairs {  // [16 rows] int32: sums over pairs of columns
        int32x4_t sum[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
        void add(const Words& a, int32_t pair) {
            const int16x4_t x = vreinterpret_s16_s32(vdup_n_s32(pair));
#pragma GCC unroll 2
            for (int i = 0; i < 4; i += 2) {
                const int16x8_t first = vreinterpretq_s16_u16(a.part[i]);
                const int16x8_t second = vreinterpretq_s16_u16(a.part[i + 1]);
                sum[i] = vmlal_lane_s16(sum[i], vget_low_s16(first), x, 0);
                sum[i + 1] = vmlal_high_lane_s16(sum[i + 1], first, x, 0);
                sum[i] = vmlal_lane_s16(sum[i], vget_low_s16(second), x, 1);
                sum[i + 1] = vmlal_high_lane_s16(sum[i + 1], second, x, 1);
            }
        }
        void add_bytes(const Words& a, int32_t four) {
            const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(four));
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)
                sum[i] = Bytes::dot(sum[i], vreinterpretq_u8_u16(a.part[i]), x);
        }
        template <int by>  // 2
        void multiply() {
            static_assert(by == 2);
#pragma GCC unroll 4
            for (int32x4_t& part : sum) part = vaddq_s32(part, part);
        }
        Float value(int32_t less) const {
            Float out;
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)
                out.part[i] = vcvtq_f32_s32(vsubq_s32(sum[i], vdupq_n_s32(less)));
            return out;
        }
    };

  private:
    static uint16x8_t stored(uint16x8_t bytes) {
        return vreinterpretq_u16_u8(Bytes::stored(vreinterpretq_u8_u16(bytes)));
    }
    static uint16x8_t low(uint16x8_t a, int multiplier) {
        return vmulq_n_u16(a, uint16_t(multiplier));
    }
    // For a below 2^12. There is only a signed high half, doubled, of multiplier or of multiplier -
    // 2^16. The latter lacks 2^16 a, which is a in the high half.
    static uint16x8_t high(uint16x8_t a, int multiplier) {
        const int16x8_t word = vreinterpretq_s16_u16(a);
        const int16x8_t doubled = vqdmulhq_n_s16(word, int16_t(multiplier));
        return vreinterpretq_u16_s16(multiplier < 1 << 15 ? vshrq_n_s16(doubled, 1)
                                                          : vsraq_n_s16(word, doubled, 1));
    }
};

using NeonDotprodLanes = NeonLanes<SignedBytes>;

}  // namespace
}  // namespace moepress
