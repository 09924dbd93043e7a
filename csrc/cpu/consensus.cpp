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

}  // namespace cpu
}  // namespace fastmerge
