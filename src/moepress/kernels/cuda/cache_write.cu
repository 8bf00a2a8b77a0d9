// One token into a cache of keys and values, at a position that the card knows.
#include "device.h"

namespace moepress {
namespace {

template <class Unit>
DEVICE void write_token(Unit* keys, int64_t keys_batch, int64_t keys_head, int64_t keys_position,
                        const Unit* key, int64_t key_batch, int64_t key_head, int key_units,
                        Unit* values, int64_t values_batch, int64_t values_head,
                        int64_t values_position, const Unit* value, int64_t value_batch,
                        int64_t value_head, int value_units, int rows, int heads, int64_t position) {
    const int units = key_units + value_units;
    for (int i = int(threadIdx.x); i < rows * units; i += int(blockDim.x)) {
        const int row = i / units, batch = row / heads, head = row - batch * heads;
        const int unit = i - row * units, of_value = unit - key_units;
        if (of_value < 0)
            keys[batch * keys_batch + head * keys_head + position * keys_position + unit] =
                key[batch * key_batch + head * key_head + unit];
        else
            values[batch * values_batch + head * values_head + position * values_position +
                   of_value] = value[batch * value_batch + head * value_head + of_value];
    }
}

}  // namespace
}  // namespace moepress

// keys[.., position, :] = key, values[.., position, :] = value. A position outside of the room fails
// the launch and with it the CUDA context, as torch's index_copy does.
//
// Args:
//   keys, values: [batches, heads, room, size], with strides but the last, which is 1.
//   key, value: [batches, heads, 1, size], with strides of batches and heads.
//   bytes: of a unit: 16, 8, 4, 2 or 1. Strides and sizes are in units, addresses multiples of it.
//   rows: batches * heads.
//
// Grid: (1). Threads: at most 512.
extern "C" __global__ void __launch_bounds__(512)
    moepress_cache_write(void* keys, int64_t keys_batch, int64_t keys_head, int64_t keys_position,
                         const void* key, int64_t key_batch, int64_t key_head, int64_t key_units,
                         void* values, int64_t values_batch, int64_t values_head,
                         int64_t values_position, const void* value, int64_t value_batch,
                         int64_t value_head, int64_t value_units, int64_t rows, int64_t heads,
                         int64_t bytes, int64_t room, const int64_t* at) {
    using namespace moepress;
    begin();
    const int64_t position = *at;
    if (position < 0 || position >= room) fail("a token is written outside of the room of a cache");
#define MOEPRESS_WRITE(type)                                                                      \
    write_token(static_cast<type*>(keys), keys_batch, keys_head, keys_position,                   \
                static_cast<const type*>(key), key_batch, key_head, int(key_units),               \
                static_cast<type*>(values), values_batch, values_head, values_position,           \
                static_cast<const type*>(value), value_batch, value_head, int(value_units),       \
                int(rows), int(heads), position)
    if (bytes == 16)
        MOEPRESS_WRITE(uint4);
    else if (bytes == 8)
        MOEPRESS_WRITE(uint2);
    else if (bytes == 4)
        MOEPRESS_WRITE(uint32_t);
    else if (bytes == 2)
        MOEPRESS_WRITE(uint16_t);
    else
        MOEPRESS_WRITE(uint8_t);
#undef MOEPRESS_WRITE
}
