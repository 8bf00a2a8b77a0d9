// The table of the instruction set avx_vnni, compiled with its flags (CMakeLists.txt).

#include "isa.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__AVXVNNI__)
#include "lanes_avx_vnni.h"
#include "make_isa.h"
#include "viterbi_avx2.h"

namespace moepress {
static constexpr Isa isa = make_isa<AvxVnniLanes, Avx2Search>("avx_vnni");
const Isa* const kAvxVnni = &isa;
}  // namespace moepress
#else
const moepress::Isa* const moepress::kAvxVnni = nullptr;
#endif
