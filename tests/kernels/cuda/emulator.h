// The emulated side of src/moepress/kernels/cuda/device.h: runs the grid of a kernel on the CPU.
//
// Every thread of a block is a fiber, which runs until it waits for others: at a barrier, a shuffle,
// a ballot or a matrix product. Blocks run one after another in a scrambled order. It finds what
// is wrong on a card but could pass unseen:
//   - shared memory is filled with a pattern (NaN as float32) before each block;
//   - dynamic shared memory and global tensors (emulate.py) end at a page without access;
//   - the lanes of a warp run in changing order, each up to the next collective;
//   - the target of cp.async is filled with the pattern, and written at the matching wait;
//   - threads that never meet at a barrier or a collective are an error, as is one that lacks a lane.
// With EMULATED_RACES it also finds accesses that nothing orders (races.cpp).
#pragma once

#include <csetjmp>
#include <csignal>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#include "races.h"
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define DEVICE inline
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __constant__ static const
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("emulated_shared")))
#ifndef EMULATOR_LIST_KERNELS  // the list of kernels is read from preprocessed text (emulate.py)
#define __global__
#endif

struct dim3 {
    uint32_t x, y, z;
};

#define EMULATED_VECTOR2(name, type, bytes)   \
    struct alignas(bytes) name {              \
        type x, y;                            \
    };                                        \
    inline name make_##name(type x, type y) { return {x, y}; }
#define EMULATED_VECTOR4(name, type, bytes)   \
    struct alignas(bytes) name {              \
        type x, y, z, w;                      \
    };                                        \
    inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATED_VECTOR2(int2, int, 8)
EMULATED_VECTOR4(int4, int, 16)
EMULATED_VECTOR2(uint2, uint32_t, 8)
EMULATED_VECTOR4(uint4, uint32_t, 16)
EMULATED_VECTOR2(float2, float, 8)
EMULATED_VECTOR4(float4, float, 16)

namespace emulator {

constexpr int kMaxThreads = 1024;
constexpr int kLanes = 32;
constexpr size_t kStack = 128 << 10;
constexpr uint32_t kPoison = 0xFFC5A53B;  // NaN as float32

// The emulator's own accesses to a kernel's memory are none of the kernel's.
#define EMULATOR_UNSEEN __attribute__((no_sanitize("thread")))

EMULATOR_UNSEEN inline void poison(void* p, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i)
        static_cast<uint8_t*>(p)[i] = uint8_t(kPoison >> 8 * (i & 3));
}

struct Copy {
    void* to;
    const void* from;
    int bytes;
};

struct Lane {
    void* stack_pointer;
#if !defined(__x86_64__)
    ucontext_t context;
#endif
    dim3 thread;
    int index;  // in the block
    bool done;
    int barrier;              // the barrier it waits at, or -1
    const void* collective;   // the warp operation that it waits in, or null
    uint32_t mask;            // the lanes of that operation
    const void* in;
    void* out;
    std::vector<std::vector<Copy>> copies;  // groups of cp.async, the last one open
};

struct Warp {
    uint32_t ready;    // lanes that can run
    uint32_t arrived;  // lanes that wait in a warp operation
    uint32_t order;    // a generator of the order in which lanes run
};

struct State {
    Lane lanes[kMaxThreads];
    Warp warps[kMaxThreads / kLanes];
    uint8_t* stacks = nullptr;
    int threads = 0, warp_count = 0, warp = 0, done = 0;
    int waiting[16] = {};  // at each barrier
    int needed[16] = {};
    Lane* lane = nullptr;  // the one that runs
    Lane main;
    dim3 block, grid, dims;
    uint8_t* shared = nullptr;
    size_t shared_bytes = 0;
    const uint8_t* around_shared = nullptr;  // with the memory without access on both sides
    size_t around_bytes = 0;
    void (*entry)(const uint64_t*) = nullptr;
    const uint64_t* args = nullptr;
    std::string error;
    sigjmp_buf escape;
};

inline State state;

#if defined(__x86_64__)
extern "C" __attribute__((visibility("hidden"))) void emulator_switch(void** from, void* to);
asm(R"(
.text
.weak emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, .-emulator_switch
.section .note.GNU-stack,"",@progbits
.text
)");
#endif

inline void switch_to(Lane* next) {
    Lane* from = state.lane;
    if (next == from) return;
    state.lane = next;
#if defined(__x86_64__)
    emulator_switch(&from->stack_pointer, next->stack_pointer);
#else
    swapcontext(&from->context, &next->context);
#endif
}

