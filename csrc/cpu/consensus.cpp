#include <algorithm>

#include "cpu/many.h"
#include "cpu/pool.h"
#include "cpu/rows.h"

namespace fastmerge {
namespace cpu {

void consensus_apply(ConsensusArgs args) {
    over_ranges(args.models, args.rule, [&](const Rule& rule, int64_t begin, int64_t end, void* scratch, int) {
        ConsensusArgs mine = args;
        mine.rule = rule;
        kernels().consensus(&mine, begin, end, scratch);
    });
}

void fused_sum(const Models& models, const float* weights, float* out) {
    parallel((models.numel + kTieBlock - 1) / kTieBlock, [&](int64_t block, int) {
        int64_t begin = block * kTieBlock;
        kernels().fused_sum(&models, weights, begin, std::min(begin + kTieBlock, models.numel), out);
    });
}

void consensus_apply_many(const Many& many, const ConsensusArgs& formula, const int64_t* out) {
    std::vector<int64_t> first = first_blocks(many);
    over_tensors(many, [&](int64_t t) {
        Each each(many, t);
        ConsensusArgs args = formula;
        args.models = each.models;
        args.base = each.base;
        args.out = reinterpret_cast<void*>(out[t]);
        std::vector<int64_t> ties;
        if (formula.rule.method == kBand) {
            // The kernels take each row of ties to end with the tensor.
            const int64_t* row = formula.rule.ties_before + first[static_cast<size_t>(t)];
            args.rule.blocks = first[static_cast<size_t>(t) + 1] - first[static_cast<size_t>(t)];
            for (int32_t i = 0; i < 2 * many.models; ++i, row += first.back()) {
                ties.insert(ties.end(), row, row + args.rule.blocks);
            }
            args.rule.bounds += t * 4 * many.models;
            args.rule.ties_before = ties.data();
        } else if (formula.rule.method == kBernoulli) {
            args.rule.streams += t * many.models;
        }
        consensus_apply(args);
    });
}

}  // namespace cpu
}  // namespace fastmerge
