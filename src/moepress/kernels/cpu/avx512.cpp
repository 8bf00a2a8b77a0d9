#include "isa.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include "lanes_avx512.h"
#include "viterbi_avx2.h"

#include "blocks.h"
#include "slabs.h"

namespace moepress {
static const Isa isa = MOEPRESS_ISA("avx512");
const Isa* const kAvx512 = &isa;
}  // namespace moepress
#else
const moepress::Isa* const moepress::kAvx512 = nullptr;
#endif
