// How much places matter, and the merges of NearSwap and RAM. A thread has eight elements of a tile, and models one
// after the other, of which the next is on its way while one is worked on. A row is taken by a block, whose sums are
// halved in shared memory, or where that has no room for half a row in memory that is handed over.
#include "fastmerge/importance.h"

#include "cuda/api.h"
#include "cuda/tile.h"

FM_NAMESPACE_BEGIN
namespace cuda {
namespace {

// Calls each(m, delta) with elements at .. at + 7 of every model's delta, model by model; past the end they are 0.
template <class Each>
FM_DEVICE void each_delta(const Models& models, int64_t at, const float* base, const Each& each) {
    Raw<true> next;
    load_raw<true>(model_of(models, 0), at, models.numel, false, next);
    FM_ROLLED
    for (int32_t m = 0; m < models.count; ++m) {
        Raw<true> raw = next;
        if (m + 1 < models.count) load_raw<true>(model_of(models, m + 1), at, models.numel, false, next);
        float delta[kEach];
        widen_raw<true>(raw, models.dtype[m], delta);
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) delta[t] = at + t < models.numel ? delta[t] - base[t] : 0.0f;
        each(m, delta);
    }
}

// --- the merges

struct Merge {
    Models models;
    float factor[kMostModels];
    float number;  // NearSwap's t, RAM's epsilon
    void* out;
    int32_t dtype;
};

FM_KERNEL(kThreads) nearswap_kernel(FM_LARGE Merge merge) {
    const Models& models = merge.models;
    int64_t at = block() * kTile + thread() * kEach;
    if (at >= models.numel) return;
    Raw<true> raw, raw_base;
    load_raw<true>(model_of(models, 0), at, models.numel, false, raw);
    load_raw<true>(models.base, at, models.numel, false, raw_base);
    float x[kEach], base[kEach];
    widen_raw<true>(raw, models.dtype[0], x);
    widen_raw<true>(raw_base, models.base.dtype, base);
    FM_UNROLL
    for (int t = 0; t < kEach; ++t) x[t] = nearswap_of(base[t], x[t], merge.number);
    store8(merge.out, merge.dtype, at, models.numel, x);
}

FM_KERNEL(kThreads) ram_apply_kernel(FM_LARGE Merge merge) {
    const Models& models = merge.models;
    int64_t at = block() * kTile + thread() * kEach;
    if (at >= models.numel) return;
    float base[kEach], changed[kEach], total[kEach], factor[kEach];
    load8(models.base, at, models.numel, base);
    FM_UNROLL
    for (int t = 0; t < kEach; ++t) changed[t] = total[t] = factor[t] = -0.0f;  // to which adding is exact
    each_delta(models, at, base, [&](int32_t m, const float* delta) {
        float own = merge.factor[m];
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) {
            bool part = is_changed(delta[t], merge.number);
            changed[t] = changed[t] + (part ? 1.0f : 0.0f);
            total[t] = total[t] + (part ? delta[t] : 0.0f);
            factor[t] = factor[t] + (part ? own : 0.0f);
        }
    });
    FM_UNROLL
    for (int t = 0; t < kEach; ++t) total[t] = base[t] + ram_mean(changed[t], total[t], factor[t]);
    store8(merge.out, merge.dtype, at, models.numel, total);
}

// --- counts

struct Counts {
    Models models;
    float epsilon;
    int64_t part;  // elements of a block, a multiple of a tile
    int64_t* counts;
};

struct CountsShared {
    uint32_t of_block[2 * kMostModels];
};

FM_KERNEL(kThreads) ram_counts_kernel(FM_LARGE Counts args) {
    const Models& models = args.models;
    CountsShared& mine = shared<CountsShared>();
    int numbers = 2 * models.count;
    if (thread() < numbers) mine.of_block[thread()] = 0;
    sync();
    int64_t begin = block() * args.part, end = smaller(models.numel, begin + args.part);
    // Whole warps go on past the end, where no delta takes part.
    for (int64_t start = begin; start < end; start += kTile) {
        int64_t at = start + thread() * kEach;
        float base[kEach];
        load8(models.base, at, models.numel, base);
        int32_t changed[kEach] = {0, 0, 0, 0, 0, 0, 0, 0};
        each_delta(models, at, base, [&](int32_t, const float* delta) {
            FM_UNROLL
            for (int t = 0; t < kEach; ++t) changed[t] += is_changed(delta[t], args.epsilon) ? 1 : 0;
        });
        each_delta(models, at, base, [&](int32_t m, const float* delta) {
            uint32_t shared_and_alone = 0;  // a half each, of at most 256 elements of a warp
            FM_UNROLL
            for (int t = 0; t < kEach; ++t) {
                uint32_t part = is_changed(delta[t], args.epsilon) ? 1u : 0u;
                shared_and_alone += changed[t] > 1 ? part : part << 16;
            }
            shared_and_alone = sum_of_warp(shared_and_alone);
            if (lane() == 0 && shared_and_alone != 0) {
                atomic_add(&mine.of_block[2 * m], shared_and_alone & 0xffffu);
                atomic_add(&mine.of_block[2 * m + 1], shared_and_alone >> 16);
            }
        });
    }
    sync();
    if (thread() >= numbers) return;
    uint32_t found = mine.of_block[thread()];
    if (found > 0) atomic_add(&args.counts[thread()], static_cast<int64_t>(found));
}
static_assert(2 * kMostModels <= kThreads, "a thread for each count");

