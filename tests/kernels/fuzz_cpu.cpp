// Calls the C interface with random shapes, bytes, tables and indices, under sanitizers. Every
// buffer is a heap allocation of exactly its size, so that an access of one byte outside ends the
// process.
//
//     fuzz_cpu ROUNDS

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "moepress.h"

namespace {

std::mt19937_64 engine(7);

int64_t pick(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine);
}

template <class T>
T one_of(std::initializer_list<T> list) {
    return list.begin()[pick(0, int64_t(list.size()) - 1)];
}

template <class T>
struct Buffer {
    std::unique_ptr<T[]> at;
    int64_t size;
    // Null if it is empty, as the address of a tensor is.
    explicit Buffer(int64_t n) : at(n > 0 ? new T[size_t(n)] : nullptr), size(n) {}
    T* get() { return at.get(); }
};

Buffer<uint8_t> random_bytes(int64_t n) {
    Buffer<uint8_t> out(n);
    for (int64_t i = 0; i < n; ++i) out.at[size_t(i)] = uint8_t(engine());
    return out;
}

Buffer<float> random_floats(int64_t n) {
    Buffer<float> out(n);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < n; ++i) out.at[size_t(i)] = normal(engine);
    if (n > 0 && pick(0, 3) == 0) {  // any pattern of bits: NaN, infinity, denormal
        const uint32_t bits = uint32_t(engine());
        std::memcpy(&out.at[size_t(pick(0, n - 1))], &bits, 4);
    }
    return out;
}

// Inputs or outputs in float or bfloat16, in bytes.
Buffer<uint8_t> random_numbers(int64_t n, int32_t bfloat16) {
    if (bfloat16) return random_bytes(2 * n);
    Buffer<float> floats = random_floats(n);
    Buffer<uint8_t> out(4 * n);
    if (n > 0) std::memcpy(out.get(), floats.get(), size_t(4 * n));
    return out;
}

// A number of threads, sometimes as large as the interface takes.
int32_t threads() { return pick(0, 49) ? int32_t(pick(1, 3)) : INT32_MAX; }

int64_t nbytes(int64_t rows, int64_t cols, int bits, int group) {  // docs/format.md
    const int64_t groups = cols / group;
    const int64_t zeros = bits >= 2 && bits <= 4 ? 16 * groups : 0;
    const int64_t block = 2 * cols * bits + 32 * groups + zeros;
    return ((rows + 15) / 16 * block + 63) / 64 * 64;
}

// Mostly `right`, sometimes a number near it, sometimes any number.
int64_t perhaps(int64_t right) {
    const int64_t kind = pick(0, 19);
    if (kind == 0) return int64_t(engine());
    if (kind == 1) return right + pick(-70, 70);
    return right;
}

void expect(bool good, const char* what) {
    if (good) return;
    std::fprintf(stderr, "%s\n", what);
    std::exit(1);
}

void scalar_linear() {
    const int bits = one_of({1, 2, 3, 4, 8}), group = one_of({32, 64, 128});
    const int64_t tokens = pick(0, 200) ? one_of<int64_t>({0, 1, 2, 3, 5, 8, 17, 40}) : 4100;
    const int64_t rows = pick(1, 70), cols = group * pick(1, 3);
    const int64_t right = nbytes(rows, cols, bits, group);
    const int64_t given = std::max<int64_t>(0, std::min<int64_t>(perhaps(right), 1 << 20));
    Buffer<uint8_t> packed = random_bytes(given);
    const int32_t half = int(pick(0, 1));
    Buffer<uint8_t> x = random_numbers(tokens * cols, half), y(tokens * rows * (half ? 2 : 4));
    Buffer<float> bias = random_floats(rows);
    const int32_t result = moepress_scalar_linear(
        x.get(), tokens, cols, packed.get(), given, rows, bits, group,
        pick(0, 1) ? bias.get() : nullptr, one_of({8, 16}), threads(), half, y.get());
    expect(result == (given == right ? kOk : kBadBytes), "linear: wrong result");
}

