// The table of the instruction set avx512, compiled with its flags (CMakeLists.txt).

#include "isa.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include "lanes_avx512.h"
#include "make_isa.h"
#include "viterbi_avx512.h"

namespace moepress {
static constexpr Isa isa = make_isa<Avx512Lanes, Avx512Search>("avx512");
const Isa* const kAvx512 = &isa;

static void cross(Isa& isa) {
    set_trellis_dots<Avx512Lanes, true>(isa, TrellisWidths());
}
void (*const kAvx512Crossed)(Isa& avx512) = cross;
}  // namespace moepress
#else
const moepress::Isa* const moepress::kAvx512 = nullptr;
void (*const moepress::kAvx512Crossed)(Isa& avx512) = nullptr;
#endif