// --- variances

struct Found {
    Models models;
    const float* divergence;  // of each row
    int64_t width;
    float* out;
};

FM_KERNEL_RESIDENT(kThreads, 3) model_variance_kernel(FM_LARGE Found args) {
    const Models& models = args.models;
    int64_t at = block() * kTile + thread() * kEach;
    if (at >= models.numel) return;
    float base[kEach], first[kEach], mean[kEach], spread[kEach];
    float number = static_cast<float>(models.count);
    load8(models.base, at, models.numel, base);
    load8(model_of(models, 0), at, models.numel, first);
    FM_UNROLL
    for (int t = 0; t < kEach; ++t) {
        first[t] = first[t] - base[t];
        mean[t] = spread[t] = -0.0f;
    }
    each_delta(models, at, base, [&](int32_t, const float* delta) {
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) mean[t] = mean[t] + (delta[t] - first[t]);
    });
    FM_UNROLL
    for (int t = 0; t < kEach; ++t) mean[t] = mean[t] / number;
    each_delta(models, at, base, [&](int32_t, const float* delta) {
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) {
            float apart = (delta[t] - first[t]) - mean[t];
            spread[t] = spread[t] + apart * apart;
        }
    });
    FM_UNROLL
    for (int t = 0; t < kEach; ++t) spread[t] = spread[t] / number;
    store8(args.out, kFloat32, at, models.numel, spread);
}

// --- importances

FM_KERNEL(kThreads) importance_kernel(FM_LARGE Found args) {
    const Models& models = args.models;
    int64_t at = block() * kTile + thread() * kEach;
    if (at >= models.numel) return;
    float base[kEach], values[kEach];
    load8(models.base, at, models.numel, base);
    int64_t row = at / args.width, next = (row + 1) * args.width;
    float factor = args.divergence[row];
    each_delta(models, at, base, [&](int32_t, const float* delta) {
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) {
            if (at + t >= next && at + t < models.numel) {
                factor = args.divergence[++row];
                next += args.width;
            }
            values[t] = bit_cast<float>(bit_cast<uint32_t>(delta[t]) & 0x7fffffffu) * factor;
        }
    });
    store8(args.out, kFloat32, at, models.numel, values);
}

// --- divergences of rows

struct RowsOf {
    Array base, x;
    int64_t first, width;  // the first row, and elements of a row
    int64_t half;          // a power of two, at least 32 and half of the width
    float* memory;         // half as many numbers for each block, or nullptr: they are shared
    float* out;
};

struct RowShared {
    float of_warp[kWarps];
    float sum;
    float halves[1];  // as many as half a row has
};

// The element's value, -0 past the end: adding it changes nothing.
template <class Value>
FM_DEVICE float value_or_nothing(const RowsOf& rows, int64_t i, const Value& value) {
    return i < rows.width ? value(i) : -0.0f;
}

// The sum of value(i) over a row, halving it until one is left. By the whole block; ends with a barrier.
template <class Value>
FM_DEVICE float row_sum(const RowsOf& rows, RowShared& mine, float* halves, const Value& value) {
    for (int64_t i = thread(); i < rows.half; i += kThreads)
        halves[i] = value_or_nothing(rows, i, value) + value_or_nothing(rows, i + rows.half, value);
    for (int64_t half = rows.half / 2; half >= 32; half /= 2) {
        sync();
        for (int64_t i = thread(); i < half; i += kThreads) halves[i] = halves[i] + halves[i + half];
    }
    sync();
    if (thread() < 32) {
        float sum = halves[lane()];
        for (int half = 16; half > 0; half /= 2) sum = sum + from_across(sum, half);
        if (lane() == 0) mine.sum = sum;
    }
    sync();
    return mine.sum;
}

