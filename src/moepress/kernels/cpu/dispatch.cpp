// Which instruction set runs: the best that was compiled and that this CPU has, or the one asked
// for.

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include <atomic>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "arm_features.h"
#include "isa.h"
#include "moepress.h"
#include "threads.h"

namespace moepress {
namespace {

// An instruction set of this architecture, in a list with the best first.
struct Candidate {
    const Isa* isa;  // null: not compiled
    bool on_this_cpu;
};

#if defined(__x86_64__) || defined(__i386__)
// All ask the operating system too: registers that it does not save must not be used.
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}
bool has_avx512_vbmi2() { return has_avx512() && __builtin_cpu_supports("avx512vbmi2"); }
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx_vnni() {  // not every compiler has a name for it
    unsigned a = 0, b = 0, c = 0, d = 0;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
// The tiles of AMX: the CPU has them (CPUID 7, AMX-TILE and AMX-INT8), the operating system saves
// them (XCR0, bits 17 and 18), and Linux permits this process to use them, once it is asked.
bool has_amx() {
#if defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!has_avx512_vbmi2() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if (!(d >> 24 & 1) || !(d >> 25 & 1)) return false;
    unsigned low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low >> 17 & 3) != 3) return false;
    constexpr long ask = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, ask, tile_data) == 0;
#else
    return false;
#endif
}
// Whether windows are best made by the shift of VBMI2. AMD Zen 4 runs it where it multiplies, and
// is a tenth faster without.
bool shifts_beside_products() { return !__builtin_cpu_is("amd"); }
// Whether additions run beside dot products of 512 bits: AMD has four units for the former and two
// for the latter. On Intel both have the same two.
bool adds_beside_products() { return __builtin_cpu_is("amd"); }

const Isa* avx512_vbmi2() {
    if (kAvx512 == nullptr || kAvx512Vbmi2 == nullptr || !has_avx512_vbmi2()) return nullptr;
    static const Isa isa = [] {
        Isa changed = *kAvx512;
        kAvx512Vbmi2(changed);
        return changed;
    }();
    return &isa;
}

const Isa* avx512_amx() {
    if (avx512_vbmi2() == nullptr || kAvx512Amx == nullptr || !has_amx()) return nullptr;
    static const Isa isa = [] {
        Isa changed = *avx512_vbmi2();
        kAvx512Amx(changed);
        return changed;
    }();
    return &isa;
}

// avx512, as it is best on this CPU.
const Isa* avx512() {
    if (kAvx512 == nullptr || !has_avx512() || !adds_beside_products()) return kAvx512;
    static const Isa isa = [] {
        Isa changed = *kAvx512;
        kAvx512Crossed(changed);
        return changed;
    }();
    return &isa;
}

std::vector<Candidate> candidates() {
    std::vector<Candidate> all = {{avx512_vbmi2(), has_avx512_vbmi2()},
                                  {avx512(), has_avx512()},
                                  {kAvxVnni, has_avx_vnni()},
                                  {kAvx2, has_avx2()}};
    if (!shifts_beside_products()) std::swap(all[0], all[1]);
    if (const Isa* amx = avx512_amx()) all.insert(all.begin(), {amx, true});
    return all;
}
#elif defined(__aarch64__)
std::vector<Candidate> candidates() {
    return {{kNeonI8mm, has_dotprod() && has_i8mm()}, {kNeonDotprod, has_dotprod()}};
}
#else
std::vector<Candidate> candidates() { return {}; }
#endif

const std::vector<const Isa*>& available() {
    static const std::vector<const Isa*> list = [] {
        std::vector<const Isa*> found;
        for (const Candidate& candidate : candidates())
            if (candidate.isa != nullptr && candidate.on_this_cpu) found.push_back(candidate.isa);
        found.push_back(kPortable);
        return found;
    }();
    return list;
}

std::atomic<const Isa*>& in_use() {
    static std::atomic<const Isa*> one{available().front()};
    return one;
}

}  // namespace

const Isa* isa_in_use() { return in_use().load(std::memory_order_relaxed); }

}  // namespace moepress

int32_t moepress_interface() { return 13; }

const char* moepress_instruction_sets() {
    static const std::string names = [] {
        std::string text;
        for (const moepress::Isa* isa : moepress::available())
            text += (text.empty() ? "" : " ") + std::string(isa->name);
        return text;
    }();
    return names.c_str();
}

int32_t moepress_use(const char* instruction_set) {
    for (const moepress::Isa* isa : moepress::available())
        if (std::strcmp(isa->name, instruction_set) == 0) {
            moepress::in_use() = isa;
            return 1;
        }
    return 0;
}

void moepress_lend_team(void* gomp_parallel) {
    moepress::lend_team(reinterpret_cast<moepress::Team>(gomp_parallel));
}
