// In place of the instruction sets of the CPU kernels: one, in plain C++, that multiplies bytes, with
// products of many tokens of trellis matrices by emulated AMX (tiles.h) or by OneByte
// (trellis_many.h); or AVX2 with emulated AVX-VNNI (vnni.h). All are for CPUs that the machine may
// not have.

#include "isa.h"
#include "lanes_portable.h"
#include "make_isa.h"
#include "trellis_amx.h"
#include "viterbi_portable.h"
#if defined(__AVX2__)
#include "vnni.h"

#include "lanes_avx_vnni.h"
#include "viterbi_avx2.h"
#endif

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

#if defined(__AVX2__)
constexpr Isa kVnni = make_isa<AvxVnniLanes, Avx2Search>("emulated");
#else
constexpr Isa kVnni = kBytes;  // not asked for
#endif

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

// 0: bytes, 1: AMX, 2: AVX-VNNI.
extern "C" __attribute__((visibility("default"))) void emulate(int which) {
    const moepress::Isa* const all[] = {&moepress::kBytes, &moepress::kAmx, &moepress::kVnni};
    moepress::in_use = *all[which];
}
