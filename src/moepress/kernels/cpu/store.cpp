// The expert store: who is in memory, who is read, who goes (store.h).

#include "store.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#include "checks.h"

#if defined(__unix__) || defined(__APPLE__)
#define MOEPRESS_HAS_STORE 1
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

using namespace moepress;

#if defined(MOEPRESS_HAS_STORE)

namespace {

constexpr int64_t kPage = 4096;      // of memory and, at most, of a drive
constexpr int64_t kPiece = 1 << 21;  // bytes that one call of the system reads, about
constexpr int kEndOfFile = -1;       // in place of an errno

int64_t page_floor(int64_t at) { return at / kPage * kPage; }
int64_t page_ceil(int64_t at) { return (at + kPage - 1) / kPage * kPage; }

enum class State : uint8_t { kAbsent, kReading, kPresent };

struct Expert {
    MoepressRange matrices[2];
    int64_t size = 0;  // bytes of its pages
    int64_t layer = 0;
    State state = State::kAbsent;
    int pins = 0;
    int left[2] = {0, 0};  // pieces of each matrix that are still to be read
    bool started = false;  // whether a thread took one of the pieces
    int error = 0;         // of a read: errno or kEndOfFile
    double priority = 0;
};

struct Piece {
    size_t expert;
    int matrix;
    int64_t first, last;  // bytes of the file, from a border of pages
};

}  // namespace

struct MoepressStore {
    std::vector<Expert> experts;
    std::vector<int64_t> first_of_layer;  // [layers + 1]
    std::vector<double> seen;             // [layers] tokens
    double half_life = 1;
    int64_t budget = 0, used = 0;
    uint8_t* region = nullptr;
    int64_t region_bytes = 0;
    int owner = 0;  // process

    std::mutex mutex;  // of all that follows, and of the experts
    std::condition_variable work, done, free;
    std::deque<Piece> needed, ahead;
    std::vector<std::thread> readers;
    bool busy = false, closing = false;
    MoepressStoreFailure failed = {0, 0};
    MoepressStoreCounts counts = {};

    // ---- reading (with the mutex held, except `read`) ------------------------------------------

    void enqueue(size_t number, bool now) {
        Expert& expert = experts[number];
        used += expert.size;
        expert.state = State::kReading;
        expert.started = false;
        expert.error = 0;
        auto& queue = now ? needed : ahead;
        for (int m = 0; m < 2; ++m) {
            const MoepressRange& range = expert.matrices[m];
            const int64_t last = range.offset + range.bytes;
            expert.left[m] = 0;
            for (int64_t at = page_floor(range.offset); at < last; at += kPiece) {
                queue.push_back({number, m, at, std::min(at + kPiece, last)});
                ++expert.left[m];
            }
        }
        if (expert.left[0] + expert.left[1] == 0) expert.state = State::kPresent;
        work.notify_all();
    }

    // Have an expert that is read ahead read at once.
    void hurry(size_t number) {
        for (auto piece = ahead.begin(); piece != ahead.end();)
            if (piece->expert == number) {
                needed.push_back(*piece);
                piece = ahead.erase(piece);
            } else {
                ++piece;
            }
    }

    // Drop a read ahead that no thread has begun. False if it has begun.
    bool cancel(size_t number) {
        Expert& expert = experts[number];
        if (expert.state != State::kReading || expert.started || expert.pins > 0) return false;
        for (auto* queue : {&ahead, &needed})
            queue->erase(std::remove_if(queue->begin(), queue->end(),
                                        [&](const Piece& p) { return p.expert == number; }),
                         queue->end());
        expert.state = State::kAbsent;
        used -= expert.size;
        return true;
    }

    void drop(Expert& expert) {
        for (const MoepressRange& range : expert.matrices) {
            if (range.bytes == 0) continue;
            uint8_t* first = region + page_floor(range.place);
            const size_t size = size_t(page_ceil(range.place + range.bytes) -
                                       page_floor(range.place));
#if defined(__linux__)
            madvise(first, size, MADV_DONTNEED);
#else
            mmap(first, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_FIXED, -1, 0);
#endif
        }
        expert.state = State::kAbsent;
        used -= expert.size;
    }

    // Make room for an expert: drop those of the lowest priority. For a read ahead, nothing of a
    // higher priority than the expert's own, and without waiting.
    bool make_room(const Expert& coming, bool now, std::unique_lock<std::mutex>& lock) {
        while (used + coming.size > budget) {
            Expert* victim = nullptr;
            for (Expert& expert : experts)
                if (expert.state == State::kPresent && expert.pins == 0 && expert.size > 0 &&
                    (victim == nullptr || expert.priority < victim->priority))
                    victim = &expert;
            if (victim != nullptr && (now || victim->priority < coming.priority)) {
                drop(*victim);
                ++counts.dropped;
                continue;
            }
            if (!now) return false;
            bool cancelled = false, reading = false;
            for (size_t i = 0; i < experts.size() && !cancelled; ++i) {
                cancelled = cancel(i);
                reading = reading || experts[i].state == State::kReading;
            }
            if (cancelled) continue;
            if (!reading) return false;
            done.wait(lock);
        }
        return true;
    }

