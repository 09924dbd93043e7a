// How a chunk is cut into work: tie blocks, or for DELLA whole rows, since a rank needs its row.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

#include "cpu/api.h"
#include "cpu/pool.h"
#include "fastmerge/sparsify.h"

namespace fastmerge {
namespace cpu {

// Calls work(rule, begin, end, scratch, thread) over disjoint ranges that cover the chunk.
using RangeWork = std::function<void(const Rule& rule, int64_t begin, int64_t end, void* scratch, int thread)>;
void over_ranges(const Models& models, const Rule& rule, const RangeWork& work);

}  // namespace cpu
}  // namespace fastmerge
