// The best paths of a trellis code through eight columns of many matrices: the CUDA side of
// rounding/methods/viterbi.py, which is the definition and oracle. Same integer costs, same ties.
//
// A block of 256 threads searches one path. A thread owns 16 states, in groups: group q is the 2^bits
// states (j, q), where j are their oldest bits. They are the predecessors of the next step's states
// (q, b), where b are the newest. At half widths, the groups after a step have the bits of the next. As on the CPU (../cpu/viterbi_tiles.h) a step keeps only the least cost of each
// group. Here the choice of j is kept too, a few bits for a group, since computing it again would
// take more memory: choices of four steps make a word of a thread, 256 KB in global memory for the
// 1024 steps of a run.
//
// Costs are keys, cost * 2^bits + j: the least key has the first j of the least cost. They carry
// the constant that float32 squares bring with them (`kMagic`); every 16 steps it is taken off
// together with the least cost. No sum needs to saturate: the minimum starts with the largest cost.
//
// Instructions for a state: difference, square (both float32), key (IMAD) and a minimum, half a one
// on Hopper, where a minimum has three inputs; at 3 and 4 bits, and with large targets, one more to
// limit the difference. A step takes 75 (1, 2 bits) to 95 instructions of a thread by its machine
// code, with loads, stores and choices. So an SM, which starts four warps of them in a cycle, takes
// 150 to 190 cycles for the 4096 states of a step: 5 to 6.3e12 states/s on an H100's 132 SMs at
// 1.755 GHz, or 1.2 to 1.5e9 weights/s. Memory: 256 bytes a step are written and read again, .5 TB/s.
// The way back is a chain of some 40 to 112 loads from the second-level cache for 1024 steps.
//
// Measured on an H200, eight matrices of 28,672 rows (256 blocks), while one thread still went back
// alone and squares were not computed a step ahead: 2.9, 3.4, 3.3 and 3.6e12 states/s at 1 to 4
// bits; one matrix (32 blocks) .6e12. This version was checked on the card, but not timed.
#include "device.h"
#include "trellis_code.h"

using namespace moepress;

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

// One of the kAtOnce steps between two barriers of `pass`.
template <int halves, int parity>
DEVICE void pass_one(Shared& shared, const Values<halves>& values, float next_target,
                     uint32_t (&squares)[16], uint32_t& largest, uint32_t& word,
                     Keys<halves, parity>& keys) {
    using S = Step<halves, parity>;
    largest += kMagic * S::branches;  // what a step adds to all keys
    step<halves, parity>(shared.keys[parity], squares, largest, keys);
    store<halves, parity>(shared.keys[1 - parity], keys, 0);
    largest = for_next<halves, parity>(largest);
#pragma unroll
    for (int i = 0; i < S::groups; ++i) word = __funnelshift_r(word, keys.at[i], S::next);
    square<halves>(values, 1 - parity, next_target, squares);  // while other warps are at this step
}

// Pass `steps` targets, a multiple of 16, from the keys in shared.keys[0]. Writes the choices of all
// steps, and returns the best state after the last one.
template <int halves>
DEVICE int pass(Shared& shared, const Values<halves>& values, int steps, uint32_t* choices) {
    using Last = Step<halves, 1>;
    static_assert(kAtOnce % 2 == 0);
    Keys<halves, 0> even;
    Keys<halves, 1> keys;
    constexpr uint32_t cost_limit = kLargest * Step<halves, 0>::branches;
    uint32_t largest = cost_limit;
    uint2 least = make_uint2(0, 0);
    uint32_t squares[16];
    square<halves>(values, 0, shared.target[0], squares);
    for (int t = 0; t < steps; t += kAtOnce) {
        uint32_t word = 0;
#pragma unroll
        for (int u = 0; u < kAtOnce; u += 2) {
            const float* const target = shared.target + t + u;
            pass_one<halves, 0>(shared, values, target[1], squares, largest, word, even);
            __syncthreads();
            pass_one<halves, 1>(shared, values, target[2], squares, largest, word, keys);
            if (u < kAtOnce - 2) __syncthreads();
        }
        choices[t / kAtOnce * kThreads + int(threadIdx.x)] = word;
        if (t % kSteps == kSteps - kAtOnce) {  // subtract the least cost
            least = first_least<halves, 1>(shared, keys);
            store<halves, 1>(shared.keys[0], keys, least.x & ~Last::mask);
            largest = cost_limit;
        }
        __syncthreads();
    }
    return int((least.x & Last::mask) << (kStateBits - Last::next) | least.y);
}

