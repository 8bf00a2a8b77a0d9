// Vectors of as many floats as every CPU of the instruction set has. Internal linkage: each
// instruction set compiles its own copy.
#pragma once

#include <cstdint>

namespace moepress {
namespace {

#if defined(__AVX2__)
typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
#else
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
#endif
constexpr int kFloats = sizeof(Floats) / sizeof(float);

}  // namespace
}  // namespace moepress