void scalar_embedding() {
    const int bits = one_of({1, 2, 3, 4, 8}), group = one_of({32, 64, 128});
    const int64_t rows = pick(1, 70), cols = group * pick(1, 3), n = pick(0, 5);
    const int64_t size = nbytes(rows, cols, bits, group);
    Buffer<uint8_t> packed = random_bytes(size);
    Buffer<int64_t> ids(n);
    bool good = true;
    for (int64_t i = 0; i < n; ++i) {
        ids.at[size_t(i)] = perhaps(pick(0, rows - 1));
        good = good && ids.at[size_t(i)] >= 0 && ids.at[size_t(i)] < rows;
    }
    Buffer<float> y(n * cols);
    const int32_t result = moepress_scalar_embedding(ids.get(), n, packed.get(), size, rows, cols,
                                                     bits, group, y.get());
    expect(result == (good ? kOk : kBadId), "embedding: wrong result");
}

// Random gates, sensible or not, and biases of exactly their size.
struct Options {
    MoepressGate gate;
    std::vector<Buffer<uint8_t>> bytes;
    MoepressBiases biases;

    Options(int64_t count, int64_t hidden, int64_t inner) : gate{}, biases{} {
        gate.activation = int(pick(0, 9));
        gate.gated = int(pick(0, 3) > 0);
        gate.limits_output = int(pick(0, 1));
        for (float* field : {&gate.limit, &gate.gate_softcap, &gate.up_softcap})
            *field = one_of({INFINITY, INFINITY, 1.0f, 0.0f, NAN});
        gate.alpha = one_of({1.0f, 1.0f, 1.702f, -INFINITY});
        gate.up_offset = one_of({0.0f, 0.0f, 1.0f, NAN});
        biases.bfloat16 = int(pick(0, 1));
        const int64_t size = biases.bfloat16 ? 2 : 4;
        bytes.push_back(random_bytes(count * rows(inner) * size));
        bytes.push_back(random_bytes(count * hidden * size));
        if (pick(0, 1)) biases.gate_up = bytes[0].get();
        if (pick(0, 1)) biases.down = bytes[1].get();
    }

    int64_t rows(int64_t inner) const { return (gate.gated ? 2 : 1) * inner; }
};

void scalar_experts() {
    const int groups[2] = {one_of({32, 64, 128}), one_of({32, 64, 128})};
    const int64_t tokens = pick(0, 200) ? one_of<int64_t>({0, 1, 2, 3, 9, 40, 200}) : 4100;
    const int64_t k = pick(0, 4);
    const int64_t count = pick(0, 5);
    const int64_t hidden = groups[0] * pick(1, 2), inner = groups[1] * pick(1, 2);
    const Options options(count, hidden, inner);
    const int64_t shapes[2][2] = {{options.rows(inner), hidden}, {hidden, inner}};
    std::vector<Buffer<uint8_t>> packed;
    std::vector<Buffer<int64_t>> tables;
    for (int which = 0; which < 2; ++which) {
        tables.emplace_back(2 * count);
        int64_t offset = 0;
        for (int64_t e = 0; e < count; ++e) {
            const int bits = one_of({1, 2, 3, 4, 8});
            tables[size_t(which)].at[size_t(2 * e)] = perhaps(offset);
            tables[size_t(which)].at[size_t(2 * e + 1)] = perhaps(bits);
            offset += nbytes(shapes[which][0], shapes[which][1], bits, groups[which]);
        }
        packed.push_back(random_bytes(pick(0, 9) ? offset : pick(0, offset)));
    }
    Buffer<int64_t> index(tokens * k);
    for (int64_t i = 0; i < tokens * k; ++i) index.at[size_t(i)] = perhaps(pick(0, 4));
    const int32_t half = int(pick(0, 1));
    Buffer<uint8_t> x = random_numbers(tokens * hidden, half), y(tokens * hidden * (half ? 2 : 4));
    Buffer<float> weight = random_floats(tokens * k);
    const int32_t result = moepress_scalar_experts(
        x.get(), tokens, hidden, index.get(), weight.get(), k, packed[0].get(), packed[0].size,
        tables[0].get(), int(perhaps(groups[0])), packed[1].get(), packed[1].size, tables[1].get(),
        groups[1], count, inner, &options.gate, &options.biases, nullptr, 0, one_of({8, 16}),
        threads(), half, y.get());
    expect(result == kOk || result == kBadCodec || result == kBadBytes, "experts: wrong result");
}

void drop() {
    const int64_t tokens = pick(0, 9), k = pick(0, 8), count = pick(0, 5);
    Buffer<int64_t> index(tokens * k), ranked(tokens * k);
    for (int64_t i = 0; i < tokens * k; ++i) index.at[size_t(i)] = perhaps(pick(0, 4));
    Buffer<float> weight = random_floats(tokens * k), thresholds = random_floats(k);
    Buffer<float> kept(tokens * k);
    Buffer<uint8_t> keep = random_bytes(tokens), dropped(tokens * k);
    const int32_t result = moepress_drop(
        index.get(), weight.get(), tokens, k, count, thresholds.get(), int(pick(0, 1)),
        pick(0, 1) ? keep.get() : nullptr, ranked.get(), kept.get(), dropped.get());
    expect(result == kOk, "drop: wrong result");
}

