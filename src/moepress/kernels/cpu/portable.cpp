#include "lanes_portable.h"

#include "blocks.h"

namespace moepress {
static const Isa isa = MOEPRESS_ISA("portable");
const Isa* const kPortable = &isa;
}  // namespace moepress
