// The best paths of a trellis code through eight columns of many matrices: the CUDA side of
// rounding/methods/viterbi.py, which is the definition and oracle. Same integer costs, same ties.
//
// A block of 256 threads searches one path. A thread owns 16 states, in groups: group q is the 2^bits
// states (j, q), where j are their oldest bits. They are the predecessors of the next step's states
// (q, b), where b are the newest. As on the CPU (../cpu/viterbi_tiles.h) a step keeps only the least cost of each
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

template <int bits>
struct Code {
    static constexpr int branches = 1 << bits;
    static constexpr uint32_t mask = branches - 1;
    static constexpr int owned = 16 / branches;      // groups of a thread
    static constexpr int apart = kStates >> 2 * bits;  // groups between two j
    static constexpr int runs = bits == 1 ? 4 : 1;   // of owned groups that share predecessors
    static constexpr int older = kStateBits - bits;
    static constexpr int first_bit = 32 - kAtOnce * owned * bits;  // of the choices in a word
    static constexpr float unit = kUnit[bits];       // steps of a target of 1
    static constexpr float widest = 255.0f * unit;   // value at 1 and 2 bits, in steps
    static DEVICE int value(int state) {
        constexpr uint32_t multiplier = kMultiplier[bits];
        constexpr int center = kCenter[bits];
        const uint32_t product = uint32_t(state) * multiplier;
        int sum = int(product & 255) + int(product >> 8 & 255);
        if (bits > 2) sum += int(product >> 16 & 255) + int(product >> 24);
        return sum - center;
    }
    // Where the key of a group lies. At 4 bits a thread reads 16 keys of 16 groups apart: these are
    // neighbours, in rows of 20 words.
    static DEVICE int place(int group) {
        return bits == 4 ? group % 16 * 20 + group / 16 : group;
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

// The keys of a thread's groups after a step.
template <int bits>
struct Keys {
    uint32_t at[Code<bits>::owned];
};

// The rounded squares of the distances between a target and the values of a thread's states, plus
// kMagic.
template <int bits, bool clamps>
DEVICE void square(const float* value, float x, uint32_t* squares) {
    const float sign = x > 0 ? -1.0f : 1.0f, size = fabsf(x), limit = x > 0 ? 32767.0f : 32768.0f;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const float d = clamps ? fminf(fmaf(value[i], sign, size), limit) : x - value[i];
        // (d * d + 2^14) >> 15 above kMagic: float32 rounds the sum to a multiple of 2^15. A half
        // is rounded to even, which is up: d is then 128 times an odd number, so d * d is
        // 4 n + 1/2 times 2^15, and kMagic is odd.
        squares[i] = __float_as_uint(fmaf(d, d, __uint_as_float(kMagic)));
    }
}

template <int bits>
DEVICE void square(const float* value, float x, uint32_t* squares) {
    if (bits > 2 || fabsf(x) > 32767.0f - Code<bits>::widest)
        square<bits, true>(value, x, squares);
    else
        square<bits, false>(value, x, squares);
}

// One step: from the keys before it, in shared memory, to those after it.
//
// Args:
//   squares: of the thread's states, [owned][branches].
//   largest: key of the cost 65535, with j = 0.
template <int bits>
DEVICE void step(const uint32_t* before, const uint32_t* squares, uint32_t largest,
                 Keys<bits>& keys) {
    using C = Code<bits>;
    const int thread = int(threadIdx.x);
    uint32_t from[C::runs][C::branches];
    if constexpr (bits == 1) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const uint4 four = *reinterpret_cast<const uint4*>(before + j * C::apart + 4 * thread);
            from[0][j] = four.x, from[1][j] = four.y, from[2][j] = four.z, from[3][j] = four.w;
        }
    } else if constexpr (bits == 4) {
#pragma unroll
        for (int j = 0; j < 16; j += 4) {
            const uint4 four =
                *reinterpret_cast<const uint4*>(before + C::place(thread >> 4) + j);
            from[0][j] = four.x, from[0][j + 1] = four.y, from[0][j + 2] = four.z,
            from[0][j + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int j = 0; j < C::branches; ++j)
            from[0][j] = before[j * C::apart + (C::owned * thread >> bits)];
    }
#pragma unroll
    for (int i = 0; i < C::owned; ++i) {
        uint32_t least = largest;
#pragma unroll
        for (int j = 0; j < C::branches; ++j)
            least = min(least, squares[i * C::branches + j] * uint32_t(C::branches) +
                                   from[i * C::runs / C::owned][j]);
        keys.at[i] = least;
    }
}

