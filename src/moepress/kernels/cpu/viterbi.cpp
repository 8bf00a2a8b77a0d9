// The best paths of a trellis code through eight columns of a matrix. The definition and oracle is
// rounding/methods/viterbi.py. A thread searches one of the 32 paths at a time: what a step reads and
// writes, 16 KB or less, stays in the first-level cache, and the costs that are kept for the way
// back, 1 to 2 MB, in the second and third.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <exception>
#include <memory>

#include "isa.h"
#include "moepress.h"
#include "threads.h"
#include "trellis_code.h"

namespace moepress {
namespace {

constexpr int kRun = 1024;   // steps that are decided together; a multiple of kSteps
constexpr int kWindow = 64;  // steps on each side of the place where a path's end meets its start

// Costs (isa.h), aligned to cache lines: a vector of 512 bits is one.
struct alignas(64) Workspace {
    uint16_t between[2][kept_words(1)];    // of steps that are not kept
    uint16_t kept[kRun * kept_words(25)];  // of steps that a stride starts with, of any width
    int16_t target[kRun];
};
static_assert(kept_words(25) * stride_of(15) >= kept_words(15));
static_assert(kept_words(25) * stride_of(1) >= kept_words(1));
static_assert(kept_words(25) * stride_of(2) >= kept_words(2));

// The row and column, of the eight, of weight `step` of a path.
struct Place {
    int64_t row;
    int column;
};
Place place_of(int path, int64_t step) {
    const int i = int(step % kSteps);
    return {step / kSteps * kSlabRows + i / 4 * 16 + path / 2, i % 4 * 2 + path % 2};
}

// A target in steps of 1 / unit, saturated. NaN counts as 0.
int16_t in_steps(float target, int unit) {
    const float scaled = target * float(unit);
    const float inside = scaled < -32767.0f ? -32767.0f : scaled > 32767.0f ? 32767.0f : scaled;
    return scaled == scaled ? int16_t(std::lrintf(inside)) : int16_t(0);
}

// Find the best path that starts with the costs `work.kept`, passes `steps` targets, a multiple of
// kSteps, and ends in state `end`, or, for -1, in the best state. Writes its states [steps].
void find_path(const Isa& isa, int width, int steps, int end, Workspace& work, uint16_t* states) {
    const uint16_t* best = work.kept;
    bool small = false;
    for (int t = 1; t < steps; ++t) {
        uint16_t* next = t % stride_of(width) == 0
                             ? work.kept + t / stride_of(width) * kept_words(width)
                             : work.between[t % 2];
        small = isa.viterbi_step[width][(t - 1) % 2](best, work.target[t - 1], small, next);
        if (t % kSteps == 0) isa.subtract_least(next, kStates >> branch_bits(width, t));
        best = next;
    }
    if (end < 0) end = isa.viterbi_best[width](best, work.target[steps - 1]);
    isa.viterbi_trace[width](work.kept, work.target, steps, end, states);
}

// Eight columns to round, each of `rows` numbers.
struct Columns {
    float* target;    // with feedback, replaced by what is left of target + feedback
    float* feedback;  // may be null; replaced by target - value
    int64_t rows;
    uint8_t* branches;

    float wanted(int64_t place) const {
        return feedback ? target[place] + feedback[place] : target[place];
    }
    void round(int64_t place, int branch, float value) const {
        branches[place] = uint8_t(branch);
        if (!feedback) return;
        const float error = target[place] - value;
        target[place] = wanted(place) - value;
        feedback[place] = error;
    }
};

// Round one path. It starts and ends in the same state, which the best path around the seam chooses
// (rounding/methods/viterbi.py).
void round_path(const Isa& isa, int width, const Columns& columns, int path, Workspace& work) {
    uint16_t states[kRun];
    const int64_t steps = columns.rows / kSlabRows * kSteps;
    const auto place = [&](int64_t step) {
        const Place at = place_of(path, step);
        return at.column * columns.rows + at.row;
    };
    const auto read = [&](int64_t step) {
        return in_steps(columns.wanted(place(step)), unit_of(width));
    };
    const int window = int(std::min<int64_t>(kWindow, steps));
    for (int t = 0; t < 2 * window; ++t)
        work.target[t] = read(t < window ? steps - window + t : t - window);
    const int groups = kStates >> branch_bits(width, 0);
    std::fill(work.kept, work.kept + groups, uint16_t(0));
    find_path(isa, width, 2 * window, -1, work, states);
    const int start = states[window - 1];
    int state = start;
    for (int64_t first = 0; first < steps; first += kRun) {
        const int here = int(std::min<int64_t>(kRun, steps - first));
        for (int t = 0; t < here; ++t) work.target[t] = read(first + t);
        std::fill(work.kept, work.kept + groups, uint16_t(65535));
        work.kept[state % groups] = 0;
        find_path(isa, width, here, first + kRun >= steps ? start : -1, work, states);
        for (int t = 0; t < here; ++t) {
            const int branch = states[t] & ((1 << branch_bits(width, t)) - 1);
            const int value = code_value(states[t], value_bits(width, t));
            columns.round(place(first + t), branch, float(value));
        }
        state = states[here - 1];
    }
}

}  // namespace
}  // namespace moepress

using namespace moepress;

int32_t moepress_trellis_search(float* target, float* feedback, int64_t rows, int32_t bits,
                                int32_t threads, uint8_t* branches) {
    if (!is_width(bits)) return kBadCodec;
    if (rows < 1 || rows % kSlabRows != 0 || threads < 1) return kBadShape;
    try {
        const Isa& isa = *isa_in_use();
        const int workers = std::min<int>(threads, kPaths);  // with a workspace each
        const std::unique_ptr<Workspace[]> works(new Workspace[size_t(workers)]);
        std::atomic<int> next{0};  // path: a worker that is slowed down takes fewer
        parallel(workers, workers, 1, [&](int64_t begin, int64_t end) {
            for (int64_t worker = begin; worker < end; ++worker)
                for (int path = next++; path < kPaths; path = next++)
                    round_path(isa, bits, {target, feedback, rows, branches}, path, works[worker]);
        });
        return kOk;
    } catch (const std::exception&) {
        return kNoMemory;
    }
}