[[noreturn]] inline void fail(const std::string& what) {
    if (state.error.empty()) {
        const Lane& lane = *state.lane;
        state.error = what + ", in thread " + std::to_string(lane.index) + " of block (" +
                      std::to_string(state.block.x) + ", " + std::to_string(state.block.y) + ", " +
                      std::to_string(state.block.z) + ")";
    }
    siglongjmp(state.escape, 1);
}

// Run another lane; return when this one is ready again.
inline void pause() {
    for (int i = 0; i < state.warp_count; ++i) {
        Warp& warp = state.warps[state.warp];
        if (warp.ready) {
            const int lane = warp.order & 1 ? 31 - __builtin_clz(warp.ready)
                                            : __builtin_ctz(warp.ready);
            warp.ready &= ~(1u << lane);
            switch_to(&state.lanes[state.warp * kLanes + lane]);
            return;
        }
        state.warp = state.warp + 1 == state.warp_count ? 0 : state.warp + 1;
    }
    switch_to(&state.main);  // all done, or none can go on
}

inline void make_ready(int index) { state.warps[index / kLanes].ready |= 1u << index % kLanes; }

// Let the threads go on that wait at a barrier.
inline void release(int id) {
    state.waiting[id] = 0;
    for (int i = 0; i < state.threads; ++i)
        if (state.lanes[i].barrier == id) {
            state.lanes[i].barrier = -1;
            races::leave(id, i);
            make_ready(i);
        }
    races::completed(id);
    for (int w = 0; w < state.warp_count; ++w)
        state.warps[w].order = state.warps[w].order * 1664525u + 1013904223u >> 1;
}

inline void barrier(int id, int threads) {
    Lane& lane = *state.lane;
    if (threads % kLanes) fail("a barrier of a part of a warp");
    if (state.waiting[id] && state.needed[id] != threads) fail("a barrier of two sizes");
    state.needed[id] = threads;
    races::arrive(id);
    lane.barrier = id;
    if (++state.waiting[id] < threads) {
        pause();
        return;
    }
    lane.barrier = -1;
    races::leave(id, lane.index);
    release(id);
}

inline void arrive(int id, int threads) {
    if (threads % kLanes) fail("a barrier of a part of a warp");
    if (state.waiting[id] && state.needed[id] != threads) fail("a barrier of two sizes");
    state.needed[id] = threads;
    races::arrive(id);
    if (++state.waiting[id] == threads) release(id);
}

// An operation of the lanes of a warp in `mask`: op(lanes, mask), run by the last to arrive, reads
// each lane's `in` and writes its `out`.
template <class Op, class In, class Out>
void collective(uint32_t mask, const In& in, Out& out) {
    Lane& lane = *state.lane;
    const int first = lane.index / kLanes * kLanes;
    Warp& warp = state.warps[first / kLanes];
    if (!(mask >> (lane.index - first) & 1)) fail("a warp operation whose mask lacks this lane");
    static const char tag = 0;
    lane.collective = &tag;
    lane.mask = mask;
    lane.in = &in;
    lane.out = &out;
    warp.arrived |= 1u << (lane.index - first);
    if ((warp.arrived & mask) != mask) {
        pause();
        return;
    }
    Lane* const lanes = &state.lanes[first];
    for (int i = 0; i < kLanes; ++i)
        if (mask >> i & 1 && (lanes[i].collective != &tag || lanes[i].mask != mask))
            fail("the lanes of a warp meet in different operations");
    Op::run(lanes, mask);
    for (int i = 0; i < kLanes; ++i)
        if (mask >> i & 1) lanes[i].collective = nullptr;
    warp.arrived &= ~mask;
    warp.ready |= mask & ~(1u << (lane.index - first));
    warp.order = warp.order * 1664525u + 1013904223u >> 1;
}

template <class T>
const T& given(const Lane& lane) {
    return *static_cast<const T*>(lane.in);
}
template <class T>
T& wanted(Lane& lane) {
    return *static_cast<T*>(lane.out);
}

template <class T>
struct Shuffle {
    struct In {
        T value;
        int source;
    };
    static void run(Lane* lanes, uint32_t mask) {
        for (int i = 0; i < kLanes; ++i) {
            if (!(mask >> i & 1)) continue;
            const int source = given<In>(lanes[i]).source;
            if (mask >> source & 1)
                wanted<T>(lanes[i]) = given<In>(lanes[source]).value;
            else
                poison(&wanted<T>(lanes[i]), sizeof(T));
        }
    }
};