FM_DEVICE float element(Array x, int64_t i) { return widened(bits_at(x, i), x.dtype); }

// A row's greatest element; NaN is none, for it makes all of the row NaN in any case.
FM_DEVICE float greatest(const RowsOf& rows, RowShared& mine, Array x) {
    float most = -bit_cast<float>(kInfBits);
    for (int64_t i = thread(); i < rows.width; i += kThreads) {
        float value = element(x, i);
        most = value > most ? value : most;
    }
    for (int half = 16; half > 0; half /= 2) {
        float other = from_across(most, half);
        most = other > most ? other : most;
    }
    if (lane() == 0) mine.of_warp[thread() / 32] = most;
    sync();
    for (int warp = 0; warp < kWarps; ++warp) most = mine.of_warp[warp] > most ? mine.of_warp[warp] : most;
    sync();
    return most;
}

// Of a row's softmax: e^(x - most) / sum.
struct Softmax {
    Array x;
    float most, sum;
};

FM_DEVICE Softmax softmax_of(const RowsOf& rows, RowShared& mine, float* halves, Array x) {
    Softmax of = {x, greatest(rows, mine, x), 0.0f};
    of.sum = row_sum(rows, mine, halves, [&](int64_t i) { return exp_of(element(of.x, i) - of.most); });
    return of;
}

FM_DEVICE float share_at(const Softmax& of, int64_t i) {
    return exp_of(element(of.x, i) - of.most) / of.sum + kSmallestShare;
}

FM_KERNEL(kThreads) divergences_kernel(RowsOf rows) {
    RowShared& mine = shared<RowShared>();
    float* halves = rows.memory == nullptr ? mine.halves : rows.memory + block() * rows.half;
    int64_t row = rows.first + block();
    Softmax p = softmax_of(rows, mine, halves, from_element(rows.x, row * rows.width));
    Softmax q = softmax_of(rows, mine, halves, from_element(rows.base, row * rows.width));
    float sum = row_sum(rows, mine, halves, [&](int64_t i) { return divergence_term(share_at(p, i), share_at(q, i)); });
    if (thread() == 0) rows.out[row] = canonical(sum);
}

int64_t half_of(int64_t width) {
    int64_t half = 32;
    while (2 * half < width) half *= 2;
    return half;
}

size_t shared_of(int64_t half) { return offsetof(RowShared, halves) + sizeof(float) * static_cast<size_t>(half); }

int64_t tiles_of(int64_t numel) { return (numel + kTile - 1) / kTile; }

}  // namespace

int nearswap(Place place, const Models& models, float t, void* out, int32_t out_dtype) {
    Merge merge = {models, {}, t, out, out_dtype};
    return launch(nearswap_kernel, tiles_of(models.numel), kThreads, 0, place.stream, merge);
}

int ram_apply(Place place, const Models& models, const float* factors, float epsilon, void* out, int32_t out_dtype) {
    Merge merge = {models, {}, epsilon, out, out_dtype};
    for (int32_t i = 0; i < models.count; ++i) merge.factor[i] = factors[i];
    return launch(ram_apply_kernel, tiles_of(models.numel), kThreads, 0, place.stream, merge);
}

int ram_counts(Place place, const Models& models, float epsilon, int64_t* counts) {
    int64_t part = part_of(models.numel);
    Counts args = {models, epsilon, part, counts};
    return launch(ram_counts_kernel, (models.numel + part - 1) / part, kThreads, sizeof(CountsShared), place.stream,
                  args);
}

int model_variance(Place place, const Models& models, float* out) {
    Found args = {models, nullptr, 1, out};
    return launch(model_variance_kernel, tiles_of(models.numel), kThreads, 0, place.stream, args);
}

int importance(Place place, const Models& models, const float* divergence, int64_t width, float* out) {
    Found args = {models, divergence, width, out};
    return launch(importance_kernel, tiles_of(models.numel), kThreads, 0, place.stream, args);
}

int64_t row_memory(int64_t width) {
    int64_t half = half_of(width);
    return static_cast<int64_t>(shared_of(half)) <= shared_limit() ? 0 : half;
}

int divergences(Place place, Array base, Array x, int64_t width, int64_t first, int64_t count, float* memory,
                float* out) {
    RowsOf rows = {base, x, first, width, half_of(width), memory, out};
    size_t bytes = shared_of(memory == nullptr ? rows.half : 1);
    return launch(divergences_kernel, count, kThreads, bytes, place.stream, rows);
}

}  // namespace cuda
FM_NAMESPACE_END
