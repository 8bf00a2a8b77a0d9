// trellis_prefill.cu as cards without products of warpgroups have it.
#define MOEPRESS_TRELLIS_WGMMA 0
#include "trellis_prefill.cu"
