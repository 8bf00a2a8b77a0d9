// A step of the search in viterbi.cu, which says what a thread holds: its keys, squares and choices.
#pragma once

#include "device.h"
#include "trellis_code.h"

namespace moepress {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRun = 1024;   // steps that are decided together
constexpr int kWindow = 64;  // steps on each side of the seam
constexpr int kAtOnce = 4;   // steps whose choices a thread keeps in one word
constexpr int kPart = 16;    // steps that a thread goes back
constexpr uint32_t kLargest = 65535;  // cost
constexpr uint32_t kMagic = 0x52800001;  // 2^38 + 2^15 as float32, whose steps there are 2^15

// A width by its halves: twice its bits. Steps of parity 0 and 1 have `low` and `high` new bits.
template <int halves>
struct Code {
    static constexpr bool whole = halves % 2 == 0;
    static constexpr int low = halves / 2, high = (halves + 1) / 2;
    static constexpr int branches = 1 << high;
    static constexpr int owned = 16 / branches;  // groups of a thread after a step of parity 0
    static constexpr float unit = halves == 3 ? 52.0f : kUnit[high];  // steps of a target of 1
    static constexpr float widest = 255.0f * unit;  // value at up to 2 bits, in steps
    // The value of a state in a step of that parity. At 1.5 bits they are those of 1 and 2 bits in
    // turn; at 2.5 and 3.5 bits those of 3 and of 4.
    static DEVICE int value(int state, int parity) {
        constexpr uint32_t first = kMultiplier[halves == 3 ? 1 : high], second = kMultiplier[high];
        constexpr int center = kCenter[high];
        static_assert(kCenter[1] == kCenter[2], "the center does not depend on the parity");
        const uint32_t product = uint32_t(state) * (parity ? second : first);
        int sum = int(product & 255) + int(product >> 8 & 255);
        if (high > 2) sum += int(product >> 16 & 255) + int(product >> 24);
        return sum - center;
    }
    // Where the key of a group lies. At 4 bits a thread reads 16 keys of 16 groups apart: these are
    // neighbours, in rows of 20 words.
    static DEVICE int place(int group) {
        return halves == 8 ? group % 16 * 20 + group / 16 : group;
    }
};

// A step of one parity. `now`: its new bits; `next`: those of the next step, which make its groups.
// Before half of the steps at half widths (`parts` 2), a group is half of one of the other steps:
// a thread then has twice as many, in two parts of all groups, and the same states.
template <int halves, int parity>
struct Step {
    using C = Code<halves>;
    static constexpr int now = parity ? C::high : C::low, next = parity ? C::low : C::high;
    static constexpr int parts = 1 << (C::high - next);
    static constexpr int groups = parts * C::owned;  // of a thread
    static constexpr int branches = 1 << next;
    static constexpr uint32_t mask = branches - 1;
    static constexpr int apart = kStates >> (next + now);  // groups before, between two j
    // Runs of a part's owned groups that share predecessors.
    static constexpr int runs = C::owned >> now > 1 ? C::owned >> now : 1;
    static constexpr int apart_parts = kStates >> C::high;  // groups between two parts
    // The group, part * owned + its number in the part, of a thread.
    static DEVICE int group(int i) {
        return i / C::owned * apart_parts + C::owned * int(threadIdx.x) + i % C::owned;
    }
    // The state (j, group i), among those of the thread.
    static constexpr DEVICE int state(int i, int j) {
        return i % C::owned * C::branches + j * parts + i / C::owned;
    }
};

// The choices of a thread in four steps, in one word: where those of a step begin.
template <int halves>
struct Choices {
    static constexpr int even = Step<halves, 0>::groups * Step<halves, 0>::next;
    static constexpr int odd = Step<halves, 1>::groups * Step<halves, 1>::next;
    static constexpr int first_bit = 32 - kAtOnce / 2 * (even + odd);
    static_assert(first_bit >= 0);
    static DEVICE int begin(int step) {
        return first_bit + step / 2 * (even + odd) + step % 2 * even;
    }
};

struct Shared {
    uint32_t keys[2][kStates / 2];
    uint32_t below[kRun / kPart];  // state before the first step of a part
    float target[kRun + 1];  // one more is read, but not used
    uint16_t states[kRun];
    uint32_t least[kWarps];
    uint32_t group[kWarps];
    bool again[kWarps];
};

// The values of a thread's states, in steps of a target; at 1.5 bits those of both parities.
template <int halves>
struct Values {
    using C = Code<halves>;
    static constexpr bool both = halves == 3;
    static constexpr float shift = 8388608.0f + 32768.0f;  // 2^23, whose last bit is 1, and 2^15
    uint32_t packed[16];

