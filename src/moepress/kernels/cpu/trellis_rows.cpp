// Rows with drawn errors, from columns. The definition and oracle is `plain_rows` of
// rounding/noise.py.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>

#include "checks.h"
#include "isa.h"
#include "moepress.h"
#include "number_kinds.h"
#include "threads.h"

namespace moepress {
namespace {

constexpr int64_t kRows = 16;  // of one turn: a cache line of each column

// Write the rows scale * (target - drawn) first .. first + count - 1, [kRows][cols].
void read_rows(const float* target, const float* drawn, const float* scale, int64_t cols,
               int64_t rows, int64_t first, int64_t count, float* to) {
    constexpr int64_t kColumns = 16;  // so that a line is written at once
    for (int64_t column = 0; column < cols; column += kColumns) {
        float some[kRows][kColumns];
        for (int64_t k = 0; k < kColumns; ++k) {
            const int64_t place = (column + k) * rows + first;
            for (int64_t n = 0; n < count; ++n)
                some[n][k] = (target[place + n] - drawn[place + n]) * scale[first + n];
        }
        for (int64_t n = 0; n < count; ++n)
            std::memcpy(to + n * cols + column, some[n], sizeof(some[n]));
    }
}

}  // namespace
}  // namespace moepress

using namespace moepress;

int32_t moepress_trellis_rows(const float* target, const float* drawn, const float* scale,
                              int64_t cols, int64_t rows, int32_t bfloat16, int32_t threads,
                              void* out) {
    if (rows < 1 || cols < 1 || cols % 32 != 0 || threads < 1) return kBadShape;
    return guarded([&] {
        const TrellisRotate rotate_back = isa_in_use()->trellis_rotate_back;
        const int64_t turns = (rows + kRows - 1) / kRows;
        const int workers = int(std::min<int64_t>(threads, turns));  // with a workspace each
        const int64_t size = kRows * cols;
        const std::unique_ptr<float[]> works(new float[size_t(workers * size)]);
        std::atomic<int64_t> next{0};
        parallel(workers, workers, 1, [&](int64_t begin, int64_t end) {
            for (int64_t worker = begin; worker < end; ++worker) {
                float* work = works.get() + worker * size;
                for (int64_t turn = next++; turn < turns; turn = next++) {
                    const int64_t first = turn * kRows, count = std::min(kRows, rows - first);
                    read_rows(target, drawn, scale, cols, rows, first, count, work);
                    for (int64_t n = 0; n < count; ++n) rotate_back(work + n * cols, cols);
                    if (bfloat16)
                        narrow_numbers<Bfloat16>(work, count * cols,
                                                 static_cast<uint16_t*>(out) + first * cols);
                    else
                        std::memcpy(static_cast<float*>(out) + first * cols, work,
                                    size_t(count * cols) * sizeof(float));
                }
            }
        });
        return kOk;
    });
}
