// Threads: the lent OpenMP team, or a pool of sleeping workers.

#include "threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(_WIN32)
#include <process.h>
#else
#include <unistd.h>
#endif

namespace moepress {
namespace {

int process_id() {
#if defined(_WIN32)
    return _getpid();
#else
    return getpid();
#endif
}

std::atomic<Team> lent_team{nullptr};

// Work in ranges of `grain` items. Every thread that calls `run` takes ranges until none is left.
struct Job {
    const std::function<void(int64_t, int64_t)>& body;
    int64_t items, grain;
    std::atomic<int64_t> next{0};

    void run() {
        for (;;) {
            const int64_t first = next.fetch_add(grain, std::memory_order_relaxed);
            if (first >= items) return;
            body(first, std::min(first + grain, items));
        }
    }
};

// Sleeping workers that join a job when one is posted. There is one job at a time: a second caller,
// from another thread, runs its job alone.
class Pool {
  public:
    void run(int threads, Job& job) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) return job.run();
        {
            std::lock_guard<std::mutex> lock(mutex_);
            try {
                while (int(workers_.size()) < threads - 1)
                    workers_.emplace_back([this, me = int(workers_.size())] { work(me); });
            } catch (const std::exception&) {
                // The system gives no more threads: the existing ones do the work.
            }
            job_ = &job;
            helpers_ = threads - 1;
            ++posted_;
        }
        wake_.notify_all();
        job.run();
        std::unique_lock<std::mutex> lock(mutex_);
        job_ = nullptr;  // workers that wake up late find no job
        done_.wait(lock, [this] { return busy_ == 0; });
    }

  private:
    void work(int me) {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return posted_ != seen; });
            seen = posted_;
            if (job_ == nullptr || me >= helpers_) continue;
            Job& job = *job_;
            ++busy_;
            lock.unlock();
            job.run();
            lock.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    Job* job_ = nullptr;
    int helpers_ = 0, busy_ = 0;
    uint64_t posted_ = 0;
};

// Never destroyed, since threads may not be joined while a process ends. A forked child has none of
// the threads of its parent, so it gets a new pool.
Pool& pool() {
    static std::mutex mutex;
    static Pool* pool = nullptr;
    static int owner = 0;
    std::lock_guard<std::mutex> lock(mutex);
    if (pool == nullptr || owner != process_id()) {
        pool = new Pool;
        owner = process_id();
    }
    return *pool;
}

}  // namespace

void lend_team(Team team) { lent_team = team; }

void parallel(int threads, int64_t items, int64_t grain,
              const std::function<void(int64_t, int64_t)>& body) {
    Job job{body, items, std::max<int64_t>(grain, 1)};
    const int64_t ranges = (items + job.grain - 1) / job.grain;
    threads = int(std::min<int64_t>(threads, ranges));
    if (threads <= 1) return job.run();
    if (const Team team = lent_team)
        team([](void* data) { static_cast<Job*>(data)->run(); }, &job, unsigned(threads), 0);
    else
        pool().run(threads, job);
}

int64_t grain_for(int64_t items, int threads, int64_t most) {
    return std::clamp<int64_t>(items / (8 * int64_t(threads)), 1, most);
}

}  // namespace moepress