template <class T>
T shuffle(uint32_t mask, T value, int source) {
    T out;
    collective<Shuffle<T>>(mask, typename Shuffle<T>::In{value, source}, out);
    return out;
}

struct Ballot {
    static void run(Lane* lanes, uint32_t mask) {
        uint32_t bits = 0;
        for (int i = 0; i < kLanes; ++i)
            if (mask >> i & 1) bits |= uint32_t(given<int>(lanes[i]) != 0) << i;
        for (int i = 0; i < kLanes; ++i)
            if (mask >> i & 1) wanted<uint32_t>(lanes[i]) = bits;
    }
};

template <class T, bool largest>
struct Reduce {
    static void run(Lane* lanes, uint32_t mask) {
        T total = 0;
        bool first = true;
        for (int i = 0; i < kLanes; ++i) {
            if (!(mask >> i & 1)) continue;
            const T value = given<T>(lanes[i]);
            if (largest)
                total = first || value > total ? value : total;
            else
                total = T(uint32_t(total) + uint32_t(value));
            first = false;
        }
        for (int i = 0; i < kLanes; ++i)
            if (mask >> i & 1) wanted<T>(lanes[i]) = total;
    }
};

template <class T>
struct Match {
    static void run(Lane* lanes, uint32_t mask) {
        for (int i = 0; i < kLanes; ++i) {
            if (!(mask >> i & 1)) continue;
            uint32_t same = 0;
            for (int j = 0; j < kLanes; ++j)
                if (mask >> j & 1) same |= uint32_t(given<T>(lanes[i]) == given<T>(lanes[j])) << j;
            wanted<uint32_t>(lanes[i]) = same;
        }
    }
};

struct Synchronise {
    static void run(Lane* lanes, uint32_t mask) { races::sync_warp(lanes->index, mask); }
};

struct LoadMatrix {
    EMULATOR_UNSEEN static void run(Lane* lanes, uint32_t) {
        for (int m = 0; m < 4; ++m)
            for (int i = 0; i < kLanes; ++i) {
                const Lane& gives = lanes[m * 8 + i / 4];
                const auto* row = static_cast<const uint32_t*>(given<const void*>(gives));
                if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix of a misaligned row");
                if (i % 4 == 0) races::read_by(gives.index, row, 16);
                wanted<uint32_t[4]>(lanes[i])[m] = row[i % 4];
            }
    }
};

