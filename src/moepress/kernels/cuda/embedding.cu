// Rows of a scalar matrix, as the weights that they stand for, exactly: w = scale * (code - zero),
// with zero = zero_code * levels / 255, each operation rounded to float32, then to the dtype.
#include "device.h"

namespace moepress {
namespace {

constexpr int kThreads = 128;

// Four neighbouring values in one store.
DEVICE void store(void* out, int64_t at, const float (&w)[4], int dtype) {
    if (dtype == 0) {
        reinterpret_cast<float4*>(out)[at / 4] = make_float4(w[0], w[1], w[2], w[3]);
        return;
    }
    uint32_t bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = dtype == 1 ? float_to_half(w[i]) : float_to_bfloat(w[i]);
    reinterpret_cast<uint2*>(out)[at / 4] =
        make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
}

// The four codes of columns 4 field .. of a row, one a byte, from a plane of `bits` bits. `row` is
// the row's place in the first chunk of the plane.
DEVICE uint32_t codes_of(const uint8_t* row, int bits, int field) {
    const int at = field * bits;
    const uint32_t word = __ldg(reinterpret_cast<const uint32_t*>(row + 64 * (at / 8)));
    return word >> at % 8 & 0x01010101u * ((1u << bits) - 1);
}

}  // namespace
}  // namespace moepress

// An id outside the table fails the launch and with it the CUDA context, as in torch's embedding.
// A check on the host would have to wait for the device at every token.
//
// Grid: ids. Threads: 128. dtype: 0 float32, 1 float16, 2 bfloat16. out [ids][cols].
extern "C" __global__ void __launch_bounds__(128)
    moepress_embedding(const int64_t* ids, int64_t n, const uint8_t* packed, int64_t rows,
                       int64_t cols, int64_t bits, int64_t g, void* out, int64_t dtype) {
    using namespace moepress;
    begin();
    const int64_t i = blockIdx.x;
    if (i >= n) return;
    const int64_t id = ids[i];
    if (id < 0 || id >= rows)
        fail("an embedding id lies outside the table: the tokenizer does not belong to this model");
    const int width = int(bits), group = int(g), columns = int(cols), groups = columns / group;
    const bool has_zero = width >= 2 && width <= 4;
    const int64_t codes = 2 * cols * width;
    const uint8_t* block = packed + id / 16 * (codes + (has_zero ? 48 : 32) * groups);
    const int r = int(id % 16);
    const float levels = float((1 << width) - 1);
    for (int field = int(threadIdx.x); field < columns / 4; field += kThreads) {
        const int q = 4 * field / group, within = field - q * (group / 4);
        const uint8_t* tile = block + int64_t(q) * 2 * group * width + 4 * r;
        uint32_t word;
        if (width == 3)
            word = codes_of(tile, 2, within) | codes_of(tile + 4 * group, 1, within) << 2;
        else
            word = codes_of(tile, width, within);
        const uint8_t* side = block + codes;
        const float scale =
            bfloat_to_float(*reinterpret_cast<const uint16_t*>(side + 2 * (16 * q + r)));
        const float zero =
            has_zero ? float(side[32 * groups + 16 * q + r]) * levels / 255.0f : levels / 2;
        float w[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) w[j] = (float(word >> 8 * j & 255) - zero) * scale;
        store(out, i * cols + 4 * field, w, int(dtype));
    }
}
