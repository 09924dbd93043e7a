#include <algorithm>

#include "cpu/api.h"
#include "cpu/pool.h"

namespace fastmerge {
namespace cpu {

void trials(const std::vector<TrialArgs>& tensors) {
    std::vector<int64_t> upto;  // blocks of each tensor and of those before it
    for (const TrialArgs& args : tensors) {
        upto.push_back((upto.empty() ? 0 : upto.back()) + (args.numel + kTieBlock - 1) / kTieBlock);
    }
    if (upto.empty()) return;
    parallel(upto.back(), [&](int64_t item, int) {
        size_t t = static_cast<size_t>(std::upper_bound(upto.begin(), upto.end(), item) - upto.begin());
        int64_t begin = (item - (t == 0 ? 0 : upto[t - 1])) * kTieBlock;
        kernels().trial(&tensors[t], begin, std::min(begin + kTieBlock, tensors[t].numel));
    });
}

}  // namespace cpu
}  // namespace fastmerge