inline float half_value(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, rest = h & 1023;
    float f;
    if (exponent == 31) {
        const uint32_t bits = sign | 0x7F800000 | rest << 13;
        std::memcpy(&f, &bits, 4);
        return f;
    }
    f = exponent ? std::ldexp(float(1024 + rest), int(exponent) - 25) : std::ldexp(float(rest), -24);
    return sign ? -f : f;
}
inline float bfloat_value(uint16_t b) {
    const uint32_t bits = uint32_t(b) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

struct Fragments {
    uint32_t a[4], b[2];
};
struct Mma8In : Fragments {
    int c[4];
};
struct Mma8 {
    static void run(Lane* lanes, uint32_t) {
        int a[16][32], b[8][32];
        for (int i = 0; i < kLanes; ++i) {
            const auto& in = given<Mma8In>(lanes[i]);
            const int g = i / 4, t = i % 4;
            for (int r = 0; r < 4; ++r)
                for (int j = 0; j < 4; ++j)
                    a[g + 8 * (r % 2)][16 * (r / 2) + 4 * t + j] = uint8_t(in.a[r] >> 8 * j);
            for (int r = 0; r < 2; ++r)
                for (int j = 0; j < 4; ++j) b[g][16 * r + 4 * t + j] = int8_t(in.b[r] >> 8 * j);
        }
        for (int i = 0; i < kLanes; ++i)
            for (int r = 0; r < 4; ++r) {
                const int row = i / 4 + 8 * (r / 2), column = 2 * (i % 4) + r % 2;
                int sum = 0;
                for (int k = 0; k < 32; ++k) sum += a[row][k] * b[column][k];
                wanted<int[4]>(lanes[i])[r] =
                    int(uint32_t(given<Mma8In>(lanes[i]).c[r]) + uint32_t(sum));
            }
    }
};

struct Mma16In : Fragments {
    float c[4];
};
template <float (*value)(uint16_t)>
struct Mma16 {
    static void run(Lane* lanes, uint32_t) {
        float a[16][16], b[8][16];
        for (int i = 0; i < kLanes; ++i) {
            const auto& in = given<Mma16In>(lanes[i]);
            const int g = i / 4, t = i % 4;
            for (int r = 0; r < 4; ++r)
                for (int j = 0; j < 2; ++j)
                    a[g + 8 * (r % 2)][8 * (r / 2) + 2 * t + j] = value(uint16_t(in.a[r] >> 16 * j));
            for (int r = 0; r < 2; ++r)
                for (int j = 0; j < 2; ++j)
                    b[g][8 * r + 2 * t + j] = value(uint16_t(in.b[r] >> 16 * j));
        }
        for (int i = 0; i < kLanes; ++i)
            for (int r = 0; r < 4; ++r) {
                const int row = i / 4 + 8 * (r / 2), column = 2 * (i % 4) + r % 2;
                float sum = given<Mma16In>(lanes[i]).c[r];
                for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
                wanted<float[4]>(lanes[i])[r] = sum;
            }
    }
};

inline void copy_later(void* shared, const void* global, int bytes, bool given = true) {
    const auto to = reinterpret_cast<uintptr_t>(shared), from = reinterpret_cast<uintptr_t>(global);
    if (to % bytes || from % bytes) fail("cp.async of a misaligned address");
    if (static_cast<uint8_t*>(shared) < state.shared ||
        static_cast<uint8_t*>(shared) + bytes > state.shared + state.shared_bytes)
        fail("cp.async to outside of the dynamic shared memory");
    poison(shared, bytes);
    auto& copies = state.lane->copies;
    if (copies.empty()) copies.emplace_back();
    static const uint8_t zeros[16] = {};
    copies.back().push_back({shared, given ? global : zeros, bytes});
    races::copy_started(shared, copies.back().back().from, size_t(bytes));
}
inline void copy_commit() {
    auto& copies = state.lane->copies;
    if (copies.empty()) copies.emplace_back();
    copies.emplace_back();  // the new open group
}
inline void copy_wait(size_t pending) {
    auto& copies = state.lane->copies;  // the last group is open and not waited for
    size_t finished = 0;
    for (; copies.size() - finished > pending + 1; ++finished)
        for (const Copy& copy : copies[finished]) {
            races::copy_ended(copy.to, copy.from, size_t(copy.bytes));
            std::memcpy(copy.to, copy.from, size_t(copy.bytes));
        }
    copies.erase(copies.begin(), copies.begin() + long(finished));
}

inline void run_lane() {
    state.entry(state.args);
    Lane& lane = *state.lane;
    for (const auto& group : lane.copies)
        if (!group.empty()) fail("a cp.async that no wait ends");
    lane.done = true;
    ++state.done;
    pause();
    std::abort();  // a finished lane is never resumed
}

inline void start_lane(int index) {
    Lane& lane = state.lanes[index];
    lane.thread = {uint32_t(index), 0, 0};
    lane.index = index;
    lane.done = false;
    lane.barrier = -1;
    lane.collective = nullptr;
    lane.copies.clear();
    // Tops of stacks at different places of a page: they would share few sets of the cache.
    uint8_t* top = state.stacks + (size_t(index) + 1) * kStack - 64 - size_t(index) * 192 % 4096;
#if defined(__x86_64__)
    auto* stack = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(63));
    *--stack = nullptr;  // keeps the alignment that a call would leave
    *--stack = reinterpret_cast<void*>(&run_lane);
    stack -= 6;
    std::memset(stack, 0, 6 * sizeof(void*));
    lane.stack_pointer = stack;
#else
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = state.stacks + size_t(index) * kStack;
    lane.context.uc_stack.ss_size = size_t(top - (state.stacks + size_t(index) * kStack));
    lane.context.uc_link = nullptr;
    makecontext(&lane.context, run_lane, 0);
#endif
}

inline std::string stuck() {
    int barriers = 0, collectives = 0;
    for (int i = 0; i < state.threads; ++i) {
        barriers += state.lanes[i].barrier >= 0;
        collectives += state.lanes[i].collective != nullptr;
    }
    return "deadlock in block (" + std::to_string(state.block.x) + ", " +
           std::to_string(state.block.y) + ", " + std::to_string(state.block.z) + "): " +
           std::to_string(state.done) + " threads finished, " + std::to_string(barriers) +
           " wait at a barrier, " + std::to_string(collectives) + " in a warp operation";
}

extern "C" uint8_t __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern "C" uint8_t __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));

