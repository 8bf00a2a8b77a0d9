// Products of trellis matrices with few tokens: of routed experts, or of one matrix.
#include "trellis_decode.cuh"

namespace moepress {
namespace {

template <int halves, int group, int planes>
DEVICE void decode_of_grid(const Call& call, const Work& work) {
    const int slabs = (call.n + kSlabRows - 1) / kSlabRows;
    int slabs_here = 1;  // as many as the grid needs
    while (slabs_here * int(gridDim.x) < slabs) slabs_here *= 2;
    decode<halves, group, planes>(call, work, slabs_here);
}

}  // namespace
}  // namespace moepress

// Grid: at least ceil(N / 64 / 4) blocks of rows, splits, panels of 8 positions (4 in two planes).
// Dynamic shared memory: kWarps kRingBytes bytes.
#define MOEPRESS_TRELLIS_DECODE(GROUP, PLANES)                                      \
    MOEPRESS_TRELLIS_KERNEL(moepress_trellis_decode, GROUP, PLANES, 32 * moepress::kWarps, \
                            GROUP == 128 ? MOEPRESS_TRELLIS_BLOCKS : 4, kTokens, 1, decode_of_grid)

#ifdef MOEPRESS_GROUP
MOEPRESS_TRELLIS_DECODE(MOEPRESS_GROUP, MOEPRESS_PLANES)
#else
MOEPRESS_TRELLIS_DECODE(32, 1)
MOEPRESS_TRELLIS_DECODE(64, 1)
MOEPRESS_TRELLIS_DECODE(128, 1)
MOEPRESS_TRELLIS_DECODE(32, 2)
MOEPRESS_TRELLIS_DECODE(64, 2)
MOEPRESS_TRELLIS_DECODE(128, 2)
#endif
