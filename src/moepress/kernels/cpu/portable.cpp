// The table for every other CPU: vector types of the compiler, compiled without special flags.

#include "isa.h"
#include "lanes_portable.h"
#include "make_isa.h"
#include "viterbi_portable.h"

namespace moepress {
static constexpr Isa isa = make_isa<PortableLanes, PortableSearch>("portable");
const Isa* const kPortable = &isa;
}  // namespace moepress
