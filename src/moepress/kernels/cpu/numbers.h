// Inputs and outputs in bfloat16: the driver computes with floats, converted here before and after.
// As operations of torch, the two conversions of a call take longer than a small linear.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "moepress.h"
#include "number_kinds.h"
#include "threads.h"

namespace moepress {

// run(x, y) with floats. With `bfloat16`, x [in] and y [out] are that; y is written if the result
// is kOk.
template <class Run>
Result in_floats(const void* x, int64_t in, void* y, int64_t out, bool bfloat16, int threads,
                 Run run) {
    if (!bfloat16) return run(static_cast<const float*>(x), static_cast<float*>(y));
    constexpr int64_t some = 1 << 16;  // numbers of a thread's turn
    const auto each_run = [&](int64_t n, auto convert) {
        parallel(threads, (n + some - 1) / some, 1, [&](int64_t begin, int64_t end) {
            const int64_t first = begin * some;
            convert(first, std::min(end * some, n) - first);
        });
    };
    const std::unique_ptr<float[]> wide_x(new float[size_t(in)]), wide_y(new float[size_t(out)]);
    each_run(in, [&](int64_t first, int64_t n) {
        widen_numbers<Bfloat16>(static_cast<const uint16_t*>(x) + first, n, wide_x.get() + first);
    });
    const Result result = run(wide_x.get(), wide_y.get());
    if (result != kOk) return result;
    each_run(out, [&](int64_t first, int64_t n) {
        narrow_numbers<Bfloat16>(wide_y.get() + first, n, static_cast<uint16_t*>(y) + first);
    });
    return kOk;
}

}  // namespace moepress
