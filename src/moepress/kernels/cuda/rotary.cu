// Rotary embedding of the queries and keys of a few tokens.
#include "numbers.h"

// Pairs of numbers of a head are turned by an angle: y = x cos - x' sin, y' = x' cos' + x sin'.
//
// Args:
//   q, k: [batches, heads, tokens, size] of a dtype, each with its strides but the last, which is 1.
//   cos, sin: [batches, tokens, columns] of a dtype, with one pair of strides.
//   rotated: numbers of a head that turn, the first ones. The others are copied.
//   neighbours_in, neighbours_out: where the numbers of pair i are, in x and in y: at 2 i and
//     2 i + 1, else at i and i + rotated / 2.
//   of_pairs: the angle of pair i is in column i, else each number's in the column of its place in x.
//   wide: sums and products are float32; else rounded to the dtype of q, one by one, as by torch.
//
// Grid: (heads of q and k, tokens, batches). Threads: any number.
extern "C" __global__ void __launch_bounds__(256)
    moepress_rotary(const void* q, int64_t q_batch, int64_t q_head, int64_t q_token, int64_t heads,
                    const void* k, int64_t k_batch, int64_t k_head, int64_t k_token, int64_t dtype,
                    const void* cos, const void* sin, int64_t angle_batch, int64_t angle_token,
                    int64_t angle_dtype, int64_t size, int64_t rotated, int64_t neighbours_in,
                    int64_t neighbours_out, int64_t of_pairs, int64_t wide, void* q_out,
                    int64_t q_out_batch, int64_t q_out_head, int64_t q_out_token, void* k_out,
                    int64_t k_out_batch, int64_t k_out_head, int64_t k_out_token) {
    begin();
    const bool is_q = blockIdx.x < heads;
    const int64_t head = is_q ? blockIdx.x : blockIdx.x - heads, token = blockIdx.y;
    const int64_t batch = blockIdx.z;
    const void* x = is_q ? q : k;
    void* y = is_q ? q_out : k_out;
    const int64_t from = is_q ? batch * q_batch + head * q_head + token * q_token
                              : batch * k_batch + head * k_head + token * k_token;
    const int64_t to = is_q ? batch * q_out_batch + head * q_out_head + token * q_out_token
                            : batch * k_out_batch + head * k_out_head + token * k_out_token;
    const int64_t angles = batch * angle_batch + token * angle_token;
    const int64_t pairs = rotated / 2, rounding = wide ? int64_t(kFloat32) : dtype;
    for (int64_t i = threadIdx.x; i < pairs + size - rotated; i += blockDim.x) {
        if (i >= pairs) {
            const int64_t at = rotated + i - pairs;
            store_number(y, to + at, dtype, load_number(x, from + at, dtype));
            continue;
        }
        const int64_t in = neighbours_in ? 2 * i : i, in2 = neighbours_in ? in + 1 : i + pairs;
        const int64_t out = neighbours_out ? 2 * i : i, out2 = neighbours_out ? out + 1 : i + pairs;
        const int64_t angle = angles + (of_pairs ? i : in), angle2 = angles + (of_pairs ? i : in2);
        const float a = load_number(x, from + in, dtype), b = load_number(x, from + in2, dtype);
        const float first = rounded_to(rounding, a * load_number(cos, angle, angle_dtype)) -
                            rounded_to(rounding, b * load_number(sin, angle, angle_dtype));
        const float second = rounded_to(rounding, b * load_number(cos, angle2, angle_dtype)) +
                             rounded_to(rounding, a * load_number(sin, angle2, angle_dtype));
        store_number(y, to + out, dtype, first);
        store_number(y, to + out2, dtype, second);
    }
}
