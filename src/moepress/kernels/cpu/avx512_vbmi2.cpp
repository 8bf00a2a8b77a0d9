// What the instruction set avx512_vbmi2 changes in the table of avx512: the products of trellis
// matrices. Compiled with its flags (CMakeLists.txt), so nothing here may run when the library is
// loaded.

#include "isa.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VBMI2__)
#include "lanes_avx512_vbmi2.h"
#include "trellis_product.h"

namespace moepress {
static void change(Isa& isa) {
    isa.name = "avx512_vbmi2";
    set_trellis_dots<Avx512Vbmi2Lanes>(isa, TrellisWidths());
}
void (*const kAvx512Vbmi2)(Isa& avx512) = change;
}  // namespace moepress
#else
void (*const moepress::kAvx512Vbmi2)(Isa& avx512) = nullptr;
#endif