inline void run_block() {
    state.lane = &state.main;
    races::start_block();
    poison(state.shared, state.shared_bytes);
    if (__start_emulated_shared)
        poison(__start_emulated_shared, size_t(__stop_emulated_shared - __start_emulated_shared));
    state.done = 0;
    state.warp = 0;
    std::memset(state.waiting, 0, sizeof(state.waiting));
    for (int i = 0; i < state.threads; ++i) start_lane(i);
    for (int w = 0; w < state.warp_count; ++w)
        state.warps[w] = {~0u, 0, uint32_t(w) * 2654435761u + state.block.x * 40503u >> 3};
    pause();
    if (state.done < state.threads) {
        state.error = stuck();
        siglongjmp(state.escape, 1);
    }
}

inline void on_fault(int, siginfo_t* info, void*) {
    const auto* const at = static_cast<const uint8_t*>(info->si_addr);
    const bool near = at >= state.around_shared && at < state.around_shared + state.around_bytes;
    fail(near ? "access outside of the dynamic shared memory" : "access outside of a tensor");
}

// Memory whose end (a multiple of 128 bytes from its start) is followed by memory without access, as
// is its beginning: so much that an address a little outside belongs to nothing else.
struct Guarded {
    static constexpr size_t kGuard = 1 << 20;
    uint8_t* pages;
    uint8_t* start;
    size_t length;
    explicit Guarded(size_t bytes) {
        const size_t page = size_t(sysconf(_SC_PAGESIZE)), rounded = (bytes + 127) / 128 * 128;
        length = (rounded + page - 1) / page * page + 2 * kGuard;
        pages = static_cast<uint8_t*>(mmap(nullptr, length, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        mprotect(pages, kGuard, PROT_NONE);
        mprotect(pages + length - kGuard, kGuard, PROT_NONE);
        start = pages + length - kGuard - rounded;
    }
    ~Guarded() { munmap(pages, length); }
};

inline bool coprime(uint64_t a, uint64_t b) {
    while (b) {
        const uint64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a == 1;
}

inline bool run_grid(dim3 grid, int threads, size_t shared_bytes) {
    Guarded shared(shared_bytes);
    if (!state.stacks)
        state.stacks = static_cast<uint8_t*>(
            mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    state.grid = grid;
    state.dims = {uint32_t(threads), 1, 1};
    state.threads = threads;
    state.warp_count = threads / kLanes;
    state.shared = shared.start;
    state.around_shared = shared.pages;
    state.around_bytes = shared.length;
    state.shared_bytes = shared_bytes;
    state.error.clear();
    struct sigaction action = {}, before_segv, before_bus;
    static uint8_t fault_stack[64 << 10];
    stack_t stack = {}, before_stack;
    stack.ss_sp = fault_stack;
    stack.ss_size = sizeof(fault_stack);
    sigaltstack(&stack, &before_stack);
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &before_segv);
    sigaction(SIGBUS, &action, &before_bus);
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    uint64_t step = blocks * 5 / 8 + 1;
    while (!coprime(step, blocks)) ++step;
    races::start_grid();
    if (sigsetjmp(state.escape, 1) == 0)
        for (uint64_t i = 0; i < blocks; ++i) {
            const uint64_t b = (i * step + blocks / 3) % blocks;
            state.block = {uint32_t(b % grid.x), uint32_t(b / grid.x % grid.y),
                           uint32_t(b / grid.x / grid.y)};
            run_block();
        }
    state.lane = nullptr;
    sigaction(SIGSEGV, &before_segv, nullptr);
    sigaction(SIGBUS, &before_bus, nullptr);
    sigaltstack(&before_stack, nullptr);
    races::end_grid();
    return state.error.empty();
}

template <class T>
T argument(uint64_t bits) {
    static_assert(std::is_pointer_v<T> || std::is_same_v<T, int64_t> || std::is_same_v<T, float>,
                  "parameters of kernels are pointers, int64_t or float");
    T value;
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}
template <class... P, size_t... i>
void call(void (*kernel)(P...), const uint64_t* args, std::index_sequence<i...>) {
    kernel(argument<P>(args[i])...);
}
template <class... P>
void call(void (*kernel)(P...), const uint64_t* args) {
    call(kernel, args, std::index_sequence_for<P...>());
}
template <class... P>
constexpr int count(void (*)(P...)) {
    return int(sizeof...(P));
}

inline int launch(void (*entry)(const uint64_t*), int parameters, const uint32_t* grid, int threads,
                  int64_t shared, const uint64_t* args, int given, char* error, int size) {
    state.entry = entry;
    state.args = args;
    bool ok = false;
    if (parameters != given)
        state.error = "the kernel has " + std::to_string(parameters) + " parameters, got " +
                      std::to_string(given);
    else if (threads < kLanes || threads > kMaxThreads || threads % kLanes)
        state.error = "a block of " + std::to_string(threads) + " threads";
    else
        ok = run_grid({grid[0], grid[1], grid[2]}, threads, size_t(shared));
    if (ok) return 0;
    std::snprintf(error, size_t(size), "%s", state.error.c_str());
    return 1;
}

}  // namespace emulator

// Makes a kernel callable from emulate.py.
#define EMULATED_KERNEL(name)                                                                   \
    static void call_##name(const uint64_t* args) { emulator::call(name, args); }               \
    extern "C" __attribute__((visibility("default"))) int emulated_##name(                      \
        const uint32_t* grid, int threads, int64_t shared, const uint64_t* args, int given,     \
        char* error, int size) {                                                                \
        return emulator::launch(call_##name, emulator::count(name), grid, threads, shared, args, \
                                given, error, size);                                            \
    }

// CUDA's own names

#define threadIdx (emulator::state.lane->thread)
#define blockIdx (emulator::state.block)
#define blockDim (emulator::state.dims)
#define gridDim (emulator::state.grid)

inline void __syncthreads() { emulator::barrier(0, emulator::state.threads); }
inline void __syncwarp(uint32_t mask = ~0u) {
    int none = 0;
    emulator::collective<emulator::Synchronise>(mask, none, none);
}
inline void __threadfence() { emulator::races::fence(); }
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
    const int lane = emulator::state.lane->index % 32;
    return emulator::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32) {
    const int lane = emulator::state.lane->index % 32, source = lane ^ bits;
    const bool inside = (source & ~(width - 1)) <= (lane & ~(width - 1));
    return emulator::shuffle(mask, value, inside ? source : lane);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, uint32_t delta, int width = 32) {
    const int lane = emulator::state.lane->index % 32, source = lane - int(delta);
    return emulator::shuffle(mask, value, source >= (lane & ~(width - 1)) ? source : lane);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, uint32_t delta, int width = 32) {
    const int lane = emulator::state.lane->index % 32, source = lane + int(delta);
    return emulator::shuffle(mask, value, source <= (lane | (width - 1)) ? source : lane);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
    uint32_t out;
    emulator::collective<emulator::Ballot>(mask, predicate, out);
    return out;
}
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) {
    return __ballot_sync(mask, predicate) == mask;
}
template <class T>
T __reduce_add_sync(uint32_t mask, T value) {
    T out;
    emulator::collective<emulator::Reduce<T, false>>(mask, value, out);
    return out;
}
template <class T>
T __reduce_max_sync(uint32_t mask, T value) {
    T out;
    emulator::collective<emulator::Reduce<T, true>>(mask, value, out);
    return out;
}
template <class T>
uint32_t __match_any_sync(uint32_t mask, T value) {
    uint32_t out;
    emulator::collective<emulator::Match<T>>(mask, value, out);
    return out;
}

