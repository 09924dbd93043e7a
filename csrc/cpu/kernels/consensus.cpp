// The merge itself, tile by tile: delta, mask, weight, election, disjoint sum, division, lambda, base, one rounding.
// Every sum runs over the models in the order given; nothing is fused.
#include "fastmerge/consensus.h"

#include "cpu/kernels/sparsify_rows.h"
#include "fastmerge/fused.h"

FM_NAMESPACE_BEGIN
namespace {

using cpu::ConsensusArgs;

struct Workspace {
    float* rows;  // [n, kTile] sparsified deltas, or weighted ones where those are elected on
    float *base, *elected, *mixed, *shares;
    uint32_t *keep, *words;
    BandCursor* cursors;  // [n]
    DellaScratch della;
};

inline Workspace workspace(char* memory, const ConsensusArgs& args) {
    size_t n = static_cast<size_t>(args.models.count);
    Workspace w;
    float* floats = reinterpret_cast<float*>(memory);
    w.rows = floats;
    w.base = floats + kTile * n;
    w.elected = w.base + kTile;
    w.mixed = w.elected + kTile;
    w.shares = w.mixed + kTile;
    w.keep = reinterpret_cast<uint32_t*>(w.shares + kTile);
    memory += aligned(4 * kTile * (n + 6));
    w.words = reinterpret_cast<uint32_t*>(memory);
    memory += aligned(4 * (kTile + kWordSlack));
    w.cursors = reinterpret_cast<BandCursor*>(memory);
    memory += aligned(sizeof(BandCursor) * n);
    bool short_rows = args.rule.method == kDella && args.rule.sorted_row == nullptr;
    w.della = della_scratch(memory, short_rows ? args.rule.row_length : 0);
    return w;
}

inline void multiply_tile(int32_t compute, int count, float factor, float* __restrict values) {
    for (int t = 0; t < count; ++t) values[t] = values[t] * factor;
    round_tile(compute, count, values);
}

// row = weight * the delta of model i after masking and rescaling; weight 1 where the election comes first.
inline void sparsify_tile(const ConsensusArgs& args, int32_t i, int64_t begin, int count, const uint8_t* della_keep,
                          Workspace& w, float weight, float* __restrict row) {
    int32_t compute = args.models.compute;
    delta_tile(args.models, i, begin, count, w.base, row);
    const BandCursor& cursor = w.cursors[i];
    if (args.rule.method == kBand && !cursor.split[0] && !cursor.split[1] && args.scales[i] == 1.0f &&
        compute == kFloat32) {
        uint32_t first = cursor.threshold[0], last = cursor.threshold[1];
        for (int t = 0; t < count; ++t) {
            uint32_t key = magnitude_key(row[t]);
            uint32_t bits = (key < first && key >= last) ? bit_cast<uint32_t>(row[t]) : 0u;
            row[t] = bit_cast<float>(bits) * weight;
        }
        return;
    }
    if (args.rule.method != kKeepAll) {
        keep_tile(args.rule, i, begin, count, row, w.cursors[i], della_keep, w.words, w.keep);
        const uint32_t* __restrict keep = w.keep;
        for (int t = 0; t < count; ++t) row[t] = bit_cast<float>(bit_cast<uint32_t>(row[t]) & keep[t]);
    }
    if (args.scales[i] != 1.0f) multiply_tile(compute, count, args.scales[i], row);
    if (weight != 1.0f) multiply_tile(compute, count, weight, row);
}

inline void sum_rows(int n, int count, const float* rows, float* __restrict sum) {
    for (int t = 0; t < count; ++t) sum[t] = rows[t];
    for (int i = 1; i < n; ++i) {
        const float* __restrict row = rows + static_cast<int64_t>(i) * kTile;
        for (int t = 0; t < count; ++t) sum[t] = sum[t] + row[t];
    }
}

inline void elect(const ConsensusArgs& args, int count, const float* rows, float* __restrict elected) {
    int n = args.models.count;
    if (args.election == kElectFrequency) {
        for (int t = 0; t < count; ++t) elected[t] = sign_of(rows[t]);
        for (int i = 1; i < n; ++i) {
            const float* __restrict row = rows + static_cast<int64_t>(i) * kTile;
            for (int t = 0; t < count; ++t) elected[t] = elected[t] + sign_of(row[t]);
        }
    } else {
        sum_rows(n, count, rows, elected);
    }
    float zero_sign = args.zero_sign;
    for (int t = 0; t < count; ++t) elected[t] = elected_sign(elected[t], zero_sign);
}

// mixed = sum of the weighted deltas that have the elected sign, shares = sum of what they count for.
inline void merge_elected(const ConsensusArgs& args, int count, const float* rows, const float* __restrict elected,
                          float* __restrict mixed, float* __restrict shares) {
    for (int t = 0; t < count; ++t) mixed[t] = 0.0f;
    for (int t = 0; t < count; ++t) shares[t] = 0.0f;
    bool weighted = args.election == kElectWeighted;
    int32_t compute = args.models.compute;
    for (int i = 0; i < args.models.count; ++i) {
        const float* __restrict row = rows + static_cast<int64_t>(i) * kTile;
        float weight = args.weights[i];
        float share = args.divisor == kDivideCount ? 1.0f : weight;
        if (weighted) {
            for (int t = 0; t < count; ++t) {
                bool part = takes_part(row[t], elected[t]);
                mixed[t] = mixed[t] + (part ? row[t] : 0.0f);
                shares[t] = shares[t] + (part ? share : 0.0f);
            }
        } else if (compute == kFloat32) {  // by itself, because a product that may be rounded is not vectorised
            for (int t = 0; t < count; ++t) {
                bool part = takes_part(row[t], elected[t]);
                float value = row[t] * weight;
                mixed[t] = mixed[t] + (part ? value : 0.0f);
                shares[t] = shares[t] + (part ? share : 0.0f);
            }
        } else {
            for (int t = 0; t < count; ++t) {
                bool part = takes_part(row[t], elected[t]);
                float value = round_through(row[t] * weight, compute);
                mixed[t] = mixed[t] + (part ? value : 0.0f);
                shares[t] = shares[t] + (part ? share : 0.0f);
            }
        }
    }
    round_tile(compute, count, mixed);
}

// The usual cases in one loop, with the models' values in registers: weighted or plain deltas vote, float32 throughout.
// Divides, too, where the divisor is the sum of the weights that took part. kWeighed: the rows are weighted already.
template <int kModels, bool kWeighed>
inline void merge_voted(const ConsensusArgs& args, int count, const float* __restrict rows, float* __restrict mixed) {
    float zero_sign = args.zero_sign;
    bool divide = args.divisor == kDivideWeights || args.divisor == kDivideCount;
    const float* row[kModels];
    float weight[kModels], counted[kModels];
    for (int i = 0; i < kModels; ++i) {
        row[i] = rows + static_cast<int64_t>(i) * kTile;
        weight[i] = args.weights[i];
        counted[i] = args.divisor == kDivideCount ? 1.0f : weight[i];
    }
    for (int64_t t = 0; t < count; ++t) {
        float x[kModels];
        for (int i = 0; i < kModels; ++i) x[i] = row[i][t];
        float sum = x[0];
        for (int i = 1; i < kModels; ++i) sum = sum + x[i];
        float elected = elected_sign(sum, zero_sign);
        float total = 0.0f, share = 0.0f;
        for (int i = 0; i < kModels; ++i) {
            bool part = takes_part(x[i], elected);
            float value = kWeighed ? x[i] : x[i] * weight[i];
            total = total + (part ? value : 0.0f);
            share = share + (part ? counted[i] : 0.0f);
        }
        float divisor = !divide || share == 0.0f ? 1.0f : share;
        mixed[t] = total / divisor;
    }
}

template <bool kWeighed>
inline bool merge_few(const ConsensusArgs& args, int count, const float* rows, float* mixed) {
    switch (args.models.count) {
        case 2:
            merge_voted<2, kWeighed>(args, count, rows, mixed);
            return true;
        case 3:
            merge_voted<3, kWeighed>(args, count, rows, mixed);
            return true;
        case 4:
            merge_voted<4, kWeighed>(args, count, rows, mixed);
            return true;
        default:
            return false;
    }
}

inline bool merge_in_one_loop(const ConsensusArgs& args, int count, const float* rows, float* mixed) {
    if (args.models.compute != kFloat32 || args.divisor == kDivideValue) return false;
    if (args.election == kElectWeighted) return merge_few<true>(args, count, rows, mixed);
    return args.election == kElectTotal && merge_few<false>(args, count, rows, mixed);
}

inline void divide_tile(const ConsensusArgs& args, int count, float* __restrict shares, float* __restrict mixed) {
    int32_t compute = args.models.compute;
    bool per_element = args.election != kElectNone && (args.divisor == kDivideWeights || args.divisor == kDivideCount);
    if (per_element) {
        if (args.divisor == kDivideWeights) round_tile(compute, count, shares);
        for (int t = 0; t < count; ++t) {
            float divisor = shares[t] == 0.0f ? 1.0f : shares[t];
            mixed[t] = mixed[t] / divisor;
        }
    } else if (args.divisor != kDivideNone) {
        float divisor = args.divisor_value;
        for (int t = 0; t < count; ++t) mixed[t] = mixed[t] / divisor;
    } else {
        return;
    }
    round_tile(compute, count, mixed);
}

inline void finish_tile(const ConsensusArgs& args, int64_t begin, int count, Workspace& w) {
    int32_t compute = args.models.compute;
    if (args.lambda != 1.0f) multiply_tile(compute, count, args.lambda, w.mixed);
    if (args.base.data != nullptr) {
        load_rounded(args.base, compute, begin, count, w.base);
        const float* __restrict base = w.base;
        float* __restrict mixed = w.mixed;
        for (int t = 0; t < count; ++t) mixed[t] = base[t] + mixed[t];
        round_tile(compute, count, mixed);
    }
    store_tile(args.out, args.out_dtype, begin, count, w.mixed);
}

inline void merge_tile(const ConsensusArgs& args, int64_t begin, int count, int64_t segment, Workspace& w) {
    int n = args.models.count;
    int32_t compute = args.models.compute;
    bool weigh_first = args.election == kElectNone || args.election == kElectWeighted;
    base_tile(args.models, begin, count, w.base);
    for (int i = 0; i < n; ++i) {
        float* row = w.rows + static_cast<int64_t>(i) * kTile;
        const uint8_t* della_keep = w.della.keep + i * args.rule.row_length + (begin - segment);
        sparsify_tile(args, i, begin, count, della_keep, w, weigh_first ? args.weights[i] : 1.0f, row);
    }
    if (!merge_in_one_loop(args, count, w.rows, w.mixed)) {
        if (args.election == kElectNone) {
            sum_rows(n, count, w.rows, w.mixed);
            round_tile(compute, count, w.mixed);
        } else {
            elect(args, count, w.rows, w.elected);
            merge_elected(args, count, w.rows, w.elected, w.mixed, w.shares);
        }
        divide_tile(args, count, w.shares, w.mixed);
    }
    finish_tile(args, begin, count, w);
}

void consensus(const ConsensusArgs* args, int64_t begin, int64_t end, void* scratch) {
    const Rule& rule = args->rule;
    Workspace w = workspace(static_cast<char*>(scratch), *args);
    bool short_rows = rule.method == kDella && rule.sorted_row == nullptr;
    int64_t segment_end = begin;
    for (int64_t segment = begin; segment < end; segment = segment_end) {
        segment_end = short_rows ? segment + rule.row_length : smaller(end, segment - segment % kTieBlock + kTieBlock);
        for (int32_t i = 0; i < args->models.count; ++i) {
            if (rule.method == kBand) band_open(rule, i, segment, w.cursors[i]);
            if (short_rows && rule.density[i] < 1.0 && rule.density[i] > 0.0) {
                della_row(args->models, rule, i, segment, w.della, w.della.keep + i * rule.row_length);
            }
        }
        for (int64_t at = segment; at < segment_end; at += kTile) {
            merge_tile(*args, at, static_cast<int>(smaller(kTile, segment_end - at)), segment, w);
        }
    }
}

void fused_sum(const cpu::Models* models, const float* weights, int64_t begin, int64_t end, float* out) {
    float x[kTile], total[kTile];
    for (int64_t at = begin; at < end; at += kTile) {
        int count = static_cast<int>(smaller(kTile, end - at));
        for (int t = 0; t < count; ++t) total[t] = 0.0f;
        for (int32_t m = 0; m < models->count; ++m) {
            load_tile(models->models[m], at, count, x);
            float factor = weights[m];
            for (int t = 0; t < count; ++t) total[t] = multiplied_and_added(total[t], x[t], factor);
        }
        store_tile(out, kFloat32, at, count, total);
    }
}

}  // namespace

void fill_consensus(cpu::Kernels& table) {
    table.consensus = consensus;
    table.fused_sum = fused_sum;
}

FM_NAMESPACE_END

extern "C" const fastmerge::cpu::Kernels* FASTMERGE_TABLE() {
    static fastmerge::cpu::Kernels table;
    table.name = FASTMERGE_TARGET_NAME;
    fastmerge::fill_select(table);
    fastmerge::fill_sparsify(table);
    fastmerge::fill_pcb(table);
    fastmerge::fill_consensus(table);
    fastmerge::fill_expert(table);
    fastmerge::fill_geometry(table);
    fastmerge::fill_importance(table);
    fastmerge::fill_evolve(table);
    return &table;
}