// From a state of step t to the one of step t - 1, which has that parity.
template <int halves, int parity>
DEVICE uint32_t before(const uint32_t* choices, uint32_t state, int t) {
    using C = Code<halves>;
    using S = Step<halves, parity>;
    const uint32_t group = state >> S::next, in_part = group % S::apart_parts;
    const uint32_t word = choices[(t - 1) / kAtOnce * kThreads + int(in_part) / C::owned];
    const uint32_t i = group / S::apart_parts * C::owned + in_part % C::owned;
    const uint32_t place = Choices<halves>::begin((t - 1) % kAtOnce) + S::next * i;
    return (word >> place & S::mask) << (kStateBits - S::next) | group;
}

// Find the states from step `steps` - 1, where the state is `end`, back to step `last`.
//
// Going back is a chain of loads. So 64 threads take 16 steps each, and start `lead` steps later in
// any state: paths that go back from different states meet soon. A thread that did not meet the
// path of the next one, which shows where the two parts meet, takes its steps once more.
template <int halves>
DEVICE void trace(Shared& shared, const uint32_t* choices, int steps, int end, int last) {
    constexpr int lead = 192 / halves;
    const int thread = int(threadIdx.x), parts = steps / kPart;
    // From a state of step t to the one before.
    const auto back = [&](uint32_t state, int t) {
        return t % 2 ? before<halves, 0>(choices, state, t) : before<halves, 1>(choices, state, t);
    };
    const int first = thread * kPart, top = first + kPart - 1;
    bool again = thread < parts && top >= last;
    uint32_t state = uint32_t(end);
    if (again) {
        const int from = min(top + lead, steps - 1);
        if (from < steps - 1) state = 0;
        for (int t = from; t > top; --t) state = back(state, t);
    }
    for (;;) {
        if (again) {
            shared.states[top] = uint16_t(state);
            for (int t = top; t > first; --t) shared.states[t - 1] = uint16_t(state = back(state, t));
            shared.below[thread] = first ? back(state, first) : 0;
        }
        __syncthreads();
        again = false;
        if (thread < parts - 1 && top >= last) {
            state = shared.below[thread + 1];
            again = shared.states[top] != state;
        }
        const bool any = __any_sync(~0u, again);
        if (lane_id() == 0) shared.again[warp_id()] = any;
        __syncthreads();
        bool more = false;
        for (int w = 0; w < kWarps; ++w) more |= shared.again[w];
        if (!more) return;
    }
}

// The row and column, of the eight, of weight `step` of a path.
DEVICE int64_t place_of(int path, int64_t step, int64_t rows) {
    const int i = int(step % kSteps);
    const int64_t row = step / kSteps * kSlabRows + i / 4 * 16 + path / 2;
    return (i % 4 * 2 + path % 2) * rows + row;
}

struct Columns {  // of one matrix
    const float* target;
    float* feedback;  // until errors take its place; null: none, and no errors are wanted
    uint8_t* branches;
    int64_t rows;
};

template <int halves>
DEVICE float read_target(const Columns& columns, int path, int64_t step) {
    const int64_t at = place_of(path, step, columns.rows);
    float x = columns.target[at];
    if (columns.feedback) x = x + columns.feedback[at];
    x = rintf(x * Code<halves>::unit);
    x = x < -32767.0f ? -32767.0f : x > 32767.0f ? 32767.0f : x;
    return x == x ? x : 0.0f;
}

