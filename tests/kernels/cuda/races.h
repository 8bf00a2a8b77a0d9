// Hooks of the emulator for the search for races (races.cpp). Without EMULATED_RACES they are nothing.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {
namespace races {

#ifdef EMULATED_RACES
#define EMULATED_HOOK(declaration) declaration;
#else
#define EMULATED_HOOK(declaration) \
    inline declaration {}
#endif

// Memory that is watched, beside the shared memory of the grid; all of it is forgotten after a grid.
EMULATED_HOOK(void watch(const void*, size_t))
EMULATED_HOOK(void start_grid())
EMULATED_HOOK(void start_block())
EMULATED_HOOK(void end_grid())

// The thread that runs comes to a barrier; thread `index` may go on after it; all have gone on.
EMULATED_HOOK(void arrive(int))
EMULATED_HOOK(void leave(int, int))
EMULATED_HOOK(void completed(int))
EMULATED_HOOK(void sync_warp(int, uint32_t))
EMULATED_HOOK(void fence())
EMULATED_HOOK(void atomic(const void*, size_t))
EMULATED_HOOK(void begin())

// Threads do what the emulator does for them.
EMULATED_HOOK(void read_by(int, const void*, size_t))
EMULATED_HOOK(void copy_started(const void*, const void*, size_t))
EMULATED_HOOK(void copy_ended(const void*, const void*, size_t))
// Reads of a warpgroup's product, until it is waited for.
EMULATED_HOOK(void product_reads(const void*, size_t))
EMULATED_HOOK(void products_committed())
EMULATED_HOOK(void products_waited(size_t))
EMULATED_HOOK(void proxy_fence())

#undef EMULATED_HOOK

}  // namespace races
}  // namespace emulator
