#include "lanes_portable.h"
#include "viterbi_portable.h"

#include "blocks.h"
#include "slabs.h"

namespace moepress {
static const Isa isa = MOEPRESS_ISA("portable");
const Isa* const kPortable = &isa;
}  // namespace moepress
