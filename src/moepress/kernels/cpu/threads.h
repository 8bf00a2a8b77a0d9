// Work for several threads: the team of an OpenMP runtime when one is lent, else a pool of our own.
#pragma once

#include <cstdint>
#include <functional>

namespace moepress {

// GOMP_parallel(body, data, threads, flags): run body(data) on every thread of a team. The OpenMP
// runtime that torch has loaded exports it. Using that team instead of our own matters: after an
// operation of torch its idle threads spin for a while, and would fight ours for the cores.
using Team = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

void lend_team(Team team);

// Calls body(first, last) for ranges that cover 0 .. items-1, from at most `threads` threads.
// Ranges are handed out in order, `grain` items at a time. `body` must not throw.
void parallel(int threads, int64_t items, int64_t grain,
              const std::function<void(int64_t, int64_t)>& body);

}  // namespace moepress