int trellis_width() { return one_of({1, 2, 3, 4, 15, 25, 35}); }  // 15: 1.5 bits

int64_t trellis_bytes(int64_t rows, int64_t cols, int width) {  // docs/format.md
    const int64_t codes = width > 8 ? 8 * cols * width / 10 : 8 * cols * width;
    return (rows + 63) / 64 * (codes + 128);
}

void trellis_linear() {
    const int bits = trellis_width(), group = one_of({32, 64, 128});
    const int64_t tokens = pick(0, 60) ? one_of<int64_t>({0, 1, 2, 5, 7, 8, 23}) : 300;
    const int64_t rows = pick(1, 140), cols = group * pick(1, 3);
    const int64_t right = trellis_bytes(rows, cols, bits);
    const int64_t given = std::max<int64_t>(0, std::min<int64_t>(perhaps(right), 1 << 20));
    Buffer<uint8_t> packed = random_bytes(given);
    const int32_t half = int(pick(0, 1));
    Buffer<uint8_t> x = random_numbers(tokens * cols, half), y(tokens * rows * (half ? 2 : 4));
    Buffer<float> bias = random_floats(rows);
    const int32_t result = moepress_trellis_linear(
        x.get(), tokens, cols, packed.get(), given, rows, bits, group,
        pick(0, 1) ? bias.get() : nullptr, one_of({8, 16}), threads(), half, y.get());
    expect(result == (given == right ? kOk : kBadBytes), "trellis linear: wrong result");
}

void trellis_experts() {
    const int groups[2] = {one_of({32, 64, 128}), one_of({32, 64, 128})};
    const int64_t tokens = pick(0, 60) ? one_of<int64_t>({0, 1, 3, 9, 30}) : 300;
    const int64_t k = pick(0, 4), count = pick(0, 5);
    const int64_t hidden = groups[0] * pick(1, 2), inner = groups[1] * pick(1, 2);
    const Options options(count, hidden, inner);
    const int64_t shapes[2][2] = {{options.rows(inner), hidden}, {hidden, inner}};
    std::vector<Buffer<uint8_t>> packed;
    std::vector<Buffer<int64_t>> tables;
    for (int which = 0; which < 2; ++which) {
        tables.emplace_back(2 * count);
        int64_t offset = 0;
        for (int64_t e = 0; e < count; ++e) {
            const int bits = trellis_width();
            tables[size_t(which)].at[size_t(2 * e)] = perhaps(offset);
            tables[size_t(which)].at[size_t(2 * e + 1)] = perhaps(bits);
            offset += trellis_bytes(shapes[which][0], shapes[which][1], bits);
        }
        packed.push_back(random_bytes(pick(0, 9) ? offset : pick(0, offset)));
    }
    Buffer<int64_t> index(tokens * k);
    for (int64_t i = 0; i < tokens * k; ++i) index.at[size_t(i)] = perhaps(pick(0, 4));
    const int32_t half = int(pick(0, 1));
    Buffer<uint8_t> x = random_numbers(tokens * hidden, half), y(tokens * hidden * (half ? 2 : 4));
    Buffer<float> weight = random_floats(tokens * k);
    const int32_t result = moepress_trellis_experts(
        x.get(), tokens, hidden, index.get(), weight.get(), k, packed[0].get(), packed[0].size,
        tables[0].get(), int(perhaps(groups[0])), packed[1].get(), packed[1].size, tables[1].get(),
        groups[1], count, inner, &options.gate, &options.biases, nullptr, 0, one_of({8, 16}),
        threads(), half, y.get());
    expect(result == kOk || result == kBadCodec || result == kBadBytes,
           "trellis experts: wrong result");
}

