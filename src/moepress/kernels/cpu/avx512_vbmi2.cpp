// The table of the instruction set avx512_vbmi2, compiled with its flags (CMakeLists.txt).

#include "isa.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VBMI2__)
#include "lanes_avx512_vbmi2.h"
#include "make_isa.h"
#include "viterbi_avx512.h"

namespace moepress {
static constexpr Isa isa = make_isa<Avx512Vbmi2Lanes, Avx512Search>("avx512_vbmi2");
const Isa* const kAvx512Vbmi2 = &isa;
}  // namespace moepress
#else
const moepress::Isa* const moepress::kAvx512Vbmi2 = nullptr;
#endif
