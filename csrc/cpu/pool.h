// One set of threads for the process. Our own rather than OpenMP: torch brings an OpenMP runtime, and two of them in
// one process start twice the threads that the machine has.
#pragma once

#include <cstdint>
#include <functional>

namespace fastmerge {
namespace cpu {

// Calls work(item, thread) for each item in [0, items), `thread` below threads(). Items are handed out one by one, in
// order. Runs on the calling thread alone when there is one item, the threads serve another caller just then, or the
// call is itself part of such work.
void parallel(int64_t items, const std::function<void(int64_t item, int thread)>& work);

}  // namespace cpu
}  // namespace fastmerge
