// What a warp of trellis_decode multiplies next, on its way from global to shared memory.
//
// Loads to registers would not do: compilers move those for the next pass of a loop to its end, where
// the next pass waits for them. A warp has a ring of four units (32 columns each) of its own, in stages
// of two units (groups of 32 columns: of one); a stage is filled again as soon as it has been read.
//
// The words of a stage lie as lanes read them: 8 bytes of lane 4 r + j are at
//     (unit * words + word) * 256 + r / 4 * 128 + j * 32 + r % 4 * 8,
// so 16 lanes read 128 bytes that follow each other, and lane l of copy i writes bytes 512 i + 16 l.
// Then come the codes, [unit][row][32], and scales and sums of the tokens.
#pragma once

#include "trellis_call.cuh"

namespace moepress {
namespace {

constexpr int kRingUnits = 4;
constexpr int kRingBytes = 6400;  // of a warp

template <int halves, int group_columns>
struct Stage {
    static constexpr int words = Width<halves>::words + 1;  // of `Words`
    static constexpr int units = group_columns < 64 ? 1 : 2;
    static constexpr int stages = kRingUnits / units;
    static constexpr int copies = (units * words + 1) / 2;
    static constexpr int codes = units * words * 256;
    static constexpr int numbers = codes + units * 256;
    static constexpr int bytes = numbers + 64;
};
static_assert(2 * Stage<8, 128>::bytes <= kRingBytes && 4 * Stage<8, 32>::bytes <= kRingBytes, "");

// What a lane multiplies of a unit.
template <int halves>
struct Unit {
    Words<halves> words;
    uint2 x;  // codes of 8 columns of the lane's token
};

// The scale of a group and the sum of its codes, of a token.
struct Numbers {
    float scale;
    int sum;
};

// The copies of a lane, unit after unit.
template <int halves, int group_columns, int planes>
struct Feed {
    using W = Width<halves>;
    using S = Stage<halves, group_columns>;
    const uint8_t* words[S::copies];
    const uint8_t* codes;
    const uint8_t* numbers;
    bool has_token, has_codes, has_number;

    // From `unit` of a slab on. `over`: the slab above.
    DEVICE Feed(const Call& call, const Work& work, const uint8_t* over, const uint8_t* slab,
                int unit) {
        const int lane = lane_id(), tile = lane % 8 / 2;
        const int64_t at = int64_t(unit) * W::unit_bytes + 16 * (lane % 16 / 8 * 2 + lane % 2);
        const uint8_t* const own = slab + (at + W::offset(tile, W::own));
        const uint8_t* const above = over + (at + W::offset(tile, W::own) + 64 * (W::low - 1));
        const uint8_t* const shared = slab + (at + W::offset(tile, 0));
        const auto word = [&](int n) {
            const int w = n % S::words;
            const uint8_t* const from = w == 0            ? above
                                        : w == 1 && W::own ? shared
                                                           : own + 64 * (w - 1 - W::own);
            return from + n / S::words * W::unit_bytes;
        };
#pragma unroll
        for (int i = 0; i < S::copies; ++i)
            words[i] = lane < 16 ? word(2 * i) : word(2 * i + 1);

        // Column r of the mma: token r / 2 + 4 (r mod 2), or plane r mod 2 of token r / 2.
        const int r = lane / 4, j = lane % 4;
        const int token = planes == 1 ? r / 2 + r % 2 * 4 : r / 2;
        has_token = token < work.count;
        has_codes = has_token && j < 2 * S::units;
        const int64_t plane = planes == 1 ? 0 : r % 2;
        const int64_t row = has_token ? row_of(call, work, token) : 0;
        codes = reinterpret_cast<const uint8_t*>(call.q) + (plane * call.rows + row) * call.k +
                unit * kUnitColumns + 16 * j;

        const int counted = lane % 8;  // token
        has_number = lane < 16 && counted < work.count;
        const int64_t groups = call.k / group_columns, group = unit * kUnitColumns / group_columns;
        const int64_t number =
            (has_number ? row_of(call, work, counted) : 0) * groups + group;
        numbers = lane < 8 ? reinterpret_cast<const uint8_t*>(call.scale + number)
                           : reinterpret_cast<const uint8_t*>(call.sum + number);
    }

    // Copy the words of the stage that begins `ahead` units from the current one.
    DEVICE void copy_words(uint8_t* stage, int ahead) const {
#pragma unroll
        for (int i = 0; i < S::copies; ++i)
            if (2 * i + 1 < S::units * S::words || lane_id() < 16)
                cp_async_16(stage + 512 * i + 16 * lane_id(), words[i] + ahead * W::unit_bytes);
    }
    // The same for the codes, and for the numbers of the group that begins there.
    DEVICE void copy_codes(uint8_t* stage, int ahead) const {
        const int r = lane_id() / 4, j = lane_id() % 4;
        if (has_codes)
            cp_async_16(stage + S::codes + j / 2 * 256 + r * 32 + j % 2 * 16,
                        codes + ahead * kUnitColumns);
    }
    DEVICE void copy_numbers(uint8_t* stage, int ahead) const {
        if (has_number)
            cp_async_4(stage + S::numbers + 4 * lane_id(),
                       numbers + ahead * kUnitColumns / group_columns * 4);
    }
    DEVICE void advance(int units, int groups) {
#pragma unroll
        for (int i = 0; i < S::copies; ++i) words[i] += units * W::unit_bytes;
        codes += units * kUnitColumns;
        numbers += groups * 4;
    }

    // A unit of a stage that is there.
    DEVICE Unit<halves> unit(const uint8_t* stage, int unit) const {
        const int r = lane_id() / 4, j = lane_id() % 4;
        const uint8_t* const at = stage + unit * S::words * 256 + r / 4 * 128 + j * 32 + r % 4 * 8;
        Unit<halves> out;
#pragma unroll
        for (int w = 0; w < S::words; ++w)
            out.words.word[w] = *reinterpret_cast<const uint2*>(at + 256 * w);
        out.x = make_uint2(0, 0);
        if (has_token)
            out.x = *reinterpret_cast<const uint2*>(stage + S::codes + 256 * unit + r * 32 + 8 * j);
        return out;
    }
    DEVICE static Numbers number(const uint8_t* stage, int token) {
        const uint8_t* const at = stage + S::numbers + 4 * token;
        return {*reinterpret_cast<const float*>(at), *reinterpret_cast<const int*>(at + 32)};
    }
};

}  // namespace
}  // namespace moepress
