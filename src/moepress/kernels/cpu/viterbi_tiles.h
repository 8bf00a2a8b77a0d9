// One step of Viterbi's algorithm in vectors of 16-bit integers. `Vector` (viterbi_avx512.h,
// viterbi_avx2.h) names the instructions.
//
// A step keeps no cost of a state, only `best`: for the states (q, b) = 2^bits q + b of one group
// q, the least cost of their predecessors. With s = (j, u, c, b), where j are the `bits` oldest
// bits and b the newest, and x the target,
//
//     next(u, c, b) = min over j of  best(j, u, c) + (x - v(j, u, c, b))^2
//
// At half widths b has the bits of the branch of this step, and j those of the next one.
//
// A tile is one u: `chunk` values of c times 2^bits of b, as much as two vectors hold. Each chunk
// of `best` is loaded into a vector several times side by side, once for each b. The minimum over j
// is then a minimum of whole vectors. At the end of a tile the two sums change their order from
// (b, c) to (c, b). No cost moves between lanes otherwise, and the values are stored in the order
// in which the tiles read them.
//
// Which predecessor was best is not stored: `trace` (viterbi.h, viterbi_trace_avx2.h) computes it
// for the states of the best path only.
//
// Cost of a vector of states: a difference, a square, a sum and 1 - 2^-bits minima; to reorder,
// 2^-bits permutations with AVX-512 (a vpermt2w for each of two sums), two or three times as many
// with AVX2: 4 operations in all, 4.1 to 4.5 with AVX2. Loads: 1 of values, 1/2 of `best`; stores:
// 2^-bits. What a step reads and writes, 8 KB of values and twice 8 KB / 2^bits of `best`, stays in
// the first-level cache.
//
// A step is 128 vectors of 512 bits. Zen 4 starts two such operations in a cycle, of which one is a
// product or a saturating sum or difference; one load; half a store. So a step takes 256 cycles for
// its operations, 192 for its loads and 16 to 128 for its stores. With saturating sums it takes
// 384: hence plain sums while all costs are small. Measured: 305 to 340 cycles, and 315 for the
// four operations alone, without loads and stores.
#pragma once

#include <cstdint>

#include "trellis_code.h"
#include "viterbi.h"

namespace moepress {
namespace {

template <class Vector>
struct TileSearch {
    template <int width, int phase>
    struct Tile {
        static constexpr int bits = branch_bits(width, phase);
        static constexpr int next_bits = branch_bits(width, phase + 1);
        static constexpr int predecessors = 1 << next_bits;
        static constexpr int words = 2 * Vector::width;  // of a tile's two sums
        static constexpr int chunk = words >> bits;      // values of c
        static constexpr int tiles = kStates / predecessors / words;
        static constexpr int apart = kStates >> (bits + next_bits);  // words between two j
        static_assert(tiles >= 1 && chunk * tiles == apart);
    };

    // The values of all states in the order in which the tiles read them. Lane `chunk * i + c` of
    // sum `a` belongs to branch 2 i + a.
    template <int width, int phase>
    struct alignas(64) Values {
        int16_t at[kStates];
        Values() {
            using T = Tile<width, phase>;
            int16_t* next = at;
            for (int u = 0; u < T::tiles; ++u)
                for (int j = 0; j < T::predecessors; ++j)
                    for (int a = 0; a < 2; ++a)
                        for (int lane = 0; lane < Vector::width; ++lane) {
                            const int q = j * T::apart + u * T::chunk + lane % T::chunk;
                            const int branch = lane / T::chunk * 2 + a;
                            *next++ = value_in_steps<width, phase>(q << T::bits | branch);
                        }
        }
    };

    template <int width, int phase>
    static bool step(const uint16_t* best, int16_t target, bool small, uint16_t* next) {
        return small ? all_tiles<width, phase, true>(best, target, next)
                     : all_tiles<width, phase, false>(best, target, next);
    }

  private:
    // `small`: no sum of a cost and a square, 32768 at most, needs saturation.
    template <int width, int phase, bool small>
    static bool all_tiles(const uint16_t* best, int16_t target, uint16_t* next) {
        using T = Tile<width, phase>;
        const int16_t* values = constant<Values<width, phase>>().at;
        const auto x = Vector::splat(target);
        const auto cost = [&](auto before, const int16_t* at) {
            const auto square = Vector::square(Vector::minus_to_limit(x, Vector::load(at)));
            return small ? Vector::plus(before, square) : Vector::plus_to_limit(before, square);
        };
        auto all = Vector::splat(0);
#pragma GCC unroll 2
        for (int u = 0; u < T::tiles; ++u) {
            auto even = x, odd = x;
#pragma GCC unroll 16
            for (int j = 0; j < T::predecessors; ++j) {
                const auto before = Vector::template repeat<T::chunk>(best + j * T::apart);
                const auto a = cost(before, values);
                const auto b = cost(before, values + Vector::width);
                values += T::words;
                even = j == 0 ? a : Vector::least(even, a);
                odd = j == 0 ? b : Vector::least(odd, b);
            }
            all = Vector::any(all, even, odd);
            Vector::template store<T::bits>(even, odd, next);
            best += T::chunk;
            next += T::words;
        }
        return Vector::no_high_bit(all);
    }
};

}  // namespace
}  // namespace moepress
