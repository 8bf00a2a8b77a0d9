// The C interface of the library.
//
// Functions that return int32_t results return a Result. On any but kOk nothing is written, except
// after kNoMemory and kReadFailed, when some of the outputs may be. All memory belongs to the caller. Sizes are
// checked here, and no packed byte outside the given ranges is ever read.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define MOEPRESS_API extern "C" __declspec(dllexport)
#else
#define MOEPRESS_API extern "C" __attribute__((visibility("default")))
#endif

enum Result : int32_t {  // in words: RESULTS in interface.py
    kOk = 0,
    kBadCodec,       // code bits, group size or row length that no codec has
    kBadBytes,       // a matrix reaches outside its packed bytes
    kBadShape,       // a size or the number of threads is out of range
    kBadActivation,  // unknown activation function
    kBadId,          // an embedding id outside the table
    kBadPrecision,   // activation bits other than 8 and 16
    kNoMemory,
    kReadFailed,  // an expert could not be read from its file: moepress_store_failure says why
    kForked,      // the store belongs to another process, of which this one is a copy
    kNoStore,     // this system has no expert store
    kBadPosition,  // of a token, outside of the room of a cache
};

// Kinds of numbers.
enum MoepressNumbers { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// The version of this interface; interface.py refuses another.
MOEPRESS_API int32_t moepress_interface();

// The instruction sets that were compiled and that this CPU has, best first, separated by blanks.
MOEPRESS_API const char* moepress_instruction_sets();

// Run on one of them from now on. Returns 1, or 0 if it is not among them.
MOEPRESS_API int32_t moepress_use(const char* instruction_set);

// Lend a team of threads (threads.h), or null.
MOEPRESS_API void moepress_lend_team(void* gomp_parallel);

// ---- Scalar matrices (scalar.cpp): activations are rounded to activation_bits, 8 or 16 ----------

// y [tokens][rows] = x [tokens][cols] W^T + bias [rows]; bias may be null. x and y are float or, if
// `bfloat16` is 1, bfloat16 (numbers.h).
MOEPRESS_API int32_t moepress_scalar_linear(const void* x, int64_t tokens, int64_t cols,
                                            const uint8_t* packed, int64_t packed_bytes,
                                            int64_t rows, int32_t bits, int32_t group,
                                            const float* bias, int32_t activation_bits,
                                            int32_t threads, int32_t bfloat16, void* y);

// Experts on disk (store.h), below.
struct MoepressStore;

// What lies between the two products of an expert. kernels/gate.py says what the fields mean, and
// which values they may have.
struct MoepressGate {
    int32_t activation;            // Activation (isa.h)
    int32_t gated, limits_output;  // 0 or 1
    float limit, alpha, up_offset, gate_softcap, up_softcap;
};

// The biases of the experts' two products.
struct MoepressBiases {
    const void* gate_up;  // [experts][rows], or null: none. Rows: 2 * intermediate if gated
    const void* down;     // [experts][hidden], or null: none
    int32_t bfloat16;     // 1: numbers are bfloat16; 0: float
};

// y [tokens][hidden]: y_t = sum over k of weight[t][k] * down_e(act(gate_e x_t) * up_e x_t), with
// e = index[t][k], and with the biases and the gate given. An index outside 0 .. experts - 1 adds
// nothing. Tables [experts][2]: first byte, code bits. An expert whose matrices both have 0 bits is
// left out and adds nothing. x and y may be bfloat16, as above. With a store, the packed bytes are its region, and the experts that
// tokens chose are read where they are not present; `layer` is the layer's number in the store.
MOEPRESS_API int32_t moepress_scalar_experts(
    const void* x, int64_t tokens, int64_t hidden, const int64_t* index, const float* weight,
    int64_t k, const uint8_t* gate_up, int64_t gate_up_bytes, const int64_t* gate_up_table,
    int32_t gate_up_group, const uint8_t* down, int64_t down_bytes, const int64_t* down_table,
    int32_t down_group, int64_t experts, int64_t intermediate, const MoepressGate* gate,
    const MoepressBiases* biases, MoepressStore* store, int64_t layer, int32_t activation_bits,
    int32_t threads, int32_t bfloat16, void* y);

// y [n][cols] = the rows ids [n] of a packed [rows][cols] matrix.
MOEPRESS_API int32_t moepress_scalar_embedding(const int64_t* ids, int64_t n,
                                               const uint8_t* packed, int64_t packed_bytes,
                                               int64_t rows, int64_t cols, int32_t bits,
                                               int32_t group, float* y);

// ---- Trellis matrices (trellis.cpp): activations are rotated and rounded -----------------------

// As moepress_scalar_linear and moepress_scalar_experts. `bits`, in tables too, are 1 to 4 or, for
// half widths, ten times the bits: 15, 25, 35 (trellis_code.h).
MOEPRESS_API int32_t moepress_trellis_linear(const void* x, int64_t tokens, int64_t cols,
                                             const uint8_t* packed, int64_t packed_bytes,
                                             int64_t rows, int32_t bits, int32_t group,
                                             const float* bias, int32_t activation_bits,
                                             int32_t threads, int32_t bfloat16, void* y);
MOEPRESS_API int32_t moepress_trellis_experts(
    const void* x, int64_t tokens, int64_t hidden, const int64_t* index, const float* weight,
    int64_t k, const uint8_t* gate_up, int64_t gate_up_bytes, const int64_t* gate_up_table,
    int32_t gate_up_group, const uint8_t* down, int64_t down_bytes, const int64_t* down_table,
    int32_t down_group, int64_t experts, int64_t intermediate, const MoepressGate* gate,
    const MoepressBiases* biases, MoepressStore* store, int64_t layer, int32_t activation_bits,
    int32_t threads, int32_t bfloat16, void* y);

// branches [8][rows]: the best trellis paths for target [8][rows], eight columns of a matrix in
// units of code values (rounding/methods/viterbi.py). `feedback` [8][rows] may be null. Else the
// paths are for t = target + feedback; then target becomes t - values, and feedback the errors
// target - values. viterbi.cpp.
MOEPRESS_API int32_t moepress_trellis_search(float* target, float* feedback, int64_t rows,
                                             int32_t bits, int32_t threads, uint8_t* branches);

// values [rows][cols]: what `branches` [rows][cols] choose (kernels/trellis.py). rows is a multiple
// of 64, cols of 8. trellis_values.cpp.
MOEPRESS_API int32_t moepress_trellis_values(const uint8_t* branches, int64_t rows, int64_t cols,
                                             int32_t bits, int32_t threads, float* values);

// codes: the stored bytes of whole slabs of `branches` [rows][cols] (kernels/trellis.py, pack_codes).
// rows is a multiple of 64, cols of 8, at half widths of 16. trellis_pack.cpp.
MOEPRESS_API int32_t moepress_trellis_pack(const uint8_t* branches, int64_t rows, int64_t cols,
                                           int32_t bits, int32_t threads, uint8_t* codes);

// Adds to product and energy [rows] the sums over columns k of c_k w_k v_k and c_k v_k^2 for
// v = w - E R (rounding/fit.py, add_in_order). `weighted` [cols][rows] float or bfloat16, times
// per_scale [rows] or null, is w; residual [cols][rows]; blocks [cols / 8][8][8]; curvature [cols]
// is c. cols is a multiple of 8. trellis_fit.cpp.
MOEPRESS_API int32_t moepress_trellis_fit(const void* weighted, int32_t bfloat16,
                                          const float* per_scale, const float* residual,
                                          const float* blocks, const float* curvature, int64_t cols,
                                          int64_t rows, int32_t threads, float* product,
                                          float* energy);

// out [rows][cols], float or bfloat16: scale [rows] * (target - drawn)^T Q, of target and drawn
// [cols][rows] (rounding/noise.py, plain_rows). cols is a multiple of 32. trellis_rows.cpp.
MOEPRESS_API int32_t moepress_trellis_rows(const float* target, const float* drawn,
                                           const float* scale, int64_t cols, int64_t rows,
                                           int32_t bfloat16, int32_t threads, void* out);

// x [rows][cols] <- x Q^T in place, or with `back` x Q (docs/format.md): floats equal to those of
// `rotate` and `rotate_back` of kernels/trellis.py. cols is a multiple of 32. trellis.cpp.
MOEPRESS_API int32_t moepress_trellis_rotate(float* x, int64_t rows, int64_t cols, int32_t back,
                                             int32_t threads);

// ---- Online pruning (drop.cpp) ------------------------------------------------------------------

// Rank a token's choices by falling weight. A choice whose weight is below thresholds[rank] times
// the largest is dropped: its index becomes `experts`, its weight 0. With `renormalise` the
// remaining weights are scaled to the sum of all. Tokens whose `keep` is not 0 keep all; keep may
// be null. All arrays are [tokens][k], except thresholds [k] and keep [tokens].
MOEPRESS_API int32_t moepress_drop(const int64_t* index, const float* weight, int64_t tokens,
                                   int64_t k, int64_t experts, const float* thresholds,
                                   int32_t renormalise, const uint8_t* keep, int64_t* ranked,
                                   float* kept, uint8_t* dropped);

// ---- Small operations of decoding (small.cpp) ---------------------------------------------------

// What they compute, and what they round when: kernels/small_reference.py. Strides are in numbers,
// and the numbers of a row follow each other. Results do not lie in the inputs. kBadShape: also if
// there are no such numbers, formula or way to turn.

// y [outer][rows][size] = the root mean square norm of rows of x, which begin outer_stride and
// row_stride apart. weight [size], or null. `formula`: its place in FORMULAS. y has the numbers of
// x; for the formula "rounded" and a weight of others, floats. Sums have a fixed order.
MOEPRESS_API int32_t moepress_rms_norm(const void* x, int32_t x_numbers, int64_t outer,
                                       int64_t outer_stride, int64_t rows, int64_t row_stride,
                                       int64_t size, const void* weight, int32_t weight_numbers,
                                       float epsilon, int32_t formula, int32_t threads, void* y);

// y [n] = a [n] + b [n], of one kind of numbers, rounded once. y may be a or b.
MOEPRESS_API int32_t moepress_add(const void* a, const void* b, int64_t n, int32_t numbers,
                                  void* y);

// A sum of what holds: the fields of `Style`, and `wide`.
enum MoepressTurn { kNeighboursIn = 1, kNeighboursOut = 2, kOfPairs = 4, kWide = 8 };

// Turn the first `rotated` of the `size` numbers of each head of q [batches][q_heads][tokens] and
// k [batches][k_heads][tokens]; the others are copied. cos, sin [batches][tokens][rotated, or with
// kOfPairs rotated / 2] have one pair of strides, and without kWide the numbers of q and k.
MOEPRESS_API int32_t moepress_rotary(
    const void* q, int64_t q_batch, int64_t q_head, int64_t q_token, int64_t q_heads,
    const void* k, int64_t k_batch, int64_t k_head, int64_t k_token, int64_t k_heads,
    int32_t numbers, const void* cos, const void* sin, int64_t angle_batch, int64_t angle_token,
    int32_t angle_numbers, int64_t batches, int64_t tokens, int64_t size, int64_t rotated,
    int32_t turn, int32_t threads, void* q_out, int64_t q_out_batch, int64_t q_out_head,
    int64_t q_out_token, void* k_out, int64_t k_out_batch, int64_t k_out_head,
    int64_t k_out_token);

// keys [batches][heads][room][size], at *position of the room, = key [batches][heads][size], and
// likewise values. Numbers are of any kind, of 1, 2, 4, 8 or 16 bytes.
MOEPRESS_API int32_t moepress_cache_write(
    void* keys, int64_t keys_batch, int64_t keys_head, int64_t keys_position, const void* key,
    int64_t key_batch, int64_t key_head, int64_t key_size, int32_t key_bytes, void* values,
    int64_t values_batch, int64_t values_head, int64_t values_position, const void* value,
    int64_t value_batch, int64_t value_head, int64_t value_size, int32_t value_bytes,
    int64_t batches, int64_t heads, int64_t room, const int64_t* position);

// ---- Routers (route.cpp) ------------------------------------------------------------------------

// How a router gets from logits to weights: Formula of kernels/router.py says what the fields mean.
struct MoepressFormula {
    int32_t score;                             // by its place in SCORES
    int32_t normalise;                         // 0 or 1
    int32_t group_best;                        // 1 or 2
    int32_t product, logits, scores, weights;  // MoepressNumbers
    float epsilon, scale;
    int64_t groups, kept_groups;
};

// logits [tokens][experts] of hidden [tokens][cols] and weight [experts][cols]; the `weights`
// [tokens][k] and `index` [tokens][k] of the experts that each token chooses. `bias` and
// `correction` [experts] may be null. *_numbers: MoepressNumbers of an input; those of logits and
// weights are in the formula. Same bits with any number of threads and any instruction set.
MOEPRESS_API int32_t moepress_route(const void* hidden, int32_t hidden_numbers, int64_t tokens,
                                    int64_t cols, const void* weight, int32_t weight_numbers,
                                    int64_t experts, const void* bias, int32_t bias_numbers,
                                    const void* correction, int32_t correction_numbers, int64_t k,
                                    const MoepressFormula* formula, int32_t threads, void* logits,
                                    void* weights, int64_t* index);

// ---- Attention (attention.cpp) ------------------------------------------------------------------

constexpr int32_t kMoepressBool = 3;  // of a mask: bytes; 0 hides, others show

// y [batches][tokens][query_heads][size] = softmax(q k^T scale + mask) v, for few queries.
// q [batches][query_heads][tokens][size]; k, v [batches][heads][positions][size]; query head h has
// those of head h / (query_heads / heads). Strides are in numbers; those of `size` are 1. `numbers`
// are those of q, k, v and y. The mask [batches][query_heads][tokens][positions] is null, or of
// `mask_numbers`: bool, or floats that are added to the scores, of which -inf hides. Its strides may
// be 0. What is hidden adds nothing, whatever it is; what is hidden from all queries is not read. A
// query that sees nothing gets zeros. size is at most 512. kBadShape: also if numbers are unknown.
MOEPRESS_API int32_t moepress_attention(
    const void* q, int64_t q_batch, int64_t q_head, int64_t q_token, const void* k,
    int64_t k_batch, int64_t k_head, int64_t k_position, const void* v, int64_t v_batch,
    int64_t v_head, int64_t v_position, const void* mask, int32_t mask_numbers,
    int64_t mask_batch, int64_t mask_head, int64_t mask_token, int64_t mask_position,
    int64_t batches, int64_t query_heads, int64_t heads, int64_t tokens, int64_t positions,
    int64_t size, float scale, int32_t numbers, int32_t threads, void* y);

// ---- Experts on disk (store.h) ------------------------------------------------------------------

// The bytes of a matrix in a file, and their place in the region of a store: both have the same
// remainder modulo a page of the system, of 4096 bytes or more. Pages of the region belong to one
// matrix each. Matrices of 16 MB and more have huge pages, of 2 MB, and begin in the first small
// page of one.
struct MoepressRange {
    int64_t fd, offset, bytes, place;
};

struct MoepressStoreCounts {
    int64_t tokens;      // that passed the first layer
    int64_t uses, hits;  // experts that calls needed, each once a call; those that were present
    int64_t bytes_used;  // of the needed ones
    int64_t reads, bytes_read, dropped;
    int64_t bytes_held;
    double seconds_waited;
};

struct MoepressStoreFailure {
    int32_t error;  // errno; -1: the file ends before the matrix does
    int64_t fd;
};

// A store of `budget` bytes. matrices [experts][2]: of gate_up and down; an expert that is left out
// has 0 bytes. first_of_layer [layers + 1]. uses [experts]: what to take for the number of uses so
// far, of which each counts half after half_life tokens. The caller keeps the files open.
MOEPRESS_API int32_t moepress_store_open(const MoepressRange* matrices,
                                         const int64_t* first_of_layer, int64_t layers,
                                         const double* uses, double half_life, int64_t budget,
                                         int32_t threads, MoepressStore** store);
MOEPRESS_API void moepress_store_close(MoepressStore* store);
MOEPRESS_API uint8_t* moepress_store_region(const MoepressStore* store, int64_t* bytes);

// at_hand [experts of the layer]: 1 where an expert is present or being read.
MOEPRESS_API int32_t moepress_store_at_hand(MoepressStore* store, int64_t layer, uint8_t* at_hand);

// Read experts that may be needed, behind all that are. Nothing of a higher priority makes room.
MOEPRESS_API int32_t moepress_store_read_ahead(MoepressStore* store, int64_t layer,
                                               const int64_t* experts, int64_t n);

// Read experts and keep them until `release`. Meanwhile no other call is served. kNoMemory: they do
// not fit in the budget together.
MOEPRESS_API int32_t moepress_store_hold(MoepressStore* store, int64_t layer,
                                         const int64_t* experts, int64_t n, void** held);
MOEPRESS_API void moepress_store_release(void* held);

// Keep the system from taking the store's memory. Returns 0 or an errno.
MOEPRESS_API int32_t moepress_store_lock(MoepressStore* store);

MOEPRESS_API void moepress_store_counts(MoepressStore* store, MoepressStoreCounts* counts);
// The last read that failed.
MOEPRESS_API void moepress_store_failure(MoepressStore* store, MoepressStoreFailure* failure);
