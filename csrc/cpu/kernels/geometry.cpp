// Kernels of the geometry family: inner products of all pairs of models, a block at a time.
#include "fastmerge/geometry.h"

#include "cpu/kernels/select.h"
#include "cpu/kernels/tile.h"

FM_NAMESPACE_BEGIN
namespace {

static_assert(kTile % kGramLanes == 0, "a tile is made of whole steps");

size_t gram_scratch(int32_t models) {
    return sizeof(double) * static_cast<size_t>(models * int64_t{kTile} + gram_pairs(models) * kGramLanes);
}

inline void add_products(int count, const double* __restrict x, const double* __restrict y, double* __restrict lanes) {
    for (int t = 0; t < count; t += kGramLanes) {
        for (int lane = 0; lane < kGramLanes; ++lane) lanes[lane] += x[t + lane] * y[t + lane];
    }
}

// The upper half of the lanes is added to the lower half, until one is left.
inline double folded(double* __restrict lanes) {
    for (int half = kGramLanes / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[half + lane];
    }
    return canonical_double(lanes[0]);
}

void gram(const Models* models, int64_t begin, int64_t end, void* scratch, double* out, int64_t stride) {
    int32_t count = models->count;
    int64_t pairs = gram_pairs(count);
    double* wide = static_cast<double*>(scratch);   // [models, kTile]
    double* lanes = wide + count * int64_t{kTile};  // [pairs, kGramLanes]
    for (int64_t i = 0; i < pairs * kGramLanes; ++i) lanes[i] = 0.0;
    float base[kTile], delta[kTile];
    for (int64_t at = begin; at < end; at += kTile) {
        int tile = static_cast<int>(smaller(kTile, end - at));
        int whole = (tile + kGramLanes - 1) / kGramLanes * kGramLanes;
        base_tile(*models, at, tile, base);
        for (int32_t m = 0; m < count; ++m) {
            delta_tile(*models, m, at, tile, base, delta);
            double* row = wide + m * int64_t{kTile};
            for (int t = 0; t < tile; ++t) row[t] = static_cast<double>(delta[t]);
            for (int t = tile; t < whole; ++t) row[t] = 0.0;
        }
        double* sums = lanes;
        for (int32_t i = 0; i < count; ++i) {
            for (int32_t j = i; j < count; ++j, sums += kGramLanes)
                add_products(whole, wide + i * int64_t{kTile}, wide + j * int64_t{kTile}, sums);
        }
    }
    for (int64_t pair = 0; pair < pairs; ++pair) out[pair * stride] = folded(lanes + pair * kGramLanes);
}

}  // namespace

void fill_geometry(cpu::Kernels& table) {
    table.gram_scratch = gram_scratch;
    table.gram = gram;
}

FM_NAMESPACE_END
