// The first step of a product: its inputs as codes; and of experts: their pairs sorted, by one more
// block.
#include "rounding.cuh"
#include "routing.cuh"

// Codes of x [rows][K]. Where index is not null, block 0 sorts pairs. Grid: as Codes in codes.py
// says, and one more block for sorting.
extern "C" __global__ void __launch_bounds__(1024, 1)
    moepress_inputs(const void* x, int64_t dtype, int64_t rows, int64_t cols, int64_t rotated,
                    int64_t g, int64_t planes, int64_t halves, int8_t* q, float* scale,
                    int32_t* sum, const int64_t* index, int64_t pairs, const int64_t* gate_up_table,
                    const int64_t* down_table, int64_t experts, int64_t size, int64_t panels,
                    int32_t* pair, int32_t* position, int32_t* panel, int32_t* used) {
    using namespace moepress;
    begin();
    const bool sorts = index != nullptr;
    if (sorts && blockIdx.x == 0) {
        route(Routing{index, gate_up_table, down_table, pairs, experts, size, panels, pair,
                      position, panel, used});
        return;
    }
    const int group_shift = __ffs(int(g)) - 1;
    const Codes codes = {q,       scale,         sum,         int(planes), group_shift,
                         rotated != 0, halves != 0, int(rows), int(cols)};
    round_rows(Inputs{x, dtype, cols}, int(blockIdx.x) - sorts, int(rows), codes);
}