// The key of an owned group as the next step reads it: with the j of its own states.
template <int bits>
DEVICE uint32_t next_key(uint32_t key) {
    using C = Code<bits>;
    return (key & ~C::mask) | threadIdx.x / (C::apart / C::owned);
}

template <int bits>
DEVICE void store(uint32_t* after, const Keys<bits>& keys, uint32_t less) {
    using C = Code<bits>;
    const int first = C::owned * int(threadIdx.x);
    uint32_t next[C::owned];
#pragma unroll
    for (int i = 0; i < C::owned; ++i) next[i] = next_key<bits>(keys.at[i]) - less;
    if constexpr (bits == 1) {
        *reinterpret_cast<uint4*>(after + first) = make_uint4(next[0], next[1], next[2], next[3]);
        *reinterpret_cast<uint4*>(after + first + 4) =
            make_uint4(next[4], next[5], next[6], next[7]);
    } else if constexpr (bits == 2) {
        *reinterpret_cast<uint4*>(after + first) = make_uint4(next[0], next[1], next[2], next[3]);
    } else if constexpr (bits == 3) {
        *reinterpret_cast<uint2*>(after + first) = make_uint2(next[0], next[1]);
    } else {
        after[C::place(first)] = next[0];
    }
}

// The least key of the block and, of the groups that have it, the first. All threads call this.
template <int bits>
DEVICE uint2 first_least(Shared& shared, const Keys<bits>& keys) {
    using C = Code<bits>;
    uint32_t least = keys.at[0];
    int at = 0;
#pragma unroll
    for (int i = 1; i < C::owned; ++i)
        if (keys.at[i] < least) least = keys.at[i], at = i;
    const uint32_t of_warp = ~__reduce_max_sync(~0u, ~least);
    const uint32_t have = __ballot_sync(~0u, least == of_warp);
    if (lane_id() == __ffs(int(have)) - 1) {
        shared.least[warp_id()] = of_warp;
        shared.group[warp_id()] = C::owned * threadIdx.x + at;
    }
    __syncthreads();
    uint2 found = make_uint2(shared.least[0], shared.group[0]);
#pragma unroll
    for (int w = 1; w < kWarps; ++w)
        if (shared.least[w] < found.x) found = make_uint2(shared.least[w], shared.group[w]);
    __syncthreads();
    return found;
}

// Pass `steps` targets, a multiple of 16, from the keys in shared.keys[0]. Writes the choices of all
// steps, and returns the best state after the last one.
template <int bits>
DEVICE int pass(Shared& shared, const float* value, int steps, uint32_t* choices) {
    using C = Code<bits>;
    constexpr uint32_t added = kMagic * C::branches;  // to all keys in a step
    Keys<bits> keys;
    uint32_t largest = kLargest * C::branches;
    uint2 least = make_uint2(0, 0);
    uint32_t squares[16];
    square<bits>(value, shared.target[0], squares);
    for (int t = 0; t < steps; t += kAtOnce) {
        uint32_t word = 0;
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            const float next = shared.target[t + u + 1];
            largest += added;
            step<bits>(shared.keys[u % 2], squares, largest, keys);
            store<bits>(shared.keys[1 - u % 2], keys, 0);
#pragma unroll
            for (int i = 0; i < C::owned; ++i) word = __funnelshift_r(word, keys.at[i], bits);
            square<bits>(value, next, squares);  // while other warps are at this step
            if (u < kAtOnce - 1) __syncthreads();
        }
        choices[t / kAtOnce * kThreads + int(threadIdx.x)] = word;
        if (t % kSteps == kSteps - kAtOnce) {  // subtract the least cost
            least = first_least<bits>(shared, keys);
            store<bits>(shared.keys[0], keys, least.x & ~C::mask);
            largest = kLargest * C::branches;
        }
        __syncthreads();
    }
    return int((least.x & C::mask) << C::older | least.y);
}

