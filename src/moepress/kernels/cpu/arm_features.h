// Which instructions this ARM CPU has, as the operating system says. Unknown systems: none.
#pragma once

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>

#include <cstddef>
#endif

namespace moepress {
namespace {

#if defined(__aarch64__) && defined(__linux__)
// Bits of <asm/hwcap.h>, which old systems have without the second.
inline bool has_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; }  // HWCAP_ASIMDDP
inline bool has_i8mm() { return getauxval(AT_HWCAP2) >> 13 & 1; }    // HWCAP2_I8MM
#elif defined(__aarch64__) && defined(__APPLE__)
// Whether a number of the system's state is there and not 0.
inline bool is_set(const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
inline bool has_dotprod() { return is_set("hw.optional.arm.FEAT_DotProd"); }
inline bool has_i8mm() { return is_set("hw.optional.arm.FEAT_I8MM"); }
#elif defined(__aarch64__)
inline bool has_dotprod() { return false; }
inline bool has_i8mm() { return false; }
#endif

}  // namespace
}  // namespace moepress