EMULATOR_UNSEEN inline int atomicAdd(int* p, int value) {
    emulator::races::atomic(p, sizeof(*p));
    const int before = *p;
    *p = before + value;
    return before;
}
template <class T>
T __ldg(const T* p) {
    return *p;
}
template <class T>
T __ldcg(const T* p) {
    return *p;
}

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t nibble = selector >> 4 * i & 15;
        uint32_t byte = uint32_t(bytes >> 8 * (nibble & 7)) & 255;
        if (nibble & 8) byte = byte & 128 ? 255 : 0;
        out |= byte << 8 * i;
    }
    return out;
}
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
    return uint32_t(((uint64_t(high) << 32 | low) << (shift & 31)) >> 32);
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
    return uint32_t((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(uint32_t(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) c += int(int8_t(a >> 8 * i)) * int8_t(b >> 8 * i);
    return c;
}

template <class To, class From>
To emulated_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
inline uint32_t __float_as_uint(float f) { return emulated_bits<uint32_t>(f); }
inline int __float_as_int(float f) { return emulated_bits<int>(f); }
inline float __uint_as_float(uint32_t u) { return emulated_bits<float>(u); }
inline float __int_as_float(int i) { return emulated_bits<float>(i); }
inline int __float2int_rn(float f) { return int(std::lrintf(f)); }
inline float __int2float_rn(int i) { return float(i); }

using std::isfinite;
using std::isinf;
using std::isnan;
template <class T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}

// Pairs of 16-bit integers
template <class T, class F>
uint32_t emulated_pairs(uint32_t a, uint32_t b, F f) {
    uint32_t out = 0;
    for (int i = 0; i < 32; i += 16) out |= uint32_t(uint16_t(f(int(T(a >> i)), int(T(b >> i))))) << i;
    return out;
}
#define EMULATED_PAIRS(name, type, result)                                \
    inline uint32_t name(uint32_t a, uint32_t b) {                        \
        return emulated_pairs<type>(a, b, [](int x, int y) { return result; }); \
    }
EMULATED_PAIRS(__vadd2, uint16_t, x + y)
EMULATED_PAIRS(__vsub2, uint16_t, x - y)
EMULATED_PAIRS(__vaddus2, uint16_t, min(x + y, 65535))
EMULATED_PAIRS(__vsubus2, uint16_t, max(x - y, 0))
EMULATED_PAIRS(__vaddss2, int16_t, max(min(x + y, 32767), -32768))
EMULATED_PAIRS(__vsubss2, int16_t, max(min(x - y, 32767), -32768))
EMULATED_PAIRS(__vminu2, uint16_t, min(x, y))
EMULATED_PAIRS(__vmins2, int16_t, min(x, y))
EMULATED_PAIRS(__vmaxu2, uint16_t, max(x, y))
EMULATED_PAIRS(__vmaxs2, int16_t, max(x, y))
EMULATED_PAIRS(__vcmpeq2, uint16_t, x == y ? 65535 : 0)
EMULATED_PAIRS(__vcmpltu2, uint16_t, x < y ? 65535 : 0)
EMULATED_PAIRS(__vcmpgtu2, uint16_t, x > y ? 65535 : 0)
EMULATED_PAIRS(__vcmpleu2, uint16_t, x <= y ? 65535 : 0)
inline uint32_t __viaddmin_u16x2(uint32_t a, uint32_t b, uint32_t c) {
    return __vminu2(__vadd2(a, b), c);
}
inline uint32_t __viaddmin_s16x2(uint32_t a, uint32_t b, uint32_t c) {
    return __vmins2(__vadd2(a, b), c);
}
inline uint32_t __vimin3_u16x2(uint32_t a, uint32_t b, uint32_t c) {
    return __vminu2(__vminu2(a, b), c);
}
inline uint32_t __vimin3_s16x2(uint32_t a, uint32_t b, uint32_t c) {
    return __vmins2(__vmins2(a, b), c);
}
// The smaller of each pair; the predicates say whether it is a's (ties: a's).
inline uint32_t __vibmin_u16x2(uint32_t a, uint32_t b, bool* const high, bool* const low) {
    *low = (a & 0xFFFF) <= (b & 0xFFFF);
    *high = a >> 16 <= b >> 16;
    return __vminu2(a, b);
}

// The names of device.h

template <class T>
T* shared_memory() {
    return reinterpret_cast<T*>(emulator::state.shared);
}
inline int lane_id() { return emulator::state.lane->index & 31; }
inline void begin() { emulator::races::begin(); }
inline int warp_id() { return emulator::state.lane->index >> 5; }
// Called by code compiled with -fsanitize=alignment, before a load or store at an address that is no
// multiple of its type's alignment: an error on a card, which other processors do not mind.
extern "C" __attribute__((used)) inline void __ubsan_handle_type_mismatch_v1(void*, void*) {
    emulator::fail("a misaligned access");
}
[[noreturn]] inline void trap() { emulator::fail("trap"); }
[[noreturn]] inline void fail(const char* message) { emulator::fail(message); }
inline void barrier_sync(int id, int threads) { emulator::barrier(id, threads); }
inline void barrier_arrive(int id, int threads) { emulator::arrive(id, threads); }

template <class T>
T emulated_load(const void* p) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) emulator::fail("a misaligned load");
    T value;
    std::memcpy(&value, p, sizeof(T));
    return value;
}
inline uint32_t load_stream_4(const void* p) { return emulated_load<uint32_t>(p); }
inline uint2 load_stream_8(const void* p) { return emulated_load<uint2>(p); }
inline uint4 load_stream_16(const void* p) { return emulated_load<uint4>(p); }
inline uint4 load_16_or_zero(const void* p, bool given) {
    return given ? load_stream_16(p) : make_uint4(0, 0, 0, 0);
}
inline uint4 load_stream_16_or_zero(const void* p, bool given) {
    return given ? load_stream_16(p) : make_uint4(0, 0, 0, 0);
}

