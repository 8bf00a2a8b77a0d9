// Experts of one call from a store (store.h).

#include "store.h"

#include <algorithm>
#include <chrono>
#include <mutex>

#include "store_state.h"

namespace moepress {

Hold::Hold(MoepressStore* store, int64_t layer, const std::vector<int64_t>& tokens,
           int64_t all_tokens)
    : store_(store), layer_(layer), tokens_(tokens) {
    if (store == nullptr) {
        waves_.push_back({0, tokens.size(), 0});
        return;
    }
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
    first_expert_ = size_t(store->first_of_layer[size_t(layer)]);
    const size_t count = size_t(store->first_of_layer[size_t(layer) + 1]) - first_expert_;
    if (tokens.size() != count) failure_ = kBadShape;
    if (failure_ != kOk) return;
    store->seen[size_t(layer)] += double(all_tokens);
    if (layer == 0) store->counts.tokens += all_tokens;
    int64_t bytes = 0, most = 0;
    size_t exist = 0;
    for (size_t e = 0; e < count; ++e) {
        const size_t number = first_expert_ + e;
        Expert& expert = store->experts[number];
        if (expert.size == 0) continue;
        ++exist;
        if (tokens[e] == 0) {
            store->cancel(number);  // it was read ahead in vain
            continue;
        }
        ++chosen_;
        bytes += expert.size;
        most = std::max(most, expert.size);
        ++store->counts.uses;
        store->counts.hits += expert.state == State::kPresent;
        store->counts.bytes_used += expert.size;
        store->use(number, tokens[e], all_tokens);
    }
    prefill_ = all_tokens > 1 && 4 * chosen_ >= 3 * exist;
    if (most > store->budget) {
        failure_ = kNoMemory;
        return;
    }
    cut(bytes, most);
}

Hold::~Hold() {
    if (store_ == nullptr) return;
    std::lock_guard<std::mutex> lock(store_->mutex);
    for (const size_t number : pinned_) --store_->experts[number].pins;
    store_->busy = false;
    store_->free.notify_one();
    store_->done.notify_all();
}

// Waves of half of the budget, or of one expert that takes more. bytes: of all needed experts;
// most: of the largest.
void Hold::cut(int64_t bytes, int64_t most) {
    const int64_t budget = store_->budget;
    const int64_t limit = bytes <= budget ? budget : std::max(budget / 2, most);
    waves_.push_back({});
    for (size_t e = 0; e < tokens_.size(); ++e) {
        const int64_t size = tokens_[e] > 0 ? store_->experts[first_expert_ + e].size : 0;
        if (waves_.back().bytes + size > limit) waves_.push_back({e, e, 0});
        waves_.back().last = e + 1;
        waves_.back().bytes += size;
    }
}

Result Hold::begin(size_t wave) {
    if (store_ == nullptr) return failure_;
    std::unique_lock<std::mutex> lock(store_->mutex);
    fetch(waves_[wave], lock);
    if (failure_ != kOk) return failure_;
    if (wave + 1 == waves_.size()) {
        if (prefill_) read_next_layer(lock);
    } else if (waves_[wave].bytes + waves_[wave + 1].bytes <= store_->budget) {
        fetch(waves_[wave + 1], lock);
    }
    return failure_;
}

void Hold::fetch(const Wave& wave, std::unique_lock<std::mutex>& lock) {
    std::vector<size_t> missing;
    for (size_t e = wave.first; e < wave.last; ++e) {  // first, nothing of the wave may be dropped
        const size_t number = first_expert_ + e;
        Expert& expert = store_->experts[number];
        if (tokens_[e] == 0 || expert.size == 0) continue;
        if (std::find(pinned_.begin(), pinned_.end(), number) != pinned_.end()) continue;
        ++expert.pins;
        pinned_.push_back(number);
        if (expert.state == State::kReading) store_->hurry(number);
        if (expert.state == State::kAbsent) missing.push_back(number);
    }
    for (const size_t number : missing) {
        if (!store_->make_room(store_->experts[number], Urgency::kNow, lock)) {
            failure_ = kNoMemory;
            return;
        }
        store_->enqueue(number, true);
    }
}

// As many experts as this layer needed, the most used ones first.
void Hold::read_next_layer(std::unique_lock<std::mutex>& lock) {
    const size_t next = size_t(layer_) + 1;
    if (next + 1 >= store_->first_of_layer.size()) return;
    std::vector<size_t> numbers;
    for (int64_t i = store_->first_of_layer[next]; i < store_->first_of_layer[next + 1]; ++i)
        if (store_->experts[size_t(i)].size > 0) numbers.push_back(size_t(i));
    std::stable_sort(numbers.begin(), numbers.end(), [&](size_t a, size_t b) {
        return store_->experts[a].priority > store_->experts[b].priority;
    });
    numbers.resize(std::min(numbers.size(), chosen_));
    for (const size_t number : numbers) {
        if (store_->experts[number].state != State::kAbsent) continue;
        if (!store_->make_room(store_->experts[number], Urgency::kSoon, lock)) return;
        store_->enqueue(number, false);
    }
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
            const Expert& expert = store_->experts[first_expert_ + one.expert];
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

bool Hold::wait(const std::vector<ExpertPanels>& chosen) {
    if (store_ == nullptr) return failure_ == kOk;
    std::unique_lock<std::mutex> lock(store_->mutex);
    const auto looked = std::chrono::steady_clock::now();
    for (const ExpertPanels& one : chosen) {
        const Expert& expert = store_->experts[first_expert_ + one.expert];
        store_->done.wait(lock, [&] {
            return expert.state == State::kPresent || expert.error != 0;
        });
        if (expert.error != 0) failure_ = kReadFailed;
    }
    store_->counts.seconds_waited +=
        std::chrono::duration<double>(std::chrono::steady_clock::now() - looked).count();
    return failure_ == kOk;
}

void Hold::end(size_t wave) {
    if (store_ == nullptr) return;
    std::lock_guard<std::mutex> lock(store_->mutex);
    const size_t first = first_expert_ + waves_[wave].first;
    const size_t last = first_expert_ + waves_[wave].last;
    const auto done = std::partition(pinned_.begin(), pinned_.end(), [&](size_t number) {
        return number < first || number >= last;
    });
    for (auto number = done; number != pinned_.end(); ++number) --store_->experts[*number].pins;
    pinned_.erase(done, pinned_.end());
}

}  // namespace moepress