// Find the states from step `steps` - 1, where the state is `end`, back to step `last`.
//
// Going back is a chain of loads. So 64 threads take 16 steps each, and start `lead` steps later in
// any state: paths that go back from different states meet soon. A thread that did not meet the
// path of the next one, which shows where the two parts meet, takes its steps once more.
template <int bits>
DEVICE void trace(Shared& shared, const uint32_t* choices, int steps, int end, int last) {
    using C = Code<bits>;
    constexpr int lead = 96 / bits;
    const int thread = int(threadIdx.x), parts = steps / kPart;
    // From a state of step t to the one before.
    const auto back = [&](uint32_t state, int t) {
        const uint32_t group = state >> bits;
        const uint32_t word = choices[(t - 1) / kAtOnce * kThreads + int(group) / C::owned];
        const uint32_t place = uint32_t(t - 1) % kAtOnce * C::owned + group % C::owned;
        return (word >> (C::first_bit + bits * place) & C::mask) << C::older | group;
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

template <int bits>
DEVICE float read_target(const Columns& columns, int path, int64_t step) {
    const int64_t at = place_of(path, step, columns.rows);
    float x = columns.target[at];
    if (columns.feedback) x = x + columns.feedback[at];
    x = rintf(x * Code<bits>::unit);
    x = x < -32767.0f ? -32767.0f : x > 32767.0f ? 32767.0f : x;
    return x == x ? x : 0.0f;
}

// The keys before the first step: those of cost 0 for all states, or of one state alone.
template <int bits>
DEVICE void start_keys(Shared& shared, int state) {
    using C = Code<bits>;
    for (int group = int(threadIdx.x); group < kStates >> bits; group += kThreads) {
        const bool free = state < 0 || state % (kStates >> bits) == group;
        shared.keys[0][C::place(group)] = (free ? 0 : kLargest * C::branches) | group / C::apart;
    }
}

// Not inlined: the values of the states of all widths would be computed first, and fill registers.
template <int bits>
__device__ __noinline__ void find_path(const Columns& columns, int path, uint32_t* choices) {
    using C = Code<bits>;
    Shared& shared = *shared_memory<Shared>();
    const int thread = int(threadIdx.x);
    const int64_t steps = columns.rows / kSlabRows * kSteps;
    float value[16];
#pragma unroll
    for (int i = 0; i < C::owned; ++i)
#pragma unroll
        for (int j = 0; j < C::branches; ++j) {
            const int state = j << C::older | (C::owned * thread + i);
            value[i * C::branches + j] = float(C::value(state)) * C::unit;
        }
    const int window = int(min(int64_t(kWindow), steps));
    int start = -1, state = -1;  // no state: all are allowed
    for (int64_t first = -kRun; first < steps; first += kRun) {
        const bool seam = first < 0;
        const int here = seam ? 2 * window : int(min(int64_t(kRun), steps - first));
        __syncthreads();
        for (int t = thread; t < here; t += kThreads) {
            const int64_t at_seam = t < window ? steps - window + t : t - window;
            shared.target[t] = read_target<bits>(columns, path, seam ? at_seam : first + t);
        }
        start_keys<bits>(shared, state);
        __syncthreads();
        state = pass<bits>(shared, value, here, choices);
        if (first + kRun >= steps) state = start;
        trace<bits>(shared, choices, here, state, seam ? window - 1 : 0);
        if (seam) {
            start = state = shared.states[window - 1];
            continue;
        }
        for (int t = thread; t < here; t += kThreads) {
            const int64_t at = place_of(path, first + t, columns.rows);
            const int passed = shared.states[t];
            columns.branches[at] = uint8_t(passed & C::mask);
            if (columns.feedback)
                columns.feedback[at] = columns.target[at] - float(C::value(passed));
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
//   bits: [matrices], each 1 to 4.
//   choices: [blocks, kRun / kAtOnce, kThreads], scratch.
extern "C" __global__ void __launch_bounds__(kThreads, 3)
moepress_viterbi_search(const float* target, float* feedback, uint8_t* branches,
                        const int32_t* bits, int64_t matrices, int64_t columns, int64_t rows,
                        int64_t first, uint32_t* choices) {
    begin();
    uint32_t* mine = choices + int64_t(blockIdx.x) * (kRun / kAtOnce * kThreads);
    for (int64_t i = blockIdx.x; i < matrices * kPaths; i += gridDim.x) {
        const int64_t matrix = i / kPaths, at = (matrix * columns + first) * rows;
        const int path = int(i % kPaths);
        const Columns here{target + at, feedback ? feedback + at : nullptr, branches + at, rows};
        switch (bits[matrix]) {
            case 1: find_path<1>(here, path, mine); break;
            case 2: find_path<2>(here, path, mine); break;
            case 3: find_path<3>(here, path, mine); break;
            case 4: find_path<4>(here, path, mine); break;
        }
    }
}
