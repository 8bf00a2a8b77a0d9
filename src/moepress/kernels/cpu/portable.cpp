// The table for every other CPU: vector types of the compiler, compiled without special flags.

#include "isa.h"
#include "lanes_portable.h"
#include "make_isa.h"

// All 64-bit ARM CPUs have the instructions of the search. GCC 12 compiles viterbi_portable.h wrong
// for them: its loops for 2 bits, vectorised.
#if defined(__aarch64__)
#include "viterbi_neon.h"
#else
#include "viterbi_portable.h"
#endif

namespace moepress {
#if defined(__aarch64__)
using Search = NeonSearch;
#else
using Search = PortableSearch;
#endif
static constexpr Isa isa = make_isa<PortableLanes, Search>("portable");
const Isa* const kPortable = &isa;
}  // namespace moepress
