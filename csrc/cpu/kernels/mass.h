// The exact sum of a tile's magnitudes: of all, and of those that are kept.
#pragma once

#include "cpu/kernels.h"
#include "fastmerge/exact_sum.h"

FM_NAMESPACE_BEGIN
namespace {

using cpu::kTile;

// Adds a tile's magnitudes exactly. Within 26 binades of the tile's largest magnitude, mantissas shifted to a common
// unit fit 51 bits and a tile's sum 60, so one 64-bit lane per element does; the rest (rare) are added one by one.
inline void mass_tile(int count, const float* __restrict delta, const uint32_t* __restrict keep, ExactSum& all,
                      ExactSum& kept) {
    uint32_t key[kTile];
    uint32_t most = 0;
    for (int t = 0; t < count; ++t) {
        uint32_t k = bit_cast<uint32_t>(delta[t]) & 0x7fffffffu;
        k = k >= kInfBits ? 0u : k;  // what is not finite has no mass
        key[t] = k;
    }
    for (int t = 0; t < count; ++t) most = key[t] > most ? key[t] : most;
    int top = magnitude_place(most);
    int unit = top > 26 ? top - 26 : 0;
    uint64_t sum_all = 0, sum_kept = 0;
    uint32_t tiny = 0;
    for (int t = 0; t < count; ++t) {
        int32_t exponent = static_cast<int32_t>(key[t] >> 23);
        int32_t place = exponent > 0 ? exponent - 1 : 0;
        uint32_t below = place < unit ? 0xffffffffu : 0u;
        uint32_t mantissa = magnitude_mantissa(key[t]);
        tiny |= below & mantissa;
        uint64_t shifted = static_cast<uint64_t>(mantissa & ~below) << (static_cast<uint32_t>(place - unit) & 63u);
        uint64_t selected = keep[t] ? shifted : 0u;
        sum_all += shifted;
        sum_kept += selected;
    }
    exact_add(all, sum_all, unit);
    exact_add(kept, sum_kept, unit);
    if (tiny == 0) return;
    for (int t = 0; t < count; ++t) {
        int place = magnitude_place(key[t]);
        if (place >= unit) continue;
        exact_add(all, magnitude_mantissa(key[t]), place);
        if (keep[t]) exact_add(kept, magnitude_mantissa(key[t]), place);
    }
}

}  // namespace
FM_NAMESPACE_END
