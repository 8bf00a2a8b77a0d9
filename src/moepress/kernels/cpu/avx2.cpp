#include "isa.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "lanes_avx2.h"
#include "viterbi_avx2.h"

#include "blocks.h"
#include "slabs.h"

namespace moepress {
static const Isa isa = MOEPRESS_ISA("avx2");
const Isa* const kAvx2 = &isa;
}  // namespace moepress
#else
const moepress::Isa* const moepress::kAvx2 = nullptr;
#endif
