// Band masks: which elements lie between two cuts of the order by magnitude. Used by select, sparsify and consensus.
#pragma once

#include "cpu/kernels/tile.h"

FM_NAMESPACE_BEGIN
namespace {

// Where a walk through a tie block stands. Nearly every block lies wholly before or past the place where a cut splits a
// run of equals, and then one comparison with an adjusted threshold decides; only the block with the split counts.
struct BandCursor {
    uint32_t threshold[2];  // rank >= bound  <=>  key < threshold, in blocks without the split
    uint32_t equal[2];      // the key that a split concerns
    int64_t ordinal[2];     // equals seen so far
    int64_t ties[2];        // equals that lie before the bound
    bool split[2];
};

inline void band_open(const Rule& rule, int32_t model, int64_t begin, BandCursor& cursor) {
    int64_t block = begin / kTieBlock;
    for (int b = 0; b < 2; ++b) {
        int64_t threshold = rule.bounds[4 * model + 2 * b];
        int64_t ties = rule.bounds[4 * model + 2 * b + 1];
        cursor.threshold[b] = static_cast<uint32_t>(threshold);
        cursor.equal[b] = static_cast<uint32_t>(threshold);
        cursor.ties[b] = ties;
        cursor.ordinal[b] = 0;
        cursor.split[b] = false;
        if (ties == 0) continue;
        const int64_t* before = rule.ties_before + (2 * model + b) * rule.blocks;
        cursor.ordinal[b] = before[block];
        if (before[block] >= ties) {
            cursor.threshold[b] += 1;  // every equal from here on is past the bound
        } else if (block + 1 >= rule.blocks || before[block + 1] > ties) {
            cursor.split[b] = true;
        }
    }
}

// keep[t] = all ones where bound 0 <= rank < bound 1, else 0.
inline void band_keep(BandCursor& cursor, int count, const float* __restrict delta, uint32_t* __restrict keep) {
    if (!cursor.split[0] && !cursor.split[1]) {
        uint32_t first = cursor.threshold[0], last = cursor.threshold[1];
        for (int t = 0; t < count; ++t) {
            uint32_t key = magnitude_key(delta[t]);
            keep[t] = (key < first && key >= last) ? 0xffffffffu : 0u;
        }
        return;
    }
    for (int t = 0; t < count; ++t) {
        uint32_t key = magnitude_key(delta[t]);
        bool past[2];
        for (int b = 0; b < 2; ++b) {
            past[b] = key < cursor.threshold[b];
            if (cursor.split[b] && key == cursor.equal[b]) past[b] = cursor.ordinal[b]++ >= cursor.ties[b];
        }
        keep[t] = (past[0] && !past[1]) ? 0xffffffffu : 0u;
    }
}

}  // namespace

void fill_select(cpu::Kernels& table);
void fill_sparsify(cpu::Kernels& table);
void fill_pcb(cpu::Kernels& table);
void fill_consensus(cpu::Kernels& table);
void fill_expert(cpu::Kernels& table);
void fill_geometry(cpu::Kernels& table);
void fill_importance(cpu::Kernels& table);
void fill_evolve(cpu::Kernels& table);

FM_NAMESPACE_END
