// What the instruction set avx512_amx changes in the table of avx512_vbmi2: the products of trellis
// matrices and many tokens. Compiled with its flags (CMakeLists.txt), so nothing here may run when
// the library is loaded.

#include "isa.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VBMI2__) && \
    defined(__AMX_INT8__) && defined(__x86_64__)
#include "lanes_avx512_vbmi2.h"
#include "trellis_amx.h"

namespace moepress {
static void change(Isa& isa) {
    isa.name = "avx512_amx";
    set_trellis_amx<Avx512Vbmi2Lanes>(isa, TrellisWidths());
}
void (*const kAvx512Amx)(Isa& avx512_vbmi2) = change;
}  // namespace moepress
#else
void (*const moepress::kAvx512Amx)(Isa& avx512_vbmi2) = nullptr;
#endif
