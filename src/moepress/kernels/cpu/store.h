// Experts on disk: a budget of bytes of memory that holds some of a model's experts.
//
// Every matrix has a place of its own in one region of address space, whole pages, so the tables of
// the experts (first byte, code bits) never change. Only the experts that are present have memory
// behind their places. Places have the remainder modulo kPage that the matrix has in its file:
// direct reads go straight there.
//
//     store_state.h        who is in memory, who is read, who goes
//     store.cpp            the experts of one call
//     store_interface.cpp  the C interface
//     store_missing.cpp    that interface on systems without a store
//
// An expert is read whole, in pieces, by the store's threads: `gate_up` first. What an op uses is
// pinned. Room is made by dropping the unpinned expert of the lowest priority:
//
//     p = log2(F) + t / half_life     F: uses of the expert, each worth half after half_life tokens;
//                                     t: tokens that its layer has seen when F was last changed
//
// which is log2 of the F of now plus the same number for all experts of the layer: frequency and
// recency in one order that time does not change (Lee et al., "LRFU", IEEE Trans. Computers 2001).
// Experts of several layers are compared by the F of now, since a prefill has passed some layers
// and not the others.
//
// Reads run ahead of the computation where it is nearly certain what comes: the next wave of a call
// (below), and in a prefill, which chooses nearly all experts of every layer, those of the next
// layer, as far as the budget has room.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "moepress.h"
#include "routing.h"

namespace moepress {

// The experts that one call of the experts op needs, from a store. Without a store all of them are
// there. Calls take turns: a store serves one at a time.
//
// Needed experts that do not fit in the budget together are taken in waves: runs of experts, in
// order, so that sums keep their order. The next wave is read while one is computed.
struct Wave {
    size_t first = 0, last = 0;  // experts first .. last - 1 of the layer
    int64_t bytes = 0;           // of those that are needed
};

class Hold {
  public:
    // Waits for its turn. tokens [experts]: how many of `all_tokens` tokens chose each expert.
    Hold(MoepressStore* store, int64_t layer, const std::vector<int64_t>& tokens,
         int64_t all_tokens);
    ~Hold();
    Hold(const Hold&) = delete;
    Hold& operator=(const Hold&) = delete;

    // The experts of the layer, in order. None: see `failure`.
    const std::vector<Wave>& waves() const { return waves_; }
    // Start to read the experts of a wave, and then what comes next.
    Result begin(size_t wave);
    // Move the experts whose first matrix is there from `waiting` to the result. Waits for one. An
    // empty result: a read failed.
    std::vector<ExpertPanels> take_ready(std::vector<ExpertPanels>& waiting);
    // Wait for the second matrices of experts of a wave. False: a read failed.
    bool wait(const std::vector<ExpertPanels>& chosen);
    // The wave is done.
    void end(size_t wave);

    Result failure() const { return failure_; }

  private:
    void cut(int64_t bytes, int64_t most);
    void fetch(const Wave& wave, std::unique_lock<std::mutex>& lock);
    void read_next_layer(std::unique_lock<std::mutex>& lock);

    MoepressStore* store_;
    int64_t layer_;
    size_t first_expert_ = 0;      // number of the layer's first expert in the store
    std::vector<int64_t> tokens_;  // [experts]
    std::vector<Wave> waves_;
    std::vector<size_t> pinned_;
    size_t chosen_ = 0;     // experts that some token chose
    bool prefill_ = false;  // nearly all
    Result failure_ = kOk;
};

}  // namespace moepress
