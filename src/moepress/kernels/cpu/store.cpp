// Experts of one call from a store (store.h).

#include "store.h"

#include <algorithm>
#include <chrono>
#include <mutex>

#include "store_state.h"

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
