// The expert store's part of the C interface (moepress.h).

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#include "checks.h"
#include "store.h"
#include "store_state.h"

using namespace moepress;

namespace {

// Address space for all experts, of which only some will get memory. False: the system refuses.
bool reserve(MoepressStore& store) {
    store.memory_bytes = page_ceil(store.region_bytes, kHugePage) + kHugePage;
    int flags = MAP_PRIVATE | MAP_ANON;
#if defined(MAP_NORESERVE)
    flags |= MAP_NORESERVE;
#endif
    void* const memory =
        mmap(nullptr, size_t(store.memory_bytes), PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) return false;
    store.memory = memory;
    const int64_t at = int64_t(reinterpret_cast<uintptr_t>(memory));
    store.region = static_cast<uint8_t*>(memory) + (page_ceil(at, kHugePage) - at);
#if defined(MADV_HUGEPAGE)
    // A huge page under small matrices would outlive them.
    madvise(memory, size_t(store.memory_bytes), MADV_NOHUGEPAGE);
    for (const Expert& expert : store.experts)
        for (const MoepressRange& range : expert.matrices) {
            const Pages pages = pages_of(range);
            if (pages.huge)
                madvise(store.region + pages.first, size_t(pages.bytes()), MADV_HUGEPAGE);
        }
#endif
    return true;
}

// A Hold for callers in other languages, of experts that must all fit.
struct Held {
    Hold hold;
    std::vector<ExpertPanels> chosen;
};

}  // namespace

int32_t moepress_store_open(const MoepressRange* matrices, const int64_t* first_of_layer,
                            int64_t layers, const double* uses, double half_life, int64_t budget,
                            int32_t threads, MoepressStore** out) {
    return guarded([&] {
        if (layers < 1 || threads < 1 || !(half_life > 0) || budget < 1) return kBadShape;
        auto store = std::make_unique<MoepressStore>();
        store->first_of_layer.assign(first_of_layer, first_of_layer + layers + 1);
        store->experts.resize(size_t(first_of_layer[layers]));
        store->seen.assign(size_t(layers), 0);
        store->half_life = half_life;
        store->budget = budget;
        store->owner = getpid();
        for (size_t i = 0; i < store->experts.size(); ++i) {
            Expert& expert = store->experts[i];
            for (int m = 0; m < 2; ++m) {
                const MoepressRange& range = matrices[2 * i + size_t(m)];
                const Pages pages = pages_of(range);
                if (range.offset < 0 || range.bytes < 0 || range.place < 0 ||
                    (range.place - range.offset) % kPage != 0 ||
                    (range.bytes > 0 && page_floor(range.place) != pages.first))
                    return kBadShape;
                expert.matrices[m] = range;
                expert.size += pages.bytes();
                store->region_bytes = std::max(store->region_bytes, pages.last);
            }
            if (expert.size == 0) expert.state = State::kPresent;  // left out: nothing is read
            expert.priority = std::log2(uses[i]);
        }
        for (size_t layer = 0; layer < size_t(layers); ++layer)
            for (int64_t i = first_of_layer[layer]; i < first_of_layer[layer + 1]; ++i)
                store->experts[size_t(i)].layer = int64_t(layer);
        if (!reserve(*store)) return kNoMemory;
        MoepressStore* const made = store.get();
        try {
            for (int32_t i = 0; i < threads; ++i)
                made->readers.emplace_back([made] { made->read_forever(); });
        } catch (const std::exception&) {
            if (made->readers.empty()) {
                munmap(made->memory, size_t(made->memory_bytes));
                return kNoMemory;
            }
        }
        *out = store.release();
        return kOk;
    });
}

void moepress_store_close(MoepressStore* store) {
    if (getpid() == store->owner) {
        {
            std::lock_guard<std::mutex> lock(store->mutex);
            store->closing = true;
        }
        store->work.notify_all();
        for (std::thread& reader : store->readers) reader.join();
    } else {
        return;  // a forked child: its parent's threads are not there, nor may they be joined
    }
    munmap(store->memory, size_t(store->memory_bytes));
    delete store;
}

uint8_t* moepress_store_region(const MoepressStore* store, int64_t* bytes) {
    *bytes = store->region_bytes;
    return store->region;
}

int32_t moepress_store_at_hand(MoepressStore* store, int64_t layer, uint8_t* at_hand) {
    if (layer < 0 || layer + 1 >= int64_t(store->first_of_layer.size())) return kBadShape;
    if (getpid() != store->owner) return kForked;  // a thread may have had the mutex
    std::lock_guard<std::mutex> lock(store->mutex);
    const int64_t first = store->first_of_layer[size_t(layer)];
    const int64_t last = store->first_of_layer[size_t(layer) + 1];
    for (int64_t i = first; i < last; ++i) {
        const Expert& expert = store->experts[size_t(i)];
        at_hand[i - first] = expert.state != State::kAbsent && expert.error == 0;
    }
    return kOk;
}

int32_t moepress_store_read_ahead(MoepressStore* store, int64_t layer, const int64_t* experts,
                                  int64_t n) {
    return guarded([&] {
        if (layer < 0 || layer + 1 >= int64_t(store->first_of_layer.size())) return kBadShape;
        if (getpid() != store->owner) return kForked;
        std::unique_lock<std::mutex> lock(store->mutex);
        const int64_t first = store->first_of_layer[size_t(layer)];
        const int64_t count = store->first_of_layer[size_t(layer) + 1] - first;
        for (int64_t i = 0; i < n; ++i) {
            if (experts[i] < 0 || experts[i] >= count) continue;
            const size_t number = size_t(first + experts[i]);
            Expert& expert = store->experts[number];
            if (expert.state != State::kAbsent) continue;
            if (!store->make_room(expert, Urgency::kPerhaps, lock)) continue;
            store->enqueue(number, false);
        }
        return kOk;
    });
}

int32_t moepress_store_hold(MoepressStore* store, int64_t layer, const int64_t* experts, int64_t n,
                            void** out) {
    return guarded([&] {
        if (layer < 0 || layer + 1 >= int64_t(store->first_of_layer.size())) return kBadShape;
        const int64_t count =
            store->first_of_layer[size_t(layer) + 1] - store->first_of_layer[size_t(layer)];
        std::vector<int64_t> tokens(size_t(count), 0);
        for (int64_t i = 0; i < n; ++i)
            if (experts[i] >= 0 && experts[i] < count) tokens[size_t(experts[i])] = 1;
        std::vector<ExpertPanels> chosen;
        for (size_t e = 0; e < tokens.size(); ++e)
            if (tokens[e]) chosen.push_back({e, 0, 0});
        std::unique_ptr<Held> held(new Held{{store, layer, tokens, 1}, chosen});
        Hold& hold = held->hold;
        if (hold.failure() != kOk) return hold.failure();
        if (hold.waves().size() > 1) return kNoMemory;
        if (hold.begin(0) != kOk || !hold.wait(chosen)) return hold.failure();
        *out = held.release();
        return kOk;
    });
}

void moepress_store_release(void* held) { delete static_cast<Held*>(held); }

int32_t moepress_store_lock(MoepressStore* store) {
    return mlock(store->region, size_t(store->region_bytes)) == 0 ? 0 : errno;
}

void moepress_store_counts(MoepressStore* store, MoepressStoreCounts* counts) {
    std::lock_guard<std::mutex> lock(store->mutex);
    *counts = store->counts;
    counts->bytes_held = store->used;
}

void moepress_store_failure(MoepressStore* store, MoepressStoreFailure* failure) {
    std::lock_guard<std::mutex> lock(store->mutex);
    *failure = store->failed;
}