    // The bytes of a piece, from the file to its place. Returns 0, an errno or kEndOfFile.
    int read(const Piece& piece) {
        const MoepressRange& range = experts[piece.expert].matrices[piece.matrix];
        uint8_t* const place = region + page_floor(range.place) - page_floor(range.offset);
        int64_t at = piece.first;
        for (;;) {
            const int64_t most = page_ceil(piece.last) - at;
            const ssize_t got = pread(range.fd, place + at, size_t(most), off_t(at));
            if (got > 0) {
                if (at + got >= piece.last) break;
                const int64_t next = page_floor(at + got);  // where a direct read can go on
                if (next == at) return kEndOfFile;
                at = next;
                continue;
            }
            if (got == 0) return kEndOfFile;
            const int error = errno;
            if (error == EINTR) continue;
#if defined(__linux__)
            const int flags = fcntl(range.fd, F_GETFL);
            if (error == EINVAL && flags >= 0 && (flags & O_DIRECT) != 0) {
                fcntl(range.fd, F_SETFL, flags & ~O_DIRECT);  // not on this file system
                continue;
            }
#endif
            return error;
        }
#if defined(__linux__)
        if ((fcntl(range.fd, F_GETFL) & O_DIRECT) == 0)  // else memory would hold it twice
            posix_fadvise(range.fd, off_t(piece.first), off_t(piece.last - piece.first),
                          POSIX_FADV_DONTNEED);
#endif
        return 0;
    }

    void finish(const Piece& piece, int error) {
        Expert& expert = experts[piece.expert];
        if (error != 0 && expert.error == 0) {
            expert.error = error;
            failed = {error, expert.matrices[piece.matrix].fd};
        }
        counts.bytes_read += piece.last - piece.first;
        --expert.left[piece.matrix];
        if (expert.left[0] + expert.left[1] == 0) {
            expert.state = State::kPresent;
            ++counts.reads;
            if (expert.error != 0) drop(expert);
        }
        done.notify_all();
    }

    void read_forever() {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            work.wait(lock, [&] { return closing || !needed.empty() || !ahead.empty(); });
            if (closing) return;
            auto& queue = needed.empty() ? ahead : needed;
            const Piece piece = queue.front();
            queue.pop_front();
            experts[piece.expert].started = true;
            lock.unlock();
            const int error = read(piece);
            lock.lock();
            finish(piece, error);
        }
    }

    // ---- use ------------------------------------------------------------------------------------

    // Count that some of `all` tokens used an expert: as if spread evenly over those tokens.
    void use(size_t number, int64_t some, int64_t all) {
        Expert& expert = experts[number];
        const double now = seen[size_t(expert.layer)];
        const double kept = std::exp2(expert.priority - now / half_life);
        const double share = double(some) / double(all);
        const double span = double(all) / half_life;
        const double each = (1 - std::exp2(-span)) / (1 - std::exp2(-1 / half_life));
        expert.priority = std::log2(kept + share * each) + now / half_life;
    }
};