void trellis_search() {
    const int64_t rows = 64 * pick(1, 3);
    Buffer<float> target = random_floats(8 * rows), feedback = random_floats(8 * rows);
    const float spread = one_of({0.0f, 1.0f, 100.0f, 1e6f});  // of costs: equal to saturated
    for (int64_t i = 0; i < target.size; ++i) target.at[size_t(i)] *= spread;
    Buffer<uint8_t> branches(8 * rows);
    const int bits = trellis_width();
    const int32_t result = moepress_trellis_search(target.get(), pick(0, 1) ? feedback.get() : nullptr,
                                                   rows, bits, threads(), branches.get());
    expect(result == kOk, "trellis search: wrong result");
    for (int64_t i = 0; i < branches.size; ++i)
        expect(branches.at[size_t(i)] < 1 << (bits > 8 ? bits / 10 + 1 : bits),
               "trellis search: a branch out of range");
    Buffer<float> values(8 * rows);
    expect(moepress_trellis_values(branches.get(), rows, 8, bits, threads(), values.get()) ==
               kOk,
           "trellis values: wrong result");
    const int64_t width = bits > 8 ? bits : 10 * bits, wide = bits > 8 ? 16 : 8;  // columns
    Buffer<uint8_t> some = random_bytes(rows * wide), codes(rows * wide * width / 80);
    expect(moepress_trellis_pack(some.get(), rows, wide, bits, threads(), codes.get()) == kOk,
           "trellis packing: wrong result");
    const int64_t cols = 32 * pick(1, 20), count = pick(1, 9);
    const int64_t fitted = pick(1, 3) * pick(1, 400);  // rows: more than one thread's share
    const int32_t narrow = int(pick(0, 1));
    Buffer<uint8_t> weighted = random_numbers(16 * fitted, narrow);
    Buffer<float> residual = random_floats(16 * fitted), per_scale = random_floats(fitted);
    Buffer<float> blocks = random_floats(128), curvature = random_floats(16);
    Buffer<float> product = random_floats(fitted), energy = random_floats(fitted);
    expect(moepress_trellis_fit(weighted.get(), narrow, pick(0, 1) ? per_scale.get() : nullptr,
                                residual.get(), blocks.get(), curvature.get(), 16, fitted,
                                threads(), product.get(), energy.get()) == kOk,
           "trellis fit: wrong result");
    Buffer<float> drawn = random_floats(cols * count), of_rows = random_floats(count);
    Buffer<float> columns = random_floats(cols * count);
    Buffer<uint8_t> made(cols * count * (narrow ? 2 : 4));
    expect(moepress_trellis_rows(columns.get(), drawn.get(), of_rows.get(), cols, count, narrow,
                                 threads(), made.get()) == kOk,
           "trellis rows: wrong result");
    Buffer<float> x = random_floats(count * cols);
    expect(moepress_trellis_rotate(x.get(), count, cols, int(pick(0, 1)), threads()) == kOk,
           "trellis rotation: wrong result");
}

// Heads or rows of numbers in a buffer of exactly the size that their strides reach.
struct Strided {
    int64_t outer, inner, size, step, far;  // rows, and their distances
    Buffer<uint8_t> bytes;

    Strided(int64_t outer, int64_t inner, int64_t size, int32_t numbers)
        : outer(outer), inner(inner), size(size), step(size + pick(0, 3)),
          far(inner * step + pick(0, 3)), bytes(0) {
        const bool any = outer > 0 && inner > 0 && size > 0;
        const int64_t reach = any ? (outer - 1) * far + (inner - 1) * step + size : 0;
        bytes = numbers == kFloat32 ? random_numbers(reach, 0) : random_bytes(2 * reach);
    }
    void* get() { return bytes.get(); }
};

void rms_norm() {
    const int32_t numbers = int(pick(0, 2)), of_weight = int(pick(0, 2)), formula = int(pick(0, 2));
    const int64_t size = pick(0, 20) ? pick(0, 200) : pick(2000, 4200);
    Strided x(pick(0, 3), pick(0, 40), size, numbers), weight(1, 1, size, of_weight);
    const bool weighted = pick(0, 3) > 0;
    const bool floats = numbers == kFloat32 || (weighted && formula == 0 && numbers != of_weight);
    Buffer<uint8_t> y(x.outer * x.inner * size * (floats ? 4 : 2));
    const int32_t result = moepress_rms_norm(
        x.get(), numbers, x.outer, x.far, x.inner, x.step, size, weighted ? weight.get() : nullptr,
        of_weight, 1e-5f, formula, threads(), y.get());
    expect(result == kOk, "rms_norm: wrong result");
}

void add() {
    const int32_t numbers = int(pick(0, 2));
    const int64_t n = pick(0, 300);
    const auto drawn = [&] { return Strided(1, 1, n, numbers); };
    Strided a = drawn(), b = drawn(), y = drawn();
    expect(moepress_add(a.get(), b.get(), n, numbers, pick(0, 3) ? y.get() : a.get()) == kOk,
           "add: wrong result");
}

