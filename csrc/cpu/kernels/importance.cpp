// Kernels of the importance family: each tile by itself, but for divergences, which take whole rows.
#include "fastmerge/importance.h"

#include "cpu/kernels/mass.h"
#include "cpu/kernels/sparsify_rows.h"

FM_NAMESPACE_BEGIN
namespace {

template <class Work>
inline void over_tiles(int64_t begin, int64_t end, const Work& work) {
    for (int64_t at = begin; at < end; at += kTile) work(at, static_cast<int>(smaller(kTile, end - at)));
}

void nearswap(const Models* models, float t, int64_t begin, int64_t end, void* out, int32_t dtype) {
    float base[kTile], x[kTile];
    over_tiles(begin, end, [&](int64_t at, int count) {
        load_tile(models->base, at, count, base);
        load_tile(models->models[0], at, count, x);
        for (int i = 0; i < count; ++i) x[i] = nearswap_of(base[i], x[i], t);
        store_tile(out, dtype, at, count, x);
    });
}

void ram_counts(const Models* models, float epsilon, int64_t begin, int64_t end, int64_t* counts) {
    float base[kTile], delta[kTile];
    int32_t changed[kTile];
    over_tiles(begin, end, [&](int64_t at, int count) {
        load_tile(models->base, at, count, base);
        for (int i = 0; i < count; ++i) changed[i] = 0;
        for (int32_t m = 0; m < models->count; ++m) {
            delta_tile(*models, m, at, count, base, delta);
            for (int i = 0; i < count; ++i) changed[i] += is_changed(delta[i], epsilon) ? 1 : 0;
        }
        for (int32_t m = 0; m < models->count; ++m) {
            delta_tile(*models, m, at, count, base, delta);
            int32_t shared = 0, alone = 0;
            for (int i = 0; i < count; ++i) {
                int32_t part = is_changed(delta[i], epsilon) ? 1 : 0;
                shared += changed[i] > 1 ? part : 0;
                alone += changed[i] == 1 ? part : 0;
            }
            counts[2 * m] += shared;
            counts[2 * m + 1] += alone;
        }
    });
}

void ram_apply(const Models* models, const float* factors, float epsilon, int64_t begin, int64_t end, void* out,
               int32_t dtype) {
    float base[kTile], delta[kTile], total[kTile], factor[kTile], changed[kTile];
    over_tiles(begin, end, [&](int64_t at, int count) {
        load_tile(models->base, at, count, base);
        for (int32_t m = 0; m < models->count; ++m) {
            delta_tile(*models, m, at, count, base, delta);
            float own = factors[m];
            if (m == 0) {
                for (int i = 0; i < count; ++i) {
                    bool part = is_changed(delta[i], epsilon);
                    changed[i] = part ? 1.0f : 0.0f;
                    total[i] = part ? delta[i] : 0.0f;
                    factor[i] = part ? own : 0.0f;
                }
            } else {
                for (int i = 0; i < count; ++i) {
                    bool part = is_changed(delta[i], epsilon);
                    changed[i] = changed[i] + (part ? 1.0f : 0.0f);
                    total[i] = total[i] + (part ? delta[i] : 0.0f);
                    factor[i] = factor[i] + (part ? own : 0.0f);
                }
            }
        }
        for (int i = 0; i < count; ++i) total[i] = base[i] + ram_mean(changed[i], total[i], factor[i]);
        store_tile(out, dtype, at, count, total);
    });
}

void model_variance(const Models* models, int64_t begin, int64_t end, float* out) {
    float base[kTile], first[kTile], delta[kTile], mean[kTile], spread[kTile];
    float number = static_cast<float>(models->count);
    over_tiles(begin, end, [&](int64_t at, int count) {
        load_tile(models->base, at, count, base);
        delta_tile(*models, 0, at, count, base, first);
        for (int i = 0; i < count; ++i) mean[i] = first[i] - first[i];
        for (int32_t m = 1; m < models->count; ++m) {
            delta_tile(*models, m, at, count, base, delta);
            for (int i = 0; i < count; ++i) mean[i] = mean[i] + (delta[i] - first[i]);
        }
        for (int i = 0; i < count; ++i) mean[i] = mean[i] / number;
        for (int i = 0; i < count; ++i) {
            float apart = (first[i] - first[i]) - mean[i];
            spread[i] = apart * apart;
        }
        for (int32_t m = 1; m < models->count; ++m) {
            delta_tile(*models, m, at, count, base, delta);
            for (int i = 0; i < count; ++i) {
                float apart = (delta[i] - first[i]) - mean[i];
                spread[i] = spread[i] + apart * apart;
            }
        }
        for (int i = 0; i < count; ++i) spread[i] = spread[i] / number;
        store_tile(out, kFloat32, at, count, spread);
    });
}

// `begin` is a multiple of 8, at most a tie block before `end`.
void energy(const Models* models, const uint8_t* mask, int64_t begin, int64_t end, uint64_t* limbs) {
    float base[kTile], square[kTile];
    uint32_t keep[kTile];
    for (int i = 0; i < kTile; ++i) keep[i] = 0xffffffffu;
    for (int32_t m = 0; m < models->count; ++m) {
        ExactSum sum, same;
        exact_clear(sum);
        exact_clear(same);
        over_tiles(begin, end, [&](int64_t at, int count) {
            load_tile(models->base, at, count, base);
            delta_tile(*models, m, at, count, base, square);
            if (mask != nullptr) mask_tile(mask, at, count, keep);
            for (int i = 0; i < count; ++i) square[i] = square[i] * square[i];
            mass_tile(count, square, keep, same, sum);
        });
        exact_carry(sum);
        for (int i = 0; i < kLimbs; ++i) limbs[m * kLimbs + i] = sum.limb[i];
    }
}

// The sum of x[0 .. width - 1], which is overwritten, halving it until one element is left.
inline float row_sum(float* x, int64_t width) {
    while (width > 1) {
        int64_t half = 1;
        while (2 * half < width) half *= 2;
        const float* __restrict upper = x + half;
        float* __restrict lower = x;
        for (int64_t i = 0; i < width - half; ++i) lower[i] = lower[i] + upper[i];
        width = half;
    }
    return x[0];
}

// softmax of a row plus 1e-8 into `out`; `powers` is overwritten.
inline void shares(Array x, int64_t begin, int64_t width, float* __restrict powers, float* __restrict out) {
    constexpr int kLanes = 64;
    float lanes[kLanes];
    for (int l = 0; l < kLanes; ++l) lanes[l] = -bit_cast<float>(kInfBits);
    for (int64_t at = 0; at < width; at += kTile) {
        int count = static_cast<int>(smaller(kTile, width - at));
        load_tile(x, begin + at, count, out + at);
        const float* __restrict values = out + at;
        int i = 0;
        for (; i + kLanes <= count; i += kLanes)
            for (int l = 0; l < kLanes; ++l) lanes[l] = values[i + l] > lanes[l] ? values[i + l] : lanes[l];
        for (; i < count; ++i) lanes[0] = values[i] > lanes[0] ? values[i] : lanes[0];
    }
    float most = lanes[0];
    for (int l = 1; l < kLanes; ++l) most = lanes[l] > most ? lanes[l] : most;
    for (int64_t i = 0; i < width; ++i) out[i] = exp_of(out[i] - most);
    memcpy(powers, out, 4 * static_cast<size_t>(width));
    float sum = row_sum(powers, width);
    for (int64_t i = 0; i < width; ++i) out[i] = out[i] / sum + kSmallestShare;
}

// Rows first .. last - 1; `scratch` has room for three of them.
void divergence(const Models* models, int64_t width, int64_t first, int64_t last, float* scratch, float* out) {
    float* __restrict p = scratch;
    float* __restrict q = scratch + width;
    float* __restrict terms = scratch + 2 * width;
    for (int64_t row = first; row < last; ++row) {
        shares(models->models[0], row * width, width, terms, p);
        shares(models->base, row * width, width, terms, q);
        for (int64_t i = 0; i < width; ++i) terms[i] = divergence_term(p[i], q[i]);
        out[row] = canonical(row_sum(terms, width));
    }
}

void importance(const Models* models, const float* divergences, int64_t width, int64_t begin, int64_t end, float* out) {
    float base[kTile], delta[kTile];
    int64_t row = begin / width;
    int64_t at = begin;
    while (at < end) {
        int64_t stop = smaller(end, (row + 1) * width);
        float factor = divergences[row];
        for (; at < stop; at += kTile) {
            int count = static_cast<int>(smaller(kTile, stop - at));
            load_tile(models->base, at, count, base);
            delta_tile(*models, 0, at, count, base, delta);
            for (int i = 0; i < count; ++i)
                delta[i] = bit_cast<float>(bit_cast<uint32_t>(delta[i]) & 0x7fffffffu) * factor;
            store_tile(out, kFloat32, at, count, delta);
        }
        at = stop;
        ++row;
    }
}

}  // namespace

void fill_importance(cpu::Kernels& table) {
    table.nearswap = nearswap;
    table.ram_counts = ram_counts;
    table.ram_apply = ram_apply;
    table.model_variance = model_variance;
    table.energy = energy;
    table.divergence = divergence;
    table.importance = importance;
}

FM_NAMESPACE_END