namespace moepress {

Hold::Hold(MoepressStore* store, int64_t layer, const std::vector<int64_t>& tokens,
           int64_t all_tokens)
    : store_(store), tokens_(tokens) {
    if (store == nullptr) return;
    if (getpid() != store->owner) {
        store_ = nullptr;
        failure_ = kForked;
        return;
    }
    if (layer < 0 || layer + 1 >= int64_t(store->first_of_layer.size())) {
        store_ = nullptr;
        failure_ = kBadShape;
        return;
    }
    std::unique_lock<std::mutex> lock(store->mutex);
    store->free.wait(lock, [&] { return !store->busy; });
    store->busy = true;
    first_expert_ = store->first_of_layer[size_t(layer)];
    const int64_t count = store->first_of_layer[size_t(layer) + 1] - first_expert_;
    if (int64_t(tokens.size()) != count) failure_ = kBadShape;
    if (failure_ != kOk) return;
    store->seen[size_t(layer)] += double(all_tokens);
    if (layer == 0) store->counts.tokens += all_tokens;
    int64_t bytes = 0, most = 0;
    for (int64_t e = 0; e < count; ++e) {
        const size_t number = size_t(first_expert_ + e);
        Expert& expert = store->experts[number];
        if (tokens[size_t(e)] == 0) continue;
        bytes += expert.size;
        most = std::max(most, expert.size);
        if (expert.size == 0) continue;
        ++store->counts.uses;
        store->counts.hits += expert.state == State::kPresent;
        store->counts.bytes_used += expert.size;
        store->use(number, tokens[size_t(e)], all_tokens);
    }
    if (bytes > store->budget) wave_bytes_ = std::max(store->budget / 2, most);
    if (most > store->budget) failure_ = kNoMemory;
}

Hold::~Hold() {
    if (store_ == nullptr) return;
    std::lock_guard<std::mutex> lock(store_->mutex);
    for (const int64_t number : pinned_) --store_->experts[size_t(number)].pins;
    store_->busy = false;
    store_->free.notify_one();
    store_->done.notify_all();
}

size_t Hold::begin(const std::vector<ExpertPanels>& chosen, size_t first) {
    if (store_ == nullptr) return chosen.size();
    size_t last = first;
    int64_t bytes = 0;
    for (; last < chosen.size(); ++last) {
        const Expert& expert = store_->experts[size_t(first_expert_) + chosen[last].expert];
        bytes += expert.size;
        if (wave_bytes_ > 0 && last > first && bytes > wave_bytes_) break;
    }
    std::unique_lock<std::mutex> lock(store_->mutex);
    std::vector<size_t> missing;
    for (size_t i = first; i < last; ++i) {  // first of all, nothing of the wave may be dropped
        const size_t number = size_t(first_expert_) + chosen[i].expert;
        Expert& expert = store_->experts[number];
        if (std::find(pinned_.begin(), pinned_.end(), int64_t(number)) == pinned_.end()) {
            ++expert.pins;
            pinned_.push_back(int64_t(number));
        }
        if (expert.state == State::kReading) store_->hurry(number);
        if (expert.state == State::kAbsent) missing.push_back(number);
    }
    for (const size_t number : missing) {
        if (!store_->make_room(store_->experts[number], true, lock)) {
            failure_ = kNoMemory;
            break;
        }
        store_->enqueue(number, true);
    }
    return last;
}

std::vector<ExpertPanels> Hold::take_ready(std::vector<ExpertPanels>& waiting) {
    std::vector<ExpertPanels> ready;
    if (store_ == nullptr) {
        if (failure_ == kOk) ready.swap(waiting);
        return ready;
    }
    std::unique_lock<std::mutex> lock(store_->mutex);
    const auto looked = std::chrono::steady_clock::now();
    while (failure_ == kOk) {
        std::vector<ExpertPanels> still;
        for (const ExpertPanels& one : waiting) {
            const Expert& expert = store_->experts[size_t(first_expert_) + one.expert];
            if (expert.error != 0) failure_ = kReadFailed;
            const bool here = expert.state == State::kPresent ||
                              (expert.state == State::kReading && expert.left[0] == 0);
            (here ? ready : still).push_back(one);
        }
        if (failure_ != kOk) break;
        waiting.swap(still);
        if (!ready.empty()) break;
        store_->done.wait(lock);
    }
    store_->counts.seconds_waited +=
        std::chrono::duration<double>(std::chrono::steady_clock::now() - looked).count();
    if (failure_ != kOk) ready.clear();
    return ready;
}

bool Hold::wait(const std::vector<ExpertPanels>& chosen, size_t first, size_t last) {
    if (store_ == nullptr) return failure_ == kOk;
    std::unique_lock<std::mutex> lock(store_->mutex);
    const auto looked = std::chrono::steady_clock::now();
    for (size_t i = first; i < last; ++i) {
        const Expert& expert = store_->experts[size_t(first_expert_) + chosen[i].expert];
        store_->done.wait(lock, [&] {
            return expert.state == State::kPresent || expert.error != 0;
        });
        if (expert.error != 0) failure_ = kReadFailed;
    }
    store_->counts.seconds_waited +=
        std::chrono::duration<double>(std::chrono::steady_clock::now() - looked).count();
    return failure_ == kOk;
}

void Hold::end(const std::vector<ExpertPanels>& chosen, size_t first, size_t last) {
    if (store_ == nullptr || wave_bytes_ == 0) return;
    std::lock_guard<std::mutex> lock(store_->mutex);
    for (size_t i = first; i < last; ++i) {
        const int64_t number = first_expert_ + int64_t(chosen[i].expert);
        const auto at = std::find(pinned_.begin(), pinned_.end(), number);
        if (at == pinned_.end()) continue;
        --store_->experts[size_t(number)].pins;
        pinned_.erase(at);
    }
}

}  // namespace moepress

