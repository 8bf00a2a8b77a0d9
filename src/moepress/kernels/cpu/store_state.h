// What an expert store knows: who is in memory, who is read, who goes (store.h). Its methods are
// called with the mutex held, except `read`.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "moepress.h"

namespace moepress {

// Of memory, as the system gives and takes it, and at least of a drive: 4 KB with most systems, 16 KB
// on Apple silicon, up to 64 KB on other ARM.
inline const int64_t kPage = std::max<int64_t>(4096, sysconf(_SC_PAGESIZE));
constexpr int64_t kHugePage = 1 << 21;
constexpr int64_t kHugeFrom = 8 * kHugePage;  // bytes of a matrix that gets huge pages
constexpr int64_t kPiece = 1 << 21;  // bytes that one call of the system reads, about
constexpr int kEndOfFile = -1;       // in place of an errno

inline int64_t page_floor(int64_t at, int64_t page = kPage) { return at / page * page; }
inline int64_t page_ceil(int64_t at, int64_t page = kPage) {
    return (at + page - 1) / page * page;
}

// Memory of a matrix in the region: whole pages, of its own. Huge ones take one fault where small
// ones take 512: with these, an expert came half as fast as the drive reads (docs/log.md).
struct Pages {
    int64_t first, last;
    bool huge;
    int64_t bytes() const { return last - first; }
};

inline Pages pages_of(const MoepressRange& range) {
    const bool huge = range.bytes >= kHugeFrom;
    const int64_t page = huge ? kHugePage : kPage;
    if (range.bytes == 0) return {0, 0, false};
    return {page_floor(range.place, page), page_ceil(range.place + range.bytes, page), huge};
}

enum class State : uint8_t { kAbsent, kReading, kPresent };

// What a read may drop to make room: kNow, for a call that waits, everything; kSoon, of what comes
// next, experts of other layers; kPerhaps, experts that are worth less than its own. Only kNow
// waits for room.
enum class Urgency : uint8_t { kNow, kSoon, kPerhaps };

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

}  // namespace moepress

struct MoepressStore {
    std::vector<moepress::Expert> experts;
    std::vector<int64_t> first_of_layer;  // [layers + 1]
    std::vector<double> seen;             // [layers] tokens
    double half_life = 1;
    int64_t budget = 0, used = 0;
    uint8_t* region = nullptr;  // from a border of huge pages in `memory`
    int64_t region_bytes = 0;
    void* memory = nullptr;
    int64_t memory_bytes = 0;
    int owner = 0;  // process

    std::mutex mutex;  // of all that follows, and of the experts
    std::condition_variable work, done, free;
    std::deque<moepress::Piece> needed, ahead;
    std::vector<std::thread> readers;
    bool busy = false, closing = false;
    MoepressStoreFailure failed = {0, 0};
    MoepressStoreCounts counts = {};

    // ---- reading --------------------------------------------------------------------------------

    void enqueue(size_t number, bool now) {
        moepress::Expert& expert = experts[number];
        used += expert.size;
        expert.state = moepress::State::kReading;
        expert.started = false;
        expert.error = 0;
        auto& queue = now ? needed : ahead;
        for (int m = 0; m < 2; ++m) {
            const MoepressRange& range = expert.matrices[m];
            const int64_t last = range.offset + range.bytes;
            expert.left[m] = 0;
            for (int64_t at = moepress::page_floor(range.offset); at < last; at += moepress::kPiece) {
                queue.push_back({number, m, at, std::min(at + moepress::kPiece, last)});
                ++expert.left[m];
            }
        }
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
        moepress::Expert& expert = experts[number];
        if (expert.state != moepress::State::kReading || expert.started || expert.pins > 0) return false;
        for (auto* queue : {&ahead, &needed})
            queue->erase(std::remove_if(queue->begin(), queue->end(),
                                        [&](const moepress::Piece& p) { return p.expert == number; }),
                         queue->end());
        expert.state = moepress::State::kAbsent;
        used -= expert.size;
        return true;
    }

    void drop(moepress::Expert& expert) {
        for (const MoepressRange& range : expert.matrices) {
            const moepress::Pages pages = moepress::pages_of(range);
            if (pages.bytes() == 0) continue;
            uint8_t* const at = region + pages.first;
#if defined(__linux__)
            madvise(at, size_t(pages.bytes()), MADV_DONTNEED);
#else
            mmap(at, size_t(pages.bytes()), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANON | MAP_FIXED, -1, 0);
#endif
        }
        expert.state = moepress::State::kAbsent;
        used -= expert.size;
    }

    // log2 of the uses of an expert, as they count now.
    double worth(const moepress::Expert& expert) const {
        return expert.priority - seen[size_t(expert.layer)] / half_life;
    }

    // Make room for an expert: drop those that are worth least. False: there is none.
    bool make_room(const moepress::Expert& coming, moepress::Urgency urgency,
                   std::unique_lock<std::mutex>& lock) {
        using moepress::Urgency;
        while (used + coming.size > budget) {
            moepress::Expert* victim = nullptr;
            for (moepress::Expert& expert : experts) {
                if (expert.state != moepress::State::kPresent || expert.pins > 0) continue;
                if (expert.size == 0) continue;
                if (urgency == Urgency::kSoon && expert.layer == coming.layer) continue;
                if (victim == nullptr || worth(expert) < worth(*victim)) victim = &expert;
            }
            if (victim != nullptr &&
                (urgency != Urgency::kPerhaps || worth(*victim) < worth(coming))) {
                drop(*victim);
                ++counts.dropped;
                continue;
            }
            if (urgency != Urgency::kNow) return false;
            bool cancelled = false, reading = false;
            for (size_t i = 0; i < experts.size() && !cancelled; ++i) {
                cancelled = cancel(i);
                reading = reading || experts[i].state == moepress::State::kReading;
            }
            if (cancelled) continue;
            if (!reading) return false;
            done.wait(lock);
        }
        return true;
    }

    // The bytes of a piece, from the file to its place. Returns 0, an errno or moepress::kEndOfFile.
    int read(const moepress::Piece& piece) {
        const MoepressRange& range = experts[piece.expert].matrices[piece.matrix];
        uint8_t* const place = region + moepress::page_floor(range.place) - moepress::page_floor(range.offset);
        int64_t at = piece.first;
        for (;;) {
            const int64_t most = moepress::page_ceil(piece.last) - at;
            const ssize_t got = pread(range.fd, place + at, size_t(most), off_t(at));
            if (got > 0) {
                if (at + got >= piece.last) break;
                const int64_t next = moepress::page_floor(at + got);  // where a direct read can go on
                if (next == at) return moepress::kEndOfFile;
                at = next;
                continue;
            }
            if (got == 0) return moepress::kEndOfFile;
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

    void finish(const moepress::Piece& piece, int error) {
        moepress::Expert& expert = experts[piece.expert];
        if (error != 0 && expert.error == 0) {
            expert.error = error;
            failed = {error, expert.matrices[piece.matrix].fd};
        }
        counts.bytes_read += piece.last - piece.first;
        --expert.left[piece.matrix];
        if (expert.left[0] + expert.left[1] == 0) {
            expert.state = moepress::State::kPresent;
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
            const moepress::Piece piece = queue.front();
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
        moepress::Expert& expert = experts[number];
        const double now = seen[size_t(expert.layer)];
        const double kept = std::exp2(expert.priority - now / half_life);
        const double share = double(some) / double(all);
        const double span = double(all) / half_life;
        const double each = (1 - std::exp2(-span)) / (1 - std::exp2(-1 / half_life));
        expert.priority = std::log2(kept + share * each) + now / half_life;
    }
};