void rotary() {
    const int32_t numbers = int(pick(0, 2)), turn = int(pick(0, 15));
    const int32_t of_angles = turn & kWide ? int(pick(0, 2)) : numbers;
    const int64_t batches = pick(0, 2), tokens = pick(0, 3), q_heads = pick(0, 5);
    const int64_t k_heads = pick(0, 5), size = pick(0, 20) ? pick(0, 150) : pick(500, 700);
    const int64_t rotated = pick(0, size / 2) * 2;
    const int64_t columns = turn & kOfPairs ? rotated / 2 : rotated;
    // A head's tokens follow each other, or a token's heads.
    const auto heads = [&](int64_t count) {
        return Strided(batches, tokens * count, size, numbers);
    };
    Strided q = heads(q_heads), k = heads(k_heads), q_out = heads(q_heads), k_out = heads(k_heads);
    const bool heads_first = pick(0, 1) != 0;
    const auto head = [&](const Strided& x) { return heads_first ? tokens * x.step : x.step; };
    const auto token = [&](const Strided& x, int64_t count) {
        return heads_first ? x.step : count * x.step;
    };
    Strided cos(batches, tokens, columns, of_angles), sin = Strided(1, 1, 0, of_angles);
    sin.bytes = random_bytes(cos.bytes.size);
    const int32_t result = moepress_rotary(
        q.get(), q.far, head(q), token(q, q_heads), q_heads, k.get(), k.far, head(k),
        token(k, k_heads), k_heads, numbers, cos.get(), sin.get(), cos.far, cos.step, of_angles,
        batches, tokens, size, rotated, turn, threads(), q_out.get(), q_out.far, head(q_out),
        token(q_out, q_heads), k_out.get(), k_out.far, head(k_out), token(k_out, k_heads));
    expect(result == kOk, "rotary: wrong result");
}

void cache_write() {
    const int64_t batches = pick(0, 2), heads = pick(0, 3), room = pick(0, 4);
    const auto held = [&](int64_t size) { return Strided(batches, heads * room, size, kFloat32); };
    const auto one = [&](int64_t size) { return Strided(batches, heads, size, kFloat32); };
    Strided keys = held(pick(0, 20)), values = held(pick(0, 20));
    Strided key = one(keys.size), value = one(values.size);
    Buffer<int64_t> position(1);
    *position.get() = perhaps(pick(-1, room));
    const int32_t result = moepress_cache_write(
        keys.get(), keys.far, room * keys.step, keys.step, key.get(), key.far, key.step, key.size,
        4, values.get(), values.far, room * values.step, values.step, value.get(), value.far,
        value.step, value.size, 4, batches, heads, room, position.get());
    const bool inside = *position.get() >= 0 && *position.get() < room;
    expect(result == (inside ? kOk : kBadPosition), "cache_write: wrong result");
}

// Buffers of their exact sizes; numbers of choices, groups and kinds that may be wrong.
void route() {
    const int64_t tokens = pick(0, 4), cols = pick(0, 150), size = pick(1, 20);
    const int64_t experts = size * pick(1, 4), kept = pick(1, experts / size);
    const auto kind = [] { return int32_t(one_of({kFloat32, kBfloat16, kFloat16})); };
    const auto numbers = [](int64_t n, int32_t given) { return random_numbers(n, given != kFloat32); };
    MoepressFormula formula{};
    formula.score = int32_t(perhaps(pick(0, 3)));
    formula.normalise = int32_t(pick(0, 1));
    formula.group_best = int32_t(perhaps(pick(1, 2)));
    for (int32_t* field : {&formula.product, &formula.logits, &formula.scores, &formula.weights})
        *field = kind();
    formula.epsilon = one_of({0.0f, 1e-20f, NAN});
    formula.scale = one_of({1.0f, 2.5f, INFINITY});
    formula.groups = perhaps(experts / size);
    formula.kept_groups = perhaps(kept);
    const int64_t k = perhaps(pick(1, size * kept)), room = k < 0 ? 0 : std::min(k, experts);
    const int32_t kinds[4] = {kind(), kind(), kind(), kind()};
    Buffer<uint8_t> hidden = numbers(tokens * cols, kinds[0]);
    Buffer<uint8_t> weight = numbers(experts * cols, kinds[1]);
    Buffer<uint8_t> bias = numbers(experts, kinds[2]), correction = numbers(experts, kinds[3]);
    Buffer<uint8_t> logits(tokens * experts * (formula.logits == kFloat32 ? 4 : 2));
    Buffer<uint8_t> weights(tokens * room * (formula.weights == kFloat32 ? 4 : 2));
    Buffer<int64_t> index(tokens * room);
    const int32_t result = moepress_route(
        hidden.get(), kinds[0], tokens, cols, weight.get(), pick(0, 9) ? kinds[1] : 3,
        experts, pick(0, 1) ? bias.get() : nullptr, kinds[2],
        pick(0, 1) ? correction.get() : nullptr, kinds[3], k, &formula, pick(0, 9) ? threads() : 0,
        logits.get(), weights.get(), index.get());
    expect(result == kOk || result == kBadShape, "route: wrong result");
    for (int64_t i = 0; result == kOk && i < index.size; ++i)
        expect(index.at[size_t(i)] >= 0 && index.at[size_t(i)] < experts, "route: no such expert");
}

