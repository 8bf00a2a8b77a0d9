// The best paths of a trellis code through eight columns of many matrices: the CUDA side of
// rounding/methods/viterbi.py, which is the definition and oracle. Same integer costs, same ties.
//
// A block of 256 threads searches one path. A thread owns 16 states, in groups: group q is the 2^bits
// states (j, q), where j are their oldest bits. They are the predecessors of the next step's states
// (q, b), where b are the newest. At half widths, the groups after a step have the bits of the next.
// As on the CPU (../cpu/viterbi_tiles.h) a step keeps only the least cost of each group. Here the
// choice of j is kept too, a few bits for a group, since computing it again would take more memory:
// choices of four steps make a word of a thread, 256 KB in global memory for the 1024 steps of a run.
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
#include "viterbi_step.cuh"

namespace moepress {
namespace {

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
}  // namespace moepress

// Find the best paths through columns first .. first + 7 of `matrices` matrices of equal shape.
//
// Args:
//   target: [matrices, columns, rows].
//   feedback: the same shape, added to the target; overwritten with target - value. Null: neither.
//   branches: the same shape, of bytes.
//   halves: [matrices], twice the code bits of each, 2 to 8.
//   choices: [blocks, kRun / kAtOnce, kThreads], scratch.
extern "C" __global__ void __launch_bounds__(moepress::kThreads, 3)
moepress_viterbi_search(const float* target, float* feedback, uint8_t* branches,
                        const int32_t* halves, int64_t matrices, int64_t columns, int64_t rows,
                        int64_t first, uint32_t* choices) {
    using namespace moepress;
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
