// Finds races of emulated kernels: two threads touch the same byte, one of them writes, and nothing
// orders them. Whether they meet in this run does not matter: what orders them is followed by clocks
// (FastTrack, Flanagan and Freund 2009), for each byte, in shared and in global memory.
//
// The kernel is compiled with -fsanitize=thread, and this file takes the place of that sanitizer's
// library: it gets every load and store. What orders threads:
//   - a barrier: what came before it in all threads is known after it in those that waited;
//   - __syncwarp, likewise, for the lanes of its mask. Shuffles, votes, ldmatrix and mma order nothing;
//   - __threadfence, then an atomic operation; seen by an atomic operation, then __threadfence;
//   - cp.async: nobody may touch its target until the thread that copies has waited, and it writes then;
//   - products of a warpgroup read through another proxy: what they read must be followed by
//     fence.proxy.async before, and stay as it is until they are waited for;
//   - begin(): before it, nothing may be written to global memory.
// Not followed: atomic operations on shared memory as a way to order threads.
#include <algorithm>
#include <map>
#include <memory>
#include <unordered_map>

#include <dlfcn.h>

#include "emulator.h"  // last: its macros are CUDA's names

namespace emulator {
namespace races {
namespace {

enum class Kind : uint8_t { read, write, atomic, copy, product };
constexpr const char* kKinds[] = {"a read", "a write", "an atomic operation",
                                  "a copy under way", "a product under way"};

// Some bytes of a word of memory, touched by lanes of a warp at the same clock.
struct Access {
    uint32_t block, clock, lanes;
    uint8_t warp, bytes;
    Kind kind;
    const void* place;  // in the program
};

// What a thread knows: of thread i of a block, everything up to clock[i].
using Clocks = std::vector<uint32_t>;
using Blocks = std::map<uint32_t, Clocks>;

void join(Clocks& to, const Clocks& more) {
    if (to.size() < more.size()) to.resize(more.size());
    for (size_t i = 0; i < more.size(); ++i) to[i] = std::max(to[i], more[i]);
}

struct Knowledge {
    Clocks own;                            // of this block
    std::shared_ptr<const Blocks> others;  // mostly null, or shared by all threads of a block
    void join_others(const std::shared_ptr<const Blocks>& more) {
        if (!more || more == others) return;
        if (!others) {
            others = more;
            return;
        }
        auto all = std::make_shared<Blocks>(*others);
        for (const auto& [number, clocks] : *more) join((*all)[number], clocks);
        others = all;
    }
    void join_all(const Knowledge& more) {
        join(own, more.own);
        join_others(more.others);
    }
};

// Of a thread, or of all that came to a barrier.
struct View {
    Knowledge known, proxied;  // proxied: what products of a warpgroup may read
    void join(const View& more) {
        known.join_all(more.known);
        proxied.join_all(more.proxied);
    }
};

struct Pending {
    const void* from;
    size_t bytes;
};
struct Thread : View {
    Knowledge released;  // what the thread knew at its last fence
    Knowledge seen;      // of atomic operations, known from the next fence on
    bool begun = false;
    std::vector<std::vector<Pending>> products;  // groups, the last one open
};

struct Region {
    const uint8_t *start, *end;
    bool shared;
    std::vector<std::vector<Access>> words;
    Region(const uint8_t* at, size_t bytes, bool of_block)
        : start(reinterpret_cast<const uint8_t*>(reinterpret_cast<uintptr_t>(at) & ~uintptr_t(3))),
          end(at + bytes), shared(of_block), words((size_t(end - start) + 3) / 4) {}
};

std::vector<Thread> threads;
View barriers[16];
std::vector<std::unique_ptr<Region>> regions;  // the first two: shared memory
Region* last_region = nullptr;
std::unordered_map<const void*, std::shared_ptr<const Blocks>> atomics;  // what was released there
uint32_t block = 0;

uint32_t block_number() {
    return state.block.x + state.grid.x * (state.block.y + state.grid.y * state.block.z);
}

Region* region_of(const uint8_t* p) {
    if (last_region && p >= last_region->start && p < last_region->end) return last_region;
    for (const auto& region : regions)
        if (p >= region->start && p < region->end) return last_region = region.get();
    return nullptr;
}

bool knows(const Knowledge& known, const Access& access, uint32_t lane) {
    const size_t thread = access.warp * size_t(kLanes) + lane;
    const Clocks* clocks = &known.own;
    if (access.block != block) {
        if (!known.others) return false;
        const auto found = known.others->find(access.block);
        if (found == known.others->end()) return false;
        clocks = &found->second;
    }
    return thread < clocks->size() && (*clocks)[thread] >= access.clock;
}

// Where in the library, for addr2line.
std::string place_of(const void* place) {
    Dl_info info;
    if (!place || !dladdr(place, &info)) return "?";
    char text[32];
    std::snprintf(text, sizeof(text), "<%zx>",
                  size_t(static_cast<const uint8_t*>(place) -
                         static_cast<const uint8_t*>(info.dli_fbase)) - 1);
    return text;
}

[[noreturn]] void report(const Region& region, size_t word, const Access& before, uint32_t lane,
                         Kind kind, const void* place) {
    std::string who = "thread " + std::to_string(before.warp * kLanes + int(lane));
    if (before.block != block) who += " of block number " + std::to_string(before.block);
    fail("a race in " + std::string(region.shared ? "shared" : "global") + " memory, at byte " +
         std::to_string(4 * word) + " of " + std::to_string(region.end - region.start) + ": " +
         kKinds[int(before.kind)] + " of " + who + " at " + place_of(before.place) + " and " +
         kKinds[int(kind)] + " at " + place_of(place) + " are not ordered");
}

bool conflict(Kind before, Kind now) {
    const auto only_reads = [](Kind kind) { return kind == Kind::read || kind == Kind::product; };
    return !(only_reads(before) && only_reads(now)) &&
           !(before == Kind::atomic && now == Kind::atomic);
}
// Not even the thread itself may go on with these.
bool under_way(Kind kind) { return kind == Kind::copy || kind == Kind::product; }

void touch_word(Region& region, size_t word, int index, uint8_t bytes, Kind kind, const void* place) {
    Thread& thread = threads[size_t(index)];
    const uint8_t warp = uint8_t(index / kLanes);
    const uint32_t bit = 1u << index % kLanes, clock = thread.known.own[size_t(index)];
    auto& accesses = region.words[word];
    if (region.shared && !accesses.empty() && accesses.front().block != block) accesses.clear();
    size_t kept = 0;
    bool added = false;
    for (size_t i = 0; i < accesses.size(); ++i) {
        Access& before = accesses[i];
        if (before.bytes & bytes && conflict(before.kind, kind))
            for (uint32_t rest = before.lanes; rest; rest &= rest - 1) {
                const uint32_t lane = uint32_t(__builtin_ctz(rest));
                const bool own = before.block == block && before.warp == warp && 1u << lane == bit;
                const bool unfinished = under_way(before.kind);
                // A product reads through another proxy, also what its own thread wrote.
                const bool known = kind == Kind::product ? knows(thread.proxied, before, lane)
                                                         : own || knows(thread.known, before, lane);
                if (unfinished || !known) report(region, word, before, lane, kind, place);
            }
        // Later accesses of the same thread, and writes, stand for what came before them.
        if (!under_way(before.kind) && !(before.bytes & ~bytes)) {
            const bool reads = kind == Kind::read || kind == Kind::product;
            if (!reads && (kind != Kind::atomic || before.kind != Kind::atomic)) continue;
            if (before.kind == Kind::read && kind == Kind::read && before.block == block &&
                before.warp == warp && before.lanes & bit) {
                if (before.clock == clock && before.bytes == bytes)
                    added = true;
                else if (!(before.lanes &= ~bit))
                    continue;
            }
        }
        if (!added && before.block == block && before.warp == warp && before.clock == clock &&
            before.kind == kind && before.bytes == bytes) {
            before.lanes |= bit;
            added = true;
        }
        if (kept != i) accesses[kept] = before;
        ++kept;
    }
    accesses.resize(kept);
    if (!added) accesses.push_back({block, clock, bit, warp, bytes, kind, place});
}

void touch(int index, const void* p, size_t n, Kind kind, const void* place) {
    const auto* at = static_cast<const uint8_t*>(p);
    Region* const region = region_of(at);
    if (!region) return;
    if (!region->shared && kind != Kind::read && !threads[size_t(index)].begun)
        fail("a write to global memory before begin(), at " + place_of(place));
    while (n) {
        const size_t offset = size_t(at - region->start), first = offset % 4;
        const size_t here = std::min(n, 4 - first);
        if (offset / 4 >= region->words.size()) return;
        touch_word(*region, offset / 4, index, uint8_t(((1u << here) - 1) << first), kind, place);
        at += here;
        n -= here;
    }
}

// Ends what is under way in these bytes.
void finish(int index, const void* p, size_t n, Kind kind) {
    const auto* const at = static_cast<const uint8_t*>(p);
    Region* const region = region_of(at);
    if (!region) return;
    const size_t offset = size_t(at - region->start);
    for (size_t word = offset / 4; word < (offset + n + 3) / 4; ++word) {
        auto& accesses = region->words[word];
        const auto mine = [&](const Access& access) {
            return access.kind == kind && access.block == block && access.warp == index / kLanes &&
                   access.lanes & 1u << index % kLanes;
        };
        for (size_t i = 0; i < accesses.size();) {
            if (mine(accesses[i])) accesses[i].lanes &= ~(1u << index % kLanes);
            if (!accesses[i].lanes)
                accesses.erase(accesses.begin() + long(i));
            else
                ++i;
        }
    }
}

int running() { return state.lane->index; }
void loaded(const void* p, size_t n, const void* place) {
    if (state.lane && state.lane != &state.main) touch(running(), p, n, Kind::read, place);
}
void stored(const void* p, size_t n, const void* place) {
    if (state.lane && state.lane != &state.main) touch(running(), p, n, Kind::write, place);
}
void tick(int index) { ++threads[size_t(index)].known.own[size_t(index)]; }

}  // namespace

void watch(const void* p, size_t bytes) {
    if (regions.size() < 2) regions.resize(2);
    regions.push_back(std::make_unique<Region>(static_cast<const uint8_t*>(p), bytes, false));
}

void start_grid() {
    if (regions.size() < 2) regions.resize(2);
    regions[0] = std::make_unique<Region>(state.shared, state.shared_bytes, true);
    const size_t fixed =
        __start_emulated_shared ? size_t(__stop_emulated_shared - __start_emulated_shared) : 0;
    regions[1] = std::make_unique<Region>(__start_emulated_shared, fixed, true);
    last_region = nullptr;
    atomics.clear();
}

void start_block() {
    block = block_number();
    threads.assign(size_t(state.threads), {});
    for (int i = 0; i < state.threads; ++i) {
        auto& known = threads[size_t(i)].known.own;
        known.assign(size_t(state.threads), 0);
        known[size_t(i)] = 1;
    }
    for (int id = 0; id < 16; ++id) completed(id);
}

void end_grid() {
    regions.clear();
    last_region = nullptr;
}

void arrive(int id) {
    barriers[id].join(threads[size_t(running())]);
    tick(running());
}
void leave(int id, int index) { threads[size_t(index)].join(barriers[id]); }
void completed(int id) { barriers[id] = {}; }

void sync_warp(int first, uint32_t mask) {
    View all;
    for (int i = 0; i < kLanes; ++i)
        if (mask >> i & 1) all.join(threads[size_t(first + i)]);
    for (int i = 0; i < kLanes; ++i)
        if (mask >> i & 1) {
            static_cast<View&>(threads[size_t(first + i)]) = all;
            tick(first + i);
        }
}

void fence() {
    Thread& thread = threads[size_t(running())];
    thread.known.join_all(thread.seen);
    thread.released = thread.known;
    tick(running());
}

void atomic(const void* p, size_t bytes) {
    const int index = running();
    touch(index, p, bytes, Kind::atomic, __builtin_return_address(0));
    Thread& thread = threads[size_t(index)];
    auto& released = atomics[p];
    if (released) {
        thread.seen.join_others(released);
        if (const auto own = released->find(block); own != released->end())
            join(thread.seen.own, own->second);
    }
    // The next one who comes finds this block by its number.
    auto mine = std::make_shared<Blocks>();
    join((*mine)[block], thread.released.own);
    Knowledge all;
    all.join_others(released);
    all.join_others(thread.released.others);
    all.join_others(mine);
    released = all.others;
}

void begin() { threads[size_t(running())].begun = true; }

void read_by(int index, const void* p, size_t n) {
    touch(index, p, n, Kind::read, __builtin_return_address(0));
}

void copy_started(const void* to, const void* from, size_t n) {
    const void* const place = __builtin_return_address(0);
    touch(running(), from, n, Kind::read, place);
    touch(running(), to, n, Kind::copy, place);
}
void copy_ended(const void* to, const void* from, size_t n) {
    const void* const place = __builtin_return_address(0);
    finish(running(), to, n, Kind::copy);
    touch(running(), from, n, Kind::read, place);
    touch(running(), to, n, Kind::write, place);
}

void product_reads(const void* p, size_t n) {
    auto& groups = threads[size_t(running())].products;
    if (groups.empty()) groups.emplace_back();
    groups.back().push_back({p, n});
    touch(running(), p, n, Kind::product, __builtin_return_address(0));
}
void products_committed() {
    auto& groups = threads[size_t(running())].products;
    if (groups.empty()) groups.emplace_back();
    groups.emplace_back();
}
void products_waited(size_t pending) {
    auto& groups = threads[size_t(running())].products;  // the last group is open, and not waited for
    size_t finished = 0;
    for (; groups.size() - finished > pending + 1; ++finished)
        for (const Pending& product : groups[finished]) {
            finish(running(), product.from, product.bytes, Kind::product);
            touch(running(), product.from, product.bytes, Kind::read, __builtin_return_address(0));
        }
    groups.erase(groups.begin(), groups.begin() + long(finished));
}
void proxy_fence() {
    Thread& thread = threads[size_t(running())];
    thread.proxied.join_all(thread.known);
    tick(running());
}

}  // namespace races
}  // namespace emulator

