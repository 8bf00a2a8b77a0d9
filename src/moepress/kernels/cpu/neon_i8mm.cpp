// The table of the instruction set neon_i8mm, compiled with its flags (CMakeLists.txt).

#include "isa.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD) && defined(__ARM_FEATURE_MATMUL_INT8)
#include "lanes_neon_i8mm.h"
#include "make_isa.h"
#include "trellis_many_neon.h"
#include "viterbi_neon.h"

namespace moepress {
static constexpr Isa isa = make_isa<NeonI8mmLanes, NeonSearch>("neon_i8mm");
const Isa* const kNeonI8mm = &isa;
}  // namespace moepress
#else
const moepress::Isa* const moepress::kNeonI8mm = nullptr;
#endif
