// The table of the instruction set avx2, compiled with its flags (CMakeLists.txt).

#include "isa.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "lanes_avx2.h"
#include "make_isa.h"
#include "viterbi_avx2.h"

namespace moepress {
static constexpr Isa isa = make_isa<Avx2Lanes, Avx2Search>("avx2");
const Isa* const kAvx2 = &isa;
}  // namespace moepress
#else
const moepress::Isa* const moepress::kAvx2 = nullptr;
#endif
