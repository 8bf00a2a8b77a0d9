// The expert store where the system has no mmap: there is none.

#include "store.h"

using namespace moepress;

struct MoepressStore {};

namespace moepress {
Hold::Hold(MoepressStore*, int64_t layer, const std::vector<int64_t>& tokens, int64_t)
    : store_(nullptr), layer_(layer), waves_{{0, tokens.size(), 0}} {}
Hold::~Hold() {}
Result Hold::begin(size_t) { return kOk; }
std::vector<ExpertPanels> Hold::take_ready(std::vector<ExpertPanels>& waiting) {
    std::vector<ExpertPanels> ready;
    ready.swap(waiting);
    return ready;
}
bool Hold::wait(const std::vector<ExpertPanels>&) { return true; }
void Hold::end(size_t) {}
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
