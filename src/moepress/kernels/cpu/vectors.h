// `Vectors`: registers of floats of the instruction set that a file is compiled for
// (vectors_portable.h says what they can do).
#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "vectors_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "vectors_avx2.h"
#elif defined(__aarch64__)
#include "vectors_neon.h"
#else
#include "vectors_portable.h"
#endif

namespace moepress {
namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
using Vectors = Avx512Vectors;
#elif defined(__AVX2__) && defined(__FMA__)
using Vectors = Avx2Vectors;
#elif defined(__aarch64__)
using Vectors = NeonVectors;
#else
using Vectors = PortableVectors;
#endif

}  // namespace
}  // namespace moepress
