// Work for several threads: on the team of an OpenMP runtime where one is lent, else on a pool of
// this library's own.
#pragma once

#include <cstdint>
#include <functional>

namespace moepress {

// GOMP_parallel(body, data, threads, flags) runs body(data) on every thread of a team. The OpenMP
// runtime that torch has loaded exports it. That team is better than a pool of our own: after an
// operation of torch its idle threads spin for a while, and would compete with ours for the cores.
using Team = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

void lend_team(Team team);

// Call body(first, last) for ranges that together cover 0 .. items - 1, from at most `threads`
// threads. Ranges are handed out in order, `grain` items at a time. `body` must not throw.
void parallel(int threads, int64_t items, int64_t grain,
              const std::function<void(int64_t, int64_t)>& body);

// A grain that gives each thread about 8 ranges to even out the load: from 1 to `most` items.
int64_t grain_for(int64_t items, int threads, int64_t most);

}  // namespace moepress