namespace {

// Memory for all experts, of which only some will be used. Null: the system refuses.
uint8_t* reserve(int64_t bytes) {
    int flags = MAP_PRIVATE | MAP_ANON;
#if defined(MAP_NORESERVE)
    flags |= MAP_NORESERVE;
#endif
    void* region = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, flags, -1, 0);
    if (region == MAP_FAILED) return nullptr;
#if defined(MADV_NOHUGEPAGE)
    madvise(region, size_t(bytes), MADV_NOHUGEPAGE);  // a huge page would outlive its experts
#endif
    return static_cast<uint8_t*>(region);
}

int64_t pages_of(const MoepressRange& range) {
    if (range.bytes == 0) return 0;
    return page_ceil(range.place + range.bytes) - page_floor(range.place);
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
                if (range.offset < 0 || range.bytes < 0 || range.place < 0 ||
                    (range.place - range.offset) % kPage != 0)
                    return kBadShape;
                expert.matrices[m] = range;
                expert.size += pages_of(range);
                store->region_bytes =
                    std::max(store->region_bytes, page_ceil(range.place + range.bytes));
            }
            expert.priority = std::log2(uses[i]);
        }
        for (size_t layer = 0; layer < size_t(layers); ++layer)
            for (int64_t i = first_of_layer[layer]; i < first_of_layer[layer + 1]; ++i)
                store->experts[size_t(i)].layer = int64_t(layer);
        store->region = reserve(std::max<int64_t>(store->region_bytes, kPage));
        if (store->region == nullptr) return kNoMemory;
        MoepressStore* const made = store.get();
        try {
            for (int32_t i = 0; i < threads; ++i)
                made->readers.emplace_back([made] { made->read_forever(); });
        } catch (const std::exception&) {
            if (made->readers.empty()) {
                munmap(made->region, size_t(std::max<int64_t>(made->region_bytes, kPage)));
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
    munmap(store->region, size_t(std::max<int64_t>(store->region_bytes, kPage)));
    delete store;
}

uint8_t* moepress_store_region(const MoepressStore* store, int64_t* bytes) {
    *bytes = store->region_bytes;
    return store->region;
}

int32_t moepress_store_at_hand(MoepressStore* store, int64_t layer, uint8_t* at_hand) {
    if (layer < 0 || layer + 1 >= int64_t(store->first_of_layer.size())) return kBadShape;
    std::lock_guard<std::mutex> lock(store->mutex);
    const int64_t first = store->first_of_layer[size_t(layer)];
    const int64_t last = store->first_of_layer[size_t(layer) + 1];
    for (int64_t i = first; i < last; ++i) {
        const Expert& expert = store->experts[size_t(i)];
        at_hand[i - first] =
            expert.size == 0 || (expert.state != State::kAbsent && expert.error == 0);
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
            if (expert.state != State::kAbsent || expert.size == 0) continue;
            if (!store->make_room(expert, false, lock)) continue;
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
        if (hold.begin(chosen, 0) != chosen.size()) return kNoMemory;
        if (!hold.wait(chosen, 0, chosen.size())) return hold.failure();
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

#else  // no store on this system

struct MoepressStore {};

namespace moepress {
Hold::Hold(MoepressStore*, int64_t, const std::vector<int64_t>&, int64_t) : store_(nullptr) {}
Hold::~Hold() {}
size_t Hold::begin(const std::vector<ExpertPanels>& chosen, size_t) { return chosen.size(); }
std::vector<ExpertPanels> Hold::take_ready(std::vector<ExpertPanels>& waiting) {
    std::vector<ExpertPanels> ready;
    ready.swap(waiting);
    return ready;
}
bool Hold::wait(const std::vector<ExpertPanels>&, size_t, size_t) { return true; }
void Hold::end(const std::vector<ExpertPanels>&, size_t, size_t) {}
}  // namespace moepress

int32_t moepress_store_open(const MoepressRange*, const int64_t*, int64_t, const double*, double,
                            int64_t, int32_t, MoepressStore**) {
    return kNoStore;
}
void moepress_store_close(MoepressStore*) {}
uint8_t* moepress_store_region(const MoepressStore*, int64_t*) { return nullptr; }
int32_t moepress_store_at_hand(MoepressStore*, int64_t, uint8_t*) { return kNoStore; }
int32_t moepress_store_read_ahead(MoepressStore*, int64_t, const int64_t*, int64_t) {
    return kNoStore;
}
int32_t moepress_store_hold(MoepressStore*, int64_t, const int64_t*, int64_t, void**) {
    return kNoStore;
}
void moepress_store_release(void*) {}
int32_t moepress_store_lock(MoepressStore*) { return 0; }
void moepress_store_counts(MoepressStore*, MoepressStoreCounts*) {}
void moepress_store_failure(MoepressStore*, MoepressStoreFailure*) {}

#endif
