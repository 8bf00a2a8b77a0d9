// The table of the instruction set neon_dotprod, compiled with its flags (CMakeLists.txt).

#include "isa.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include "lanes_neon_dotprod.h"
#include "make_isa.h"
#include "trellis_many_neon.h"
#include "viterbi_neon.h"

namespace moepress {
static constexpr Isa isa = make_isa<NeonDotprodLanes, NeonSearch>("neon_dotprod");
const Isa* const kNeonDotprod = &isa;
}  // namespace moepress
#else
const moepress::Isa* const moepress::kNeonDotprod = nullptr;
#endif
