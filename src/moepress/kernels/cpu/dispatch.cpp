// Which instruction set runs: the best that was compiled and that this CPU has, or the one asked
// for.

#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "isa.h"
#include "moepress.h"
#include "threads.h"

namespace moepress {
namespace {

#if defined(__x86_64__) || defined(__i386__)
// Both ask the operating system too: registers that it does not save must not be used.
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#else
bool has_avx512() { return false; }
bool has_avx2() { return false; }
#endif
bool has_any() { return true; }

// All instruction sets, best first, and whether this CPU has them.
struct Candidate {
    const Isa* isa;  // null: not compiled
    bool (*on_this_cpu)();
};

const std::vector<const Isa*>& available() {
    static const std::vector<const Isa*> list = [] {
        std::vector<const Isa*> found;
        for (const Candidate& candidate :
             {Candidate{kAvx512, has_avx512}, {kAvx2, has_avx2}, {kPortable, has_any}})
            if (candidate.isa != nullptr && candidate.on_this_cpu()) found.push_back(candidate.isa);
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

int32_t moepress_interface() { return 5; }

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