// Attention with masks of all kinds. In a third of the calls the mask is that of all queries, and
// keys and values are only there from its first to its last visible position.
void attention() {
    const int32_t numbers = int32_t(pick(0, 2)), kind = int32_t(pick(0, 3));
    const int64_t width = numbers ? 2 : 4, mask_width = kind == 3 ? 1 : kind ? 2 : 4;
    const int64_t batches = pick(1, 2), heads = pick(1, 3), query_heads = heads * pick(1, 9);
    const int64_t tokens = pick(1, 3), positions = pick(0, 3) ? pick(0, 60) : pick(200, 600);
    const int64_t size = pick(0, 9) ? pick(1, 80) : one_of<int64_t>({128, 256, 511, 512});
    Buffer<uint8_t> q = random_bytes(batches * query_heads * tokens * size * width);
    Buffer<uint8_t> y(q.size);
    const int64_t full[4] = {batches, query_heads, tokens, positions};
    int64_t strides[4], all = 1;
    const bool shared = pick(0, 2) == 0 && positions > 0;
    for (int i = 3; i >= 0; --i) {
        const bool broadcast = shared ? i < 3 : pick(0, 1);
        strides[i] = broadcast ? 0 : all;
        all *= broadcast ? 1 : full[i];
    }
    Buffer<uint8_t> mask = random_bytes(all * mask_width);
    int64_t first = 0, end = positions;
    if (shared) {  // 0xFF80 hides as bfloat16, 0xFC00 as float16, 0xFF800000 as float
        first = pick(0, positions - 1);
        end = pick(first + 1, positions);
        const uint8_t hides[4][4] = {{0, 0, 0x80, 0xFF}, {0x80, 0xFF}, {0, 0xFC}, {0}};
        for (int64_t i = 0; i < positions; ++i) {
            uint8_t* at = mask.get() + i * mask_width;
            if (i < first || i >= end) std::memcpy(at, hides[kind], size_t(mask_width));
            if (i == first || i == end - 1) std::memset(at, 1, size_t(mask_width));
        }
    }
    const int64_t row = size * width, there = end - first;
    Buffer<uint8_t> k = random_bytes(batches * heads * there * row);
    Buffer<uint8_t> v = random_bytes(batches * heads * there * row);
    const int32_t result = moepress_attention(
        q.get(), query_heads * tokens * size, tokens * size, size, k.get() - first * row,
        heads * there * size, there * size, size, v.get() - first * row, heads * there * size,
        there * size, size, shared || pick(0, 3) ? mask.get() : nullptr, kind, strides[0],
        strides[1], strides[2], strides[3], batches, query_heads, heads, tokens, positions, size,
        0.1f, numbers, threads(), y.get());
    expect(result == kOk, "attention: wrong result");
}

}  // namespace

int main(int, char** arguments) {
    const int rounds = std::atoi(arguments[1]);
    std::istringstream names(moepress_instruction_sets());
    int done = 0;
    for (std::string name; names >> name; done = 0) {
        expect(moepress_use(name.c_str()) == 1, "an instruction set cannot be used");
        for (; done < rounds; ++done) {
            scalar_linear();
            scalar_embedding();
            scalar_experts();
            drop();
            rms_norm();
            add();
            rotary();
            cache_write();
            route();
            attention();
            trellis_linear();
            trellis_experts();
            if (done % 50 == 0) trellis_search();
        }
        std::printf("%s: %d rounds\n", name.c_str(), done);
    }
}