inline void cp_async_16(void* shared, const void* global) {
    emulator::copy_later(shared, global, 16);
}
inline void cp_async_4(void* shared, const void* global) { emulator::copy_later(shared, global, 4); }
inline uint32_t shared_address(const void* p) {
    return uint32_t(static_cast<const uint8_t*>(p) - emulator::state.shared);
}
inline uint32_t kept_shared_address(const void* p) { return shared_address(p); }
inline void cp_async_16(uint32_t shared, const void* global) {
    emulator::copy_later(emulator::state.shared + shared, global, 16);
}
inline void cp_async_16_or_zero(uint32_t shared, const void* global, bool given) {
    emulator::copy_later(emulator::state.shared + shared, global, 16, given);
}
inline void cp_async_4_or_zero(uint32_t shared, const void* global, bool given) {
    emulator::copy_later(emulator::state.shared + shared, global, 4, given);
}
inline void cp_async_commit() { emulator::copy_commit(); }
template <int pending>
void cp_async_wait() {
    emulator::copy_wait(pending);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    emulator::collective<emulator::LoadMatrix>(~0u, row, r);
}
template <class Op, class In, class C>
void emulated_mma(C (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    In in;
    std::memcpy(in.a, a, sizeof(a));
    std::memcpy(in.b, b, sizeof(b));
    std::memcpy(in.c, d, sizeof(d));
    emulator::collective<Op>(~0u, in, d);
}
inline void mma_u8s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulated_mma<emulator::Mma8, emulator::Mma8In>(d, a, b);
}
inline void mma_u8s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     const int (&c)[4]) {
    for (int i = 0; i < 4; ++i) d[i] = c[i];
    mma_u8s8(d, a, b);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulated_mma<emulator::Mma16<emulator::half_value>, emulator::Mma16In>(d, a, b);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulated_mma<emulator::Mma16<emulator::bfloat_value>, emulator::Mma16In>(d, a, b);
}
// Products of a warpgroup: done at once, each warp by itself.
#define MOEPRESS_WARPGROUP 1
inline uint64_t warpgroup_columns(const void* shared, int rows) {
    const uint64_t at = static_cast<const uint8_t*>(shared) - emulator::state.shared;
    if (at % 1024) emulator::fail("B of a warpgroup that is not aligned to 1024 bytes");
    return at + rows;
}
inline void warpgroup_begin() {}
inline void warpgroup_commit() { emulator::races::products_committed(); }
template <int pending>
void warpgroup_wait() {
    emulator::races::products_waited(pending);
}
inline void warpgroup_see_shared() { emulator::races::proxy_fence(); }
inline void warpgroup_u8s8(int (&d)[16][4], const uint32_t (&a)[4], uint64_t b, bool add) {
    const int lane = lane_id();
    for (int c = 0; c < 16; ++c) {
        uint32_t x[2];
        for (int half = 0; half < 2; ++half) {
            // The hardware permutes addresses: bits 4 to 6 by bits 7 to 9.
            uint64_t at = b + 1024 * c + 128 * (lane / 4) + 16 * half + 4 * (lane % 4);
            at ^= (at >> 7 & 7) << 4;
            emulator::races::product_reads(emulator::state.shared + at, 4);
            std::memcpy(&x[half], emulator::state.shared + at, 4);
        }
        if (!add) std::memset(d[c], 0, sizeof(d[c]));
        mma_u8s8(d[c], a, x);
    }
}