    DEVICE Values() {
        using S = Step<halves, 0>;
#pragma unroll
        for (int i = 0; i < S::groups; ++i)
#pragma unroll
            for (int j = 0; j < S::branches; ++j) {
                const int state = j << (kStateBits - S::next) | S::group(i);
                const float even = float(C::value(state, 0)) * C::unit;
                const float odd = float(C::value(state, 1)) * C::unit;
                packed[S::state(i, j)] =
                    both ? uint32_t(int(even) + 32768) | uint32_t(int(odd) + 32768) << 16
                         : __float_as_uint(even);
            }
    }
    DEVICE float at(int i, int parity) const {
        if (!both) return __uint_as_float(packed[i]);
        return __uint_as_float(__byte_perm(packed[i], 0x4B000000u, parity ? 0x7432 : 0x7410)) - shift;
    }
};

// The keys of a thread's groups after a step.
template <int halves, int parity>
struct Keys {
    uint32_t at[Step<halves, parity>::groups];
};

// The rounded squares of the distances between a target and the values of a thread's states, plus
// kMagic.
template <int halves, bool clamps>
DEVICE void square(const Values<halves>& values, int parity, float x, uint32_t* squares) {
    const float sign = x > 0 ? -1.0f : 1.0f, size = fabsf(x), limit = x > 0 ? 32767.0f : 32768.0f;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const float value = values.at(i, parity);
        const float d = clamps ? fminf(fmaf(value, sign, size), limit) : x - value;
        // (d * d + 2^14) >> 15 above kMagic: float32 rounds the sum to a multiple of 2^15. A half
        // is rounded to even, which is up: d is then 128 times an odd number, so d * d is
        // 4 n + 1/2 times 2^15, and kMagic is odd.
        squares[i] = __float_as_uint(fmaf(d, d, __uint_as_float(kMagic)));
    }
}

template <int halves>
DEVICE void square(const Values<halves>& values, int parity, float x, uint32_t* squares) {
    if (halves > 4 || fabsf(x) > 32767.0f - Code<halves>::widest)
        square<halves, true>(values, parity, x, squares);
    else
        square<halves, false>(values, parity, x, squares);
}

