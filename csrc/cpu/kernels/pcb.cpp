// Kernels of PCB-Merging: scores, what is counted and summed of them, and the merge that they weigh.
//
// A tile's scores are made again for every sweep rather than kept. Each step is a loop over the tile that reads and
// writes one or two rows in first-level cache; the exponentials and divisions in it take longer than that.
#include "fastmerge/pcb.h"

#include "cpu/kernels/select.h"
#include "fastmerge/exact_sum.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

FM_NAMESPACE_BEGIN
namespace {

using cpu::PcbApplyArgs;
using cpu::PcbArgs;
using cpu::PcbWindow;

// Elements of a tile: fewer where there are many rows, so that those fit the second-level cache.
inline int pcb_tile(int32_t models) {
    if (models <= 16) return kTile;
    int tile = 8192 / models / 64 * 64;
    return tile < 64 ? 64 : tile;
}

struct Rows {
    int tile;
    float* value;     // [n] deltas, in the end what is merged of them
    float* score;     // [n] factors of the score, in the end the score
    float* inter;     // [n]
    float* directed;  // [n]
    float *base, *together, *divisor;

    float* row(float* rows, int32_t i) const { return rows + static_cast<int64_t>(i) * tile; }
};

inline Rows rows_in(void* scratch, int32_t models) {
    Rows rows;
    rows.tile = pcb_tile(models);
    int64_t all = static_cast<int64_t>(models) * rows.tile;
    rows.value = static_cast<float*>(scratch);
    rows.score = rows.value + all;
    rows.inter = rows.score + all;
    rows.directed = rows.inter + all;
    rows.base = rows.directed + all;
    rows.together = rows.base + rows.tile;
    rows.divisor = rows.together + rows.tile;
    return rows;
}

size_t pcb_scratch(int32_t models) {
    return sizeof(float) * static_cast<size_t>(pcb_tile(models)) * (4 * static_cast<size_t>(models) + 3);
}

inline void delta_rows(const Models& models, int64_t begin, int count, const Rows& rows) {
    base_tile(models, begin, count, rows.base);
    for (int32_t i = 0; i < models.count; ++i) delta_tile(models, i, begin, count, rows.base, rows.row(rows.value, i));
}

// The first term starts a sum, so that a sum of -0 alone stays one.
inline void add_tile(bool first, int count, const float* __restrict term, float* __restrict sum) {
    if (first) {
        memcpy(sum, term, sizeof(float) * static_cast<size_t>(count));
    } else {
        for (int t = 0; t < count; ++t) sum[t] = sum[t] + term[t];
    }
}

// What exp's argument is made with, and one row's clip.
struct Clip {
    float low, high;
    Norm norm;
    float models, shift;
};

inline Clip clip_of(const PcbArgs& args, int32_t i) {
    Clip clip;
    clip.low = args.clip[2 * i];
    clip.high = args.clip[2 * i + 1];
    clip.norm = norm_of(clip.low, clip.high);
    clip.models = static_cast<float>(args.models.count);
    clip.shift = pcb_shift(args.models.count);
    return clip;
}

FM_INLINE float clipped(float delta, const Clip& clip) {
    return between(bit_cast<float>(bit_cast<uint32_t>(delta) & 0x7fffffffu), clip.low, clip.high);
}

FM_INLINE float strength(float z, const Clip& clip) { return exp_of((z * z) * clip.models - clip.shift); }

// script: the scores, from the deltas and their sum; the deltas are clipped in passing.
inline void script_row(const Clip clip, int count, const float* __restrict together, float* __restrict value,
                       float* __restrict score) {
    for (int t = 0; t < count; ++t) {
        float delta = value[t];
        float magnitude = clipped(delta, clip);
        float z = normalised(magnitude, clip.norm);
        score[t] = strength(z, clip) * tanh_of(delta * together[t]) + 0.0f;
        value[t] = direction(delta) * magnitude;
    }
}

// vision, vision_es: the exponential factor of the score, and the signed z of the row.
inline void directed_row(const Clip clip, int count, const float* __restrict value, float* __restrict score,
                         float* __restrict directed) {
    for (int t = 0; t < count; ++t) {
        float z = normalised(clipped(value[t], clip), clip.norm);
        score[t] = strength(z, clip);
        directed[t] = direction(value[t]) * z;
    }
}

inline void vision_row(const Clip clip, int count, const float* __restrict together, float* __restrict value,
                       float* __restrict score) {
    for (int t = 0; t < count; ++t) {
        float delta = value[t];
        score[t] = score[t] * tanh_of(delta * together[t]) + 0.0f;
        value[t] = direction(delta) * clipped(delta, clip);
    }
}

inline void vision_es_row(const Clip clip, int count, const float* __restrict inter, float* __restrict value,
                          float* __restrict score) {
    for (int t = 0; t < count; ++t) {
        score[t] = score[t] * inter[t] + 0.0f;
        value[t] = direction(value[t]) * clipped(value[t], clip);
    }
}

// Adds what a pair of rows has in common to both; term(t) is made once. Rows above the first begin with row 0's terms.
template <class Term>
inline void add_to_pair(int32_t i, int32_t j, int count, float* rows, int64_t tile, const Term& term) {
    float* __restrict one = rows + i * tile;
    float* __restrict other = rows + j * tile;
    if (j == 0) {
        for (int t = 0; t < count; ++t) one[t] = term(t);
    } else if (i == j) {
        for (int t = 0; t < count; ++t) one[t] = one[t] + term(t);
    } else if (i == 0) {
        for (int t = 0; t < count; ++t) {
            float shared = term(t);
            one[t] = one[t] + shared;
            other[t] = shared;
        }
    } else {
        for (int t = 0; t < count; ++t) {
            float shared = term(t);
            one[t] = one[t] + shared;
            other[t] = other[t] + shared;
        }
    }
}

inline void script_scores(const PcbArgs& args, int count, const Rows& rows) {
    int32_t n = args.models.count;
    float* __restrict together = rows.together;
    for (int32_t i = 0; i < n; ++i) add_tile(i == 0, count, rows.row(rows.value, i), together);
    for (int t = 0; t < count; ++t) together[t] = between(together[t], -kLargestSum, kLargestSum);
    for (int32_t i = 0; i < n; ++i)
        script_row(clip_of(args, i), count, together, rows.row(rows.value, i), rows.row(rows.score, i));
}

inline void vision_scores(const PcbArgs& args, int count, const Rows& rows) {
    int32_t n = args.models.count;
    for (int32_t i = 0; i < n; ++i) {
        directed_row(clip_of(args, i), count, rows.row(rows.value, i), rows.row(rows.score, i), rows.directed);
        add_tile(i == 0, count, rows.directed, rows.together);
    }
    for (int32_t i = 0; i < n; ++i)
        vision_row(clip_of(args, i), count, rows.together, rows.row(rows.value, i), rows.row(rows.score, i));
}

inline void vision_es_scores(const PcbArgs& args, int count, const Rows& rows) {
    int32_t n = args.models.count;
    for (int32_t i = 0; i < n; ++i) {
        float* directed = rows.row(rows.directed, i);
        directed_row(clip_of(args, i), count, rows.row(rows.value, i), rows.row(rows.score, i), directed);
    }
    for (int32_t i = 0; i < n; ++i) {
        const float* __restrict u = rows.row(rows.directed, i);
        for (int32_t j = i; j < n; ++j) {
            const float* __restrict v = rows.row(rows.directed, j);
            add_to_pair(i, j, count, rows.inter, rows.tile, [=](int t) { return tanh_of(u[t] * v[t]); });
        }
    }
    for (int32_t i = 0; i < n; ++i) {
        const float* inter = rows.row(rows.inter, i);
        vision_es_row(clip_of(args, i), count, inter, rows.row(rows.value, i), rows.row(rows.score, i));
    }
}

// paper: what the two deltas of a pair have in common, as a number of [0, 1].
FM_INLINE float pair_norm(float x, float y, Norm norm) {
    return normalised(between(x * y, -kLargestProduct, kLargestProduct), norm);
}

// Calls work(pair, i, j) for the pairs i <= j in their order.
template <class Work>
inline void over_pairs(int32_t models, const Work& work) {
    int64_t pair = 0;
    for (int32_t i = 0; i < models; ++i)
        for (int32_t j = i; j < models; ++j) work(pair++, i, j);
}

inline void paper_scores(const PcbArgs& args, int count, const Rows& rows) {
    int32_t n = args.models.count;
    over_pairs(n, [&](int64_t pair, int32_t i, int32_t j) {
        Norm norm = norm_of(args.extremes[2 * pair], args.extremes[2 * pair + 1]);
        float mean = args.means[n + pair];
        const float* __restrict x = rows.row(rows.value, i);
        const float* __restrict y = rows.row(rows.value, j);
        add_to_pair(i, j, count, rows.inter, rows.tile,
                    [=](int t) { return exp_of(pair_norm(x[t], y[t], norm)) / mean; });
        if (i != j) return;
        float models = static_cast<float>(n), shift = pcb_shift(n), own_mean = args.means[i];
        float* __restrict score = rows.row(rows.score, i);
        for (int t = 0; t < count; ++t) score[t] = exp_of(pair_norm(x[t], x[t], norm) * models - shift) / own_mean;
    });
    for (int32_t i = 0; i < n; ++i) {
        const float* __restrict inter = rows.row(rows.inter, i);
        float* __restrict score = rows.row(rows.score, i);
        for (int t = 0; t < count; ++t) score[t] = score[t] * inter[t] + 0.0f;
    }
}

inline void score_rows(const PcbArgs& args, int64_t begin, int count, const Rows& rows) {
    delta_rows(args.models, begin, count, rows);
    if (args.variant == kPcbScript) {
        script_scores(args, count, rows);
    } else if (args.variant == kPcbVision) {
        vision_scores(args, count, rows);
    } else if (args.variant == kPcbVisionEs) {
        vision_es_scores(args, count, rows);
    } else {
        paper_scores(args, count, rows);
    }
}

// Calls work(at, count) for the tiles of a range.
template <class Work>
inline void over_tiles(int64_t begin, int64_t end, int tile, const Work& work) {
    for (int64_t at = begin; at < end; at += tile) work(at, static_cast<int>(smaller(tile, end - at)));
}

inline void canonical_tile(int count, const float* __restrict values, float* __restrict out) {
    for (int t = 0; t < count; ++t) out[t] = canonical(values[t]);
}

void pcb_scores(const PcbArgs* args, int64_t begin, int64_t end, void* scratch, float* out, int64_t stride) {
    Rows rows = rows_in(scratch, args->models.count);
    over_tiles(begin, end, rows.tile, [&](int64_t at, int count) {
        score_rows(*args, at, count, rows);
        for (int32_t i = 0; i < args->models.count; ++i)
            canonical_tile(count, rows.row(rows.score, i), out + i * stride + (at - begin));
    });
}

// Moves the keys from `low` on, `width` (at least 1) of them, to the front; returns how many there are.
inline int compress_keys(uint32_t low, uint32_t width, int count, uint32_t* keys) {
    int kept = 0, t = 0;
#if defined(__AVX512F__)
    __m512i lows = _mm512_set1_epi32(static_cast<int>(low)), last = _mm512_set1_epi32(static_cast<int>(width - 1));
    for (; t + 16 <= count; t += 16) {
        __m512i k = _mm512_loadu_si512(keys + t);
        __mmask16 in = _mm512_cmple_epu32_mask(_mm512_sub_epi32(k, lows), last);
        _mm512_storeu_si512(keys + kept, _mm512_maskz_compress_epi32(in, k));
        kept += __builtin_popcount(in);
    }
#endif
    for (; t < count; ++t) {
        uint32_t k = keys[t];
        keys[kept] = k;
        kept += (k - low) < width;
    }
    return kept;
}

// Equal neighbours are added at once: where most scores of a row are the same, the threads would otherwise wait for one
// another at a single counter.
inline void count_keys(uint32_t low, int count, const uint32_t* keys, int64_t* counts) {
    for (int t = 0; t < count;) {
        int start = t;
        while (t < count && keys[t] == keys[start]) ++t;
        __atomic_fetch_add(counts + (keys[start] - low), static_cast<int64_t>(t - start), __ATOMIC_RELAXED);
    }
}

void pcb_window(const PcbArgs* args, int64_t begin, int64_t end, void* scratch, const PcbWindow* window) {
    Rows rows = rows_in(scratch, args->models.count);
    over_tiles(begin, end, rows.tile, [&](int64_t at, int count) {
        score_rows(*args, at, count, rows);
        for (int32_t i = 0; i < args->models.count; ++i) {
            uint32_t keys[kTile];
            const float* __restrict score = rows.row(rows.score, i);
            uint32_t most = 0;
            for (int t = 0; t < count; ++t) keys[t] = score_key(score[t]);
            for (int t = 0; t < count; ++t) most = keys[t] > most ? keys[t] : most;
            window->highest[i] = most > window->highest[i] ? most : window->highest[i];
            int64_t low = window->low[i];
            if (low > most) continue;
            int64_t width = smaller(window->width, kScoreKeyEnd - low);
            if (low + width <= most) {
                uint32_t last = static_cast<uint32_t>(low + width - 1), above = 0;
                for (int t = 0; t < count; ++t) above += keys[t] > last;
                window->above[i] += above;
            }
            int kept = compress_keys(static_cast<uint32_t>(low), static_cast<uint32_t>(width), count, keys);
            count_keys(static_cast<uint32_t>(low), kept, keys, window->counts + i * (1 + window->width) + 1);
        }
    });
}

// Widens [least, most] by the products of two rows, NaN left out; -0 counts as +0.
inline void widen_extremes(int count, const float* __restrict x, const float* __restrict y, int32_t* extremes) {
    int32_t low[kTile], high[kTile];
    for (int t = 0; t < count; ++t) {
        float product = x[t] * y[t];
        int32_t ordered = ordered_bits(between(product, -kLargestProduct, kLargestProduct) + 0.0f);
        low[t] = product == product ? ordered : 0x7fffffff;
        high[t] = product == product ? ordered : -0x7fffffff;
    }
    int32_t least = extremes[0], most = extremes[1];
    for (int t = 0; t < count; ++t) {
        least = low[t] < least ? low[t] : least;
        most = high[t] > most ? high[t] : most;
    }
    extremes[0] = least;
    extremes[1] = most;
}

void pcb_extremes(const Models* models, int64_t begin, int64_t end, void* scratch, int32_t* ordered_extremes) {
    Rows rows = rows_in(scratch, models->count);
    over_tiles(begin, end, rows.tile, [&](int64_t at, int count) {
        delta_rows(*models, at, count, rows);
        over_pairs(models->count, [&](int64_t pair, int32_t i, int32_t j) {
            widen_extremes(count, rows.row(rows.value, i), rows.row(rows.value, j), ordered_extremes + 2 * pair);
        });
    });
}

// Adds values that are not negative, exactly; what is not finite is left out. Within 26 binades of the tile's largest
// value, mantissas shifted to a common unit fit 51 bits and a tile's sum 60, so one 64-bit lane per element does; the
// rest are added one by one.
inline void sum_tile(int count, const float* __restrict values, ExactSum& sum) {
    uint32_t key[kTile];
    uint32_t most = 0;
    for (int t = 0; t < count; ++t) {
        uint32_t k = bit_cast<uint32_t>(values[t]) & 0x7fffffffu;
        key[t] = k >= kInfBits ? 0u : k;
    }
    for (int t = 0; t < count; ++t) most = key[t] > most ? key[t] : most;
    int top = magnitude_place(most);
    int unit = top > 26 ? top - 26 : 0;
    uint64_t total = 0;
    uint32_t tiny = 0;
    for (int t = 0; t < count; ++t) {
        int32_t exponent = static_cast<int32_t>(key[t] >> 23);
        int32_t place = exponent > 0 ? exponent - 1 : 0;
        uint32_t below = place < unit ? 0xffffffffu : 0u;
        uint32_t mantissa = magnitude_mantissa(key[t]);
        tiny |= below & mantissa;
        total += static_cast<uint64_t>(mantissa & ~below) << (static_cast<uint32_t>(place - unit) & 63u);
    }
    exact_add(sum, total, unit);
    if (tiny == 0) return;
    for (int t = 0; t < count; ++t) {
        int place = magnitude_place(key[t]);
        if (place < unit) exact_add(sum, magnitude_mantissa(key[t]), place);
    }
}

void pcb_sums(const PcbArgs* args, int64_t begin, int64_t end, void* scratch, uint64_t* limbs) {
    int32_t n = args->models.count;
    Rows rows = rows_in(scratch, n);
    ExactSum* sums = reinterpret_cast<ExactSum*>(limbs);
    float models = static_cast<float>(n), shift = pcb_shift(n);
    over_tiles(begin, end, rows.tile, [&](int64_t at, int count) {
        delta_rows(args->models, at, count, rows);
        over_pairs(n, [&](int64_t pair, int32_t i, int32_t j) {
            Norm norm = norm_of(args->extremes[2 * pair], args->extremes[2 * pair + 1]);
            const float* __restrict x = rows.row(rows.value, i);
            const float* __restrict y = rows.row(rows.value, j);
            float* __restrict term = rows.together;
            for (int t = 0; t < count; ++t) term[t] = exp_of(pair_norm(x[t], y[t], norm));
            sum_tile(count, term, sums[n + pair]);
            if (i != j) return;
            for (int t = 0; t < count; ++t) term[t] = exp_of(pair_norm(x[t], x[t], norm) * models - shift);
            sum_tile(count, term, sums[i]);
        });
    });
    for (int64_t i = 0; i < n + pcb_pairs(n); ++i) exact_carry(sums[i]);
}

// Scores become shares: of the released variants (b - start) / (most - start) within [0, 1], of the paper b itself.
inline void share_row(int32_t variant, float start, float most, int count, float* __restrict score) {
    if (variant == kPcbPaper) {
        for (int t = 0; t < count; ++t) score[t] = score[t] >= start ? score[t] : 0.0f;
    } else if (most > start) {
        float width = most - start;
        for (int t = 0; t < count; ++t) score[t] = (between(score[t], start, most) - start) / width;
    } else {
        for (int t = 0; t < count; ++t) score[t] = 0.0f;
    }
}

inline void weigh_row(bool first, float weight, int count, const float* __restrict value, const float* __restrict share,
                      float* __restrict mixed, float* __restrict divisor) {
    if (first) {
        for (int t = 0; t < count; ++t) {
            mixed[t] = (value[t] * share[t]) * weight;
            divisor[t] = share[t];
        }
    } else {
        for (int t = 0; t < count; ++t) {
            mixed[t] = mixed[t] + (value[t] * share[t]) * weight;
            divisor[t] = divisor[t] + share[t];
        }
    }
}

inline void divide_tile(int32_t variant, int count, const float* __restrict divisor, float* __restrict mixed) {
    if (variant == kPcbPaper) {
        for (int t = 0; t < count; ++t) mixed[t] = divisor[t] == 0.0f ? 0.0f : mixed[t] / divisor[t];
    } else {
        for (int t = 0; t < count; ++t)
            mixed[t] = mixed[t] / (divisor[t] < kSmallestDivisor ? kSmallestDivisor : divisor[t]);
    }
}

void pcb_apply(const PcbApplyArgs* args, int64_t begin, int64_t end, void* scratch) {
    const PcbArgs& scores = args->scores;
    const Models& models = scores.models;
    Rows rows = rows_in(scratch, models.count);
    float* __restrict mixed = rows.together;
    const float* __restrict base = rows.base;
    over_tiles(begin, end, rows.tile, [&](int64_t at, int count) {
        score_rows(scores, at, count, rows);
        for (int32_t i = 0; i < models.count; ++i) {
            float* share = rows.row(rows.score, i);
            share_row(scores.variant, scores.thresholds[2 * i], scores.thresholds[2 * i + 1], count, share);
            if (args->scale != nullptr) canonical_tile(count, share, args->scale + i * models.numel + at);
            weigh_row(i == 0, args->weights[i], count, rows.row(rows.value, i), share, mixed, rows.divisor);
        }
        divide_tile(scores.variant, count, rows.divisor, mixed);
        if (models.base.data != nullptr)
            for (int t = 0; t < count; ++t) mixed[t] = base[t] + mixed[t];
        store_tile(args->out, args->out_dtype, at, count, mixed);
    });
}

void function(int32_t which, const float* x, int64_t count, float* out) {
    if (which == 0) {
        for (int64_t i = 0; i < count; ++i) out[i] = exp_of(x[i]);
    } else if (which == 1) {
        for (int64_t i = 0; i < count; ++i) out[i] = tanh_of(x[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) out[i] = log_of(x[i]);
    }
}

}  // namespace

void fill_pcb(cpu::Kernels& table) {
    table.pcb_scratch = pcb_scratch;
    table.pcb_scores = pcb_scores;
    table.pcb_window = pcb_window;
    table.pcb_extremes = pcb_extremes;
    table.pcb_sums = pcb_sums;
    table.pcb_apply = pcb_apply;
    table.function = function;
}

FM_NAMESPACE_END
