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
// which is log2 of the F of now plus the same number for all: frequency and recency in one order
// that time does not change (Lee et al., "LRFU", IEEE Trans. Computers 2001).
#pragma once

#include <cstdint>
#include <vector>

#include "moepress.h"
#include "routing.h"

namespace moepress {

// The experts that one call of the experts op needs, from a store. Without a store all of them are
// there. Calls take turns: a store serves one at a time.
//
// Needed experts that do not fit in the budget together are taken in waves: runs of experts, in
// order, so that sums keep their order.
class Hold {
  public:
    // Waits for its turn. tokens [experts]: how many of `all_tokens` tokens chose each expert.
    Hold(MoepressStore* store, int64_t layer, const std::vector<int64_t>& tokens,
         int64_t all_tokens);
    ~Hold();
    Hold(const Hold&) = delete;
    Hold& operator=(const Hold&) = delete;

    // Start to read the experts of a wave: first .. the result - 1 of `chosen`.
    size_t begin(const std::vector<ExpertPanels>& chosen, size_t first);
    // Move the experts whose first matrix is there from `waiting` to the result. Waits for one. An
    // empty result: a read failed.
    std::vector<ExpertPanels> take_ready(std::vector<ExpertPanels>& waiting);
    // Wait for the second matrices of a wave. False: a read failed.
    bool wait(const std::vector<ExpertPanels>& chosen, size_t first, size_t last);
    // The wave is done.
    void end(const std::vector<ExpertPanels>& chosen, size_t first, size_t last);

    Result failure() const { return failure_; }

  private:
    void pin(int64_t expert);
    void unpin(int64_t expert);

    MoepressStore* store_;
    int64_t first_expert_ = 0;  // number of the layer's first expert in the store
    std::vector<int64_t> tokens_;
    std::vector<int64_t> pinned_;
    int64_t wave_bytes_ = 0;  // most bytes of a wave; 0: everything fits, and stays until the end
    Result failure_ = kOk;
};

}  // namespace moepress