extern "C" __attribute__((visibility("default"))) void emulated_watch(const void* p, int64_t bytes) {
    emulator::races::watch(p, size_t(bytes));
}

// What the compiler calls

#define EMULATED_ACCESSES(bytes)                                                                \
    extern "C" void __tsan_read##bytes(void* p) {                                               \
        emulator::races::loaded(p, bytes, __builtin_return_address(0));                         \
    }                                                                                           \
    extern "C" void __tsan_write##bytes(void* p) {                                              \
        emulator::races::stored(p, bytes, __builtin_return_address(0));                         \
    }                                                                                           \
    extern "C" void __tsan_unaligned_read##bytes(void* p) {                                     \
        emulator::races::loaded(p, bytes, __builtin_return_address(0));                         \
    }                                                                                           \
    extern "C" void __tsan_unaligned_write##bytes(void* p) {                                    \
        emulator::races::stored(p, bytes, __builtin_return_address(0));                         \
    }

EMULATED_ACCESSES(1)
EMULATED_ACCESSES(2)
EMULATED_ACCESSES(4)
EMULATED_ACCESSES(8)
EMULATED_ACCESSES(16)
extern "C" void __tsan_read_range(void* p, size_t n) {
    emulator::races::loaded(p, n, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* p, size_t n) {
    emulator::races::stored(p, n, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