// One step: from the keys before it, in shared memory, to those after it.
//
// Args:
//   squares: of the thread's states.
//   largest: key of the cost 65535, with j = 0.
template <int halves, int parity>
DEVICE void step(const uint32_t* before, const uint32_t* squares, uint32_t largest,
                 Keys<halves, parity>& keys) {
    using C = Code<halves>;
    using S = Step<halves, parity>;
    const int mine = C::owned * int(threadIdx.x) >> S::now;
    uint32_t from[S::parts][S::runs][S::branches];
    if constexpr (halves == 8) {
#pragma unroll
        for (int j = 0; j < 16; j += 4) {
            const uint4 four = *reinterpret_cast<const uint4*>(before + C::place(mine) + j);
            from[0][0][j] = four.x, from[0][0][j + 1] = four.y, from[0][0][j + 2] = four.z,
            from[0][0][j + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int part = 0; part < S::parts; ++part)
#pragma unroll
            for (int j = 0; j < S::branches; ++j) {
                const uint32_t* const at =
                    before + j * S::apart + part * (S::apart_parts >> S::now) + mine;
                if constexpr (S::runs == 4) {
                    const uint4 four = *reinterpret_cast<const uint4*>(at);
                    from[part][0][j] = four.x, from[part][1][j] = four.y,
                    from[part][2][j] = four.z, from[part][3][j] = four.w;
                } else if constexpr (S::runs == 2) {
                    const uint2 two = *reinterpret_cast<const uint2*>(at);
                    from[part][0][j] = two.x, from[part][1][j] = two.y;
                } else {
                    from[part][0][j] = *at;
                }
            }
    }
#pragma unroll
    for (int i = 0; i < S::groups; ++i) {
        uint32_t least = largest;
#pragma unroll
        for (int j = 0; j < S::branches; ++j)
            least = min(least, squares[S::state(i, j)] * uint32_t(S::branches) +
                                   from[i / C::owned][i % C::owned * S::runs / C::owned][j]);
        keys.at[i] = least;
    }
}

// A key as the next step has it: of as many branches as its own groups have, without a j.
template <int halves, int parity>
DEVICE uint32_t for_next(uint32_t key) {
    using S = Step<halves, parity>;
    if (Code<halves>::whole) return key & ~S::mask;
    return key >> S::next << Step<halves, 1 - parity>::next;
}

// Store the keys of the owned groups as the next step reads them: with the j of its own states.
template <int halves, int parity>
DEVICE void store(uint32_t* after, const Keys<halves, parity>& keys, uint32_t less) {
    using C = Code<halves>;
    using S = Step<halves, parity>;
    const uint32_t j = threadIdx.x >> (8 - C::low);
#pragma unroll
    for (int part = 0; part < S::parts; ++part) {
        uint32_t next[C::owned];
#pragma unroll
        for (int i = 0; i < C::owned; ++i)
            next[i] = for_next<halves, parity>(keys.at[part * C::owned + i] - less) |
                      uint32_t(part) << C::low | j;
        uint32_t* const to = after + C::place(S::group(part * C::owned));
        if constexpr (C::owned == 8) {
            *reinterpret_cast<uint4*>(to) = make_uint4(next[0], next[1], next[2], next[3]);
            *reinterpret_cast<uint4*>(to + 4) = make_uint4(next[4], next[5], next[6], next[7]);
        } else if constexpr (C::owned == 4) {
            *reinterpret_cast<uint4*>(to) = make_uint4(next[0], next[1], next[2], next[3]);
        } else if constexpr (C::owned == 2) {
            *reinterpret_cast<uint2*>(to) = make_uint2(next[0], next[1]);
        } else {
            *to = next[0];
        }
    }
}

// The least key of the block and, of the groups that have it, the first. All threads call this.
template <int halves, int parity>
DEVICE uint2 first_least(Shared& shared, const Keys<halves, parity>& keys) {
    using S = Step<halves, parity>;
    uint32_t least = keys.at[0];
    int at = 0;
#pragma unroll
    for (int i = 1; i < S::groups; ++i)
        if (keys.at[i] < least) least = keys.at[i], at = i;
    const uint32_t of_warp = ~__reduce_max_sync(~0u, ~least);
    const uint32_t group = least == of_warp ? uint32_t(S::group(at)) : ~0u;
    const uint32_t first = ~__reduce_max_sync(~0u, ~group);
    if (lane_id() == 0) {
        shared.least[warp_id()] = of_warp;
        shared.group[warp_id()] = first;
    }
    __syncthreads();
    uint2 found = make_uint2(shared.least[0], shared.group[0]);
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
        const uint2 other = make_uint2(shared.least[w], shared.group[w]);
        if (other.x < found.x || (other.x == found.x && other.y < found.y)) found = other;
    }
    __syncthreads();
    return found;
}

}  // namespace
}  // namespace moepress