inline int dp4a_us(uint32_t a, uint32_t b, int c) {
    for (int i = 0; i < 4; ++i) c += int(uint8_t(a >> 8 * i)) * int8_t(b >> 8 * i);
    return c;
}

inline uint32_t multiplied(uint32_t x, uint32_t factor) { return x * factor; }

inline float half_to_float(uint16_t h) { return emulator::half_value(h); }
inline uint16_t float_to_half(float f) {
    const uint16_t sign = uint16_t(__float_as_uint(f) >> 16 & 0x8000);
    const float size = std::fabs(f);
    if (std::isnan(f)) return 0x7FFF;
    if (size >= 65520.0f) return sign | 0x7C00;
    int exponent;
    // size in [2^(exponent - 1), 2^exponent), or smaller than the least normal number
    std::frexp(std::fmax(size, 0x1p-14f), &exponent);
    // The step of float16 at this size; a carry into the next exponent comes out right by itself.
    const int steps = int(std::nearbyint(std::ldexp(size, 11 - exponent)));
    return uint16_t(sign | (((exponent + 13) << 10) + steps));
}
inline float bfloat_to_float(uint16_t b) { return emulator::bfloat_value(b); }
inline uint16_t float_to_bfloat(float f) {
    const uint32_t bits = __float_as_uint(f);
    if (std::isnan(f)) return 0x7FFF;
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline uint32_t floats_to_bfloats(float low, float high) {
    return float_to_bfloat(low) | uint32_t(float_to_bfloat(high)) << 16;
}
