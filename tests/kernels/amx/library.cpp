// In place of the instruction sets of the CPU kernels: one, in plain C++, that multiplies bytes, with
// products of many tokens of trellis matrices by emulated AMX (tiles.h) or by OneByte
// (trellis_many.h). Both are for CPUs that the machine may not have.

#include "isa.h"
#include "lanes_portable.h"
#include "make_isa.h"
#include "trellis_amx.h"
#include "viterbi_portable.h"

namespace moepress {
namespace {

struct ByteLanes : PortableLanes {
    static constexpr bool sums_any_byte = true, crosses = false;
};

constexpr Isa kBytes = make_isa<ByteLanes, PortableSearch>("emulated");
constexpr Isa kAmx = [] {
    Isa isa = kBytes;
    set_trellis_amx<ByteLanes>(isa, TrellisWidths());
    return isa;
}();

Isa in_use = kBytes;

}  // namespace

const Isa* const kAvx512 = nullptr;
const Isa* const kAvxVnni = nullptr;
const Isa* const kAvx2 = nullptr;
const Isa* const kNeonI8mm = nullptr;
const Isa* const kNeonDotprod = nullptr;
const Isa* const kPortable = &in_use;
void (*const kAvx512Vbmi2)(Isa&) = nullptr;
void (*const kAvx512Amx)(Isa&) = nullptr;
void (*const kAvx512Crossed)(Isa&) = nullptr;

}  // namespace moepress

extern "C" __attribute__((visibility("default"))) void emulate_amx(int tiles) {
    moepress::in_use = tiles ? moepress::kAmx : moepress::kBytes;
}
