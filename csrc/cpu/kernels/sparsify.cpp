// Kernels of the sparsify family: exact L1 masses of deltas, all and kept; and what is kept, as bits.
#include "cpu/kernels/mass.h"
#include "cpu/kernels/sparsify_rows.h"

FM_NAMESPACE_BEGIN
namespace {

using cpu::MassSums;

size_t scratch_bytes(int32_t models, int32_t method, int64_t row_length) {
    size_t tiles = aligned(4 * kTile * static_cast<size_t>(models + 6)) + aligned(4 * (kTile + kWordSlack)) +
                   aligned(sizeof(BandCursor) * static_cast<size_t>(models)) + 64;
    return tiles + (method == kDella ? della_bytes(models, row_length) : 0);
}

// Calls work(at, tile, delta, keep) for each tile of [begin, end), and row_done() now and then between tiles.
template <class Work, class RowDone>
inline void over_kept(const Models& models, const Rule& rule, int32_t m, int64_t begin, int64_t end, void* scratch,
                      const Work& work, const RowDone& row_done) {
    float base[kTile], delta[kTile];
    uint32_t keep[kTile], buffer[kTile + kWordSlack];
    bool short_rows = rule.method == kDella && rule.sorted_row == nullptr;
    DellaScratch della = della_scratch(static_cast<char*>(scratch), short_rows ? rule.row_length : 0);
    BandCursor cursor = {};
    bool decide = short_rows && rule.density[m] < 1.0 && rule.density[m] > 0.0;
    int64_t segment_end = begin;
    for (int64_t segment = begin; segment < end; segment = segment_end) {
        segment_end = short_rows ? segment + rule.row_length : smaller(end, segment - segment % kTieBlock + kTieBlock);
        if (decide) della_row(models, rule, m, segment, della, della.keep);
        if (rule.method == kBand) band_open(rule, m, segment, cursor);
        for (int64_t at = segment; at < segment_end; at += kTile) {
            int tile = static_cast<int>(smaller(kTile, segment_end - at));
            base_tile(models, at, tile, base);
            delta_tile(models, m, at, tile, base, delta);
            keep_tile(rule, m, at, tile, delta, cursor, della.keep + (at - segment), buffer, keep);
            work(at, tile, delta, keep);
        }
        row_done();
    }
}

void mass(const Models* models, const Rule* rule, int64_t begin, int64_t end, void* scratch, MassSums* sums) {
    for (int32_t m = 0; m < models->count; ++m) {
        ExactSum all, kept;
        exact_clear(all);
        exact_clear(kept);
        over_kept(
            *models, *rule, m, begin, end, scratch,
            [&](int64_t, int tile, const float* delta, const uint32_t* keep) {
                mass_tile(tile, delta, keep, all, kept);
            },
            [&] {
                exact_carry(all);
                exact_carry(kept);
            });
        for (int i = 0; i < kLimbs; ++i) {
            sums[m].all[i] = all.limb[i];
            sums[m].kept[i] = kept.limb[i];
        }
    }
}

void decide(const Models* models, const Rule* rule, int64_t begin, int64_t end, void* scratch, uint8_t* masks) {
    bool short_rows = rule->method == kDella && rule->sorted_row == nullptr;
    for (int32_t m = 0; m < models->count; ++m) {
        uint8_t* mask = masks + m * ((models->numel + 7) / 8);
        if (short_rows && rule->density[m] < 1.0 && rule->density[m] > 0.0) {
            DellaScratch della = della_scratch(static_cast<char*>(scratch), rule->row_length);
            for (int64_t row = begin; row < end; row += rule->row_length) {
                della_row(*models, *rule, m, row, della, della.keep);
                set_bits(della.keep, row, rule->row_length, mask);
            }
            continue;
        }
        over_kept(
            *models, *rule, m, begin, end, scratch,
            [&](int64_t at, int tile, const float*, const uint32_t* keep) {
                uint8_t kept[kTile];
                for (int t = 0; t < tile; ++t) kept[t] = static_cast<uint8_t>(keep[t] & 1u);
                set_bits(kept, at, tile, mask);
            },
            [] {});
    }
}

}  // namespace

void fill_sparsify(cpu::Kernels& table) {
    table.scratch_bytes = scratch_bytes;
    table.mass = mass;
    table.decide = decide;
}

FM_NAMESPACE_END
