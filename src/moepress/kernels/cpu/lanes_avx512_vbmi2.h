// `Lanes` for AVX-512 with VNNI and VBMI2 (Intel Ice Lake, AMD Zen 4 and later): those of
// lanes_avx512.h, except that one instruction makes a window of two words. The members are
// explained in lanes_portable.h.
#pragma once

#include <immintrin.h>

#include "lanes_avx512.h"

namespace moepress {
namespace {

struct Avx512Vbmi2Lanes : Avx512Lanes {
    static constexpr bool cheap_windows = true;
    template <int end>
    static Words window(Words before, Words word) {
        return _mm512_shldi_epi16(before, word, end);
    }
    static Words halves(Words a, Words b) { return averages(a, b, window<8>(b, a)); }
};

}  // namespace
}  // namespace moepress