// The keys before the first step: those of cost 0 for all states, or of one state alone.
template <int halves>
DEVICE void start_keys(Shared& shared, int state) {
    using C = Code<halves>;
    using S = Step<halves, 0>;
    constexpr int groups = kStates >> S::now;
    for (int group = int(threadIdx.x); group < groups; group += kThreads) {
        const bool free = state < 0 || state % groups == group;
        shared.keys[0][C::place(group)] = (free ? 0 : kLargest * S::branches) | group / S::apart;
    }
}

// Not inlined: the values of the states of all widths would be computed first, and fill registers.
template <int halves>
__device__ __noinline__ void find_path(const Columns& columns, int path, uint32_t* choices) {
    using C = Code<halves>;
    Shared& shared = *shared_memory<Shared>();
    const int thread = int(threadIdx.x);
    const int64_t steps = columns.rows / kSlabRows * kSteps;
    const Values<halves> values;
    const int window = int(min(int64_t(kWindow), steps));
    int start = -1, state = -1;  // no state: all are allowed
    for (int64_t first = -kRun; first < steps; first += kRun) {
        const bool seam = first < 0;
        const int here = seam ? 2 * window : int(min(int64_t(kRun), steps - first));
        __syncthreads();
        for (int t = thread; t < here; t += kThreads) {
            const int64_t at_seam = t < window ? steps - window + t : t - window;
            shared.target[t] = read_target<halves>(columns, path, seam ? at_seam : first + t);
        }
        start_keys<halves>(shared, state);
        __syncthreads();
        state = pass<halves>(shared, values, here, choices);
        if (first + kRun >= steps) state = start;
        trace<halves>(shared, choices, here, state, seam ? window - 1 : 0);
        if (seam) {
            start = state = shared.states[window - 1];
            continue;
        }
        for (int t = thread; t < here; t += kThreads) {
            const int64_t at = place_of(path, first + t, columns.rows);
            const int passed = shared.states[t];
            const int mask = (1 << (t % 2 ? C::high : C::low)) - 1;
            columns.branches[at] = uint8_t(passed & mask);
            if (columns.feedback)
                columns.feedback[at] = columns.target[at] - float(C::value(passed, t % 2));
        }
    }
    __syncthreads();
}

}  // namespace

// Find the best paths through columns first .. first + 7 of `matrices` matrices of equal shape.
//
// Args:
//   target: [matrices, columns, rows].
//   feedback: the same shape, added to the target; overwritten with target - value. Null: neither.
//   branches: the same shape, of bytes.
//   halves: [matrices], twice the code bits of each, 2 to 8.
//   choices: [blocks, kRun / kAtOnce, kThreads], scratch.
extern "C" __global__ void __launch_bounds__(kThreads, 3)
moepress_viterbi_search(const float* target, float* feedback, uint8_t* branches,
                        const int32_t* halves, int64_t matrices, int64_t columns, int64_t rows,
                        int64_t first, uint32_t* choices) {
    begin();
    uint32_t* mine = choices + int64_t(blockIdx.x) * (kRun / kAtOnce * kThreads);
    for (int64_t i = blockIdx.x; i < matrices * kPaths; i += gridDim.x) {
        const int64_t matrix = i / kPaths, at = (matrix * columns + first) * rows;
        const int path = int(i % kPaths);
        const Columns here{target + at, feedback ? feedback + at : nullptr, branches + at, rows};
        switch (halves[matrix]) {
            case 2: find_path<2>(here, path, mine); break;
            case 3: find_path<3>(here, path, mine); break;
            case 4: find_path<4>(here, path, mine); break;
            case 5: find_path<5>(here, path, mine); break;
            case 6: find_path<6>(here, path, mine); break;
            case 7: find_path<7>(here, path, mine); break;
            case 8: find_path<8>(here, path, mine); break;
        }
    }
}
