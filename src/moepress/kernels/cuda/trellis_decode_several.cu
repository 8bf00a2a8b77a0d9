// The same few tokens times several trellis matrices in one launch, such as those of queries, keys and
// values: their codes are read by all, and small matrices fill the card together.
#include "trellis_decode.cuh"

namespace moepress {
namespace {

constexpr int kMostMatrices = 4;  // MOST of several.py

struct Matrix {
    const uint8_t* packed;
    int64_t bytes, bits, rows;  // bits: as of `halves_of`; rows 0: there is no such matrix
};

template <int group, int planes>
DEVICE void decode_several(Call call, const Matrix (&matrix)[kMostMatrices], int slabs_here) {
    Work work;
    work.first = int(blockIdx.z) * (kTokens / planes);
    work.count = int(min(int64_t(kTokens / planes), call.positions - work.first));
    work.split = int(blockIdx.y);
    work.row_block = int(blockIdx.x);
    int i = 0, slabs = 0;
    for (;; ++i) {
        slabs = int(matrix[i].rows + kSlabRows - 1) / kSlabRows;
        const int blocks = (slabs + slabs_here - 1) / slabs_here;
        if (work.row_block < blocks) break;
        if (i + 1 == kMostMatrices) trap();
        work.row_block -= blocks;
        call.out += matrix[i].rows;
    }
    call.n = int(matrix[i].rows);
    work.matrix = matrix[i].packed;
    work.halves = halves_of(matrix[i].bits);
    if (!work.halves ||
        slabs * (int64_t(4) * call.k * work.halves + 2 * kSlabRows) > matrix[i].bytes)
        trap();
    if (work.halves == 2) decode<2, group, planes>(call, work, slabs_here);
    if (work.halves == 3) decode<3, group, planes>(call, work, slabs_here);
    if (work.halves == 4) decode<4, group, planes>(call, work, slabs_here);
    if (work.halves == 5) decode<5, group, planes>(call, work, slabs_here);
    if (work.halves == 6) decode<6, group, planes>(call, work, slabs_here);
    if (work.halves == 7) decode<7, group, planes>(call, work, slabs_here);
    if (work.halves == 8) decode<8, group, planes>(call, work, slabs_here);
}

}  // namespace
}  // namespace moepress

// out [splits][tokens][stride] = the products, side by side: stride is the sum of all rows. Grid: for each
// matrix ceil(ceil(rows / 64) / slabs_here) blocks; splits; panels of 8 tokens (4 in two planes). Dynamic
// shared memory: kWarps kRingBytes bytes.
#define MOEPRESS_TRELLIS_DECODE_SEVERAL(GROUP, PLANES)                                             \
    extern "C" __global__ void __launch_bounds__(32 * moepress::kWarps, MOEPRESS_TRELLIS_BLOCKS)    \
        moepress_trellis_decode_several_g##GROUP##_p##PLANES(                                      \
            const int8_t* q, const float* scale, const int32_t* sum, int64_t planes, int64_t tokens, \
            int64_t k, int64_t group, float* out, int64_t splits, int64_t stride,                  \
            int64_t slabs_here, const uint8_t* packed0, int64_t bytes0, int64_t bits0,             \
            int64_t rows0, const uint8_t* packed1, int64_t bytes1, int64_t bits1, int64_t rows1,   \
            const uint8_t* packed2, int64_t bytes2, int64_t bits2, int64_t rows2,                  \
            const uint8_t* packed3, int64_t bytes3, int64_t bits3, int64_t rows3) {                \
        using namespace moepress;                                                                  \
        if (planes != PLANES || group != GROUP) trap();                                            \
        const Matrix matrix[kMostMatrices] = {{packed0, bytes0, bits0, rows0},                     \
                                              {packed1, bytes1, bits1, rows1},                     \
                                              {packed2, bytes2, bits2, rows2},                     \
                                              {packed3, bytes3, bits3, rows3}};                    \
        const Call call = {q,      scale,  sum, nullptr,     out,    tokens,                       \
                           tokens, 1,      0,   int(stride), int(k), int(splits), true};           \
        decode_several<GROUP, PLANES>(call, matrix, int(slabs_here));                              \
    }

#ifdef MOEPRESS_GROUP
#define MOEPRESS_THIS(GROUP, PLANES) MOEPRESS_TRELLIS_DECODE_SEVERAL(GROUP, PLANES)
MOEPRESS_THIS(MOEPRESS_GROUP, MOEPRESS_PLANES)
#else
MOEPRESS_TRELLIS_DECODE_SEVERAL(32, 1)
MOEPRESS_TRELLIS_DECODE_SEVERAL(64, 1)
MOEPRESS_TRELLIS_DECODE_SEVERAL(128, 1)
MOEPRESS_TRELLIS_DECODE_SEVERAL(32, 2)
MOEPRESS_TRELLIS_DECODE_SEVERAL(64, 2)
MOEPRESS_TRELLIS_DECODE_SEVERAL(128, 2)
#endif
