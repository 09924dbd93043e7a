// Exact sums of float32 magnitudes, as one long integer in units of 2^-149 (the smallest denormal).
//
// Integer addition is associative, so the sum is the same in whatever order, by however many threads and in however
// many chunks it was taken. Twelve limbs of 32 bits hold 2^85 of the largest floats.
#pragma once

#include "fastmerge/scalar.h"

FM_NAMESPACE_BEGIN

constexpr int kLimbs = 12;

struct ExactSum {
    uint64_t limb[kLimbs];  // each below 2^32 after carry()
};

FM_INLINE void exact_clear(ExactSum& sum) {
    for (int i = 0; i < kLimbs; ++i) sum.limb[i] = 0;
}

// Adds value * 2^place (place counts from 2^-149). At most 2^30 additions between two carries.
FM_INLINE void exact_add(ExactSum& sum, uint64_t value, int place) {
    int index = place >> 5, shift = place & 31;
    uint64_t low = (value & 0xffffffffu) << shift;
    uint64_t high = (value >> 32) << shift;
    sum.limb[index] += low & 0xffffffffu;
    sum.limb[index + 1] += (low >> 32) + (high & 0xffffffffu);
    sum.limb[index + 2] += high >> 32;
}

FM_INLINE void exact_carry(ExactSum& sum) {
    for (int i = 0; i + 1 < kLimbs; ++i) {
        sum.limb[i + 1] += sum.limb[i] >> 32;
        sum.limb[i] &= 0xffffffffu;
    }
}

FM_INLINE void exact_merge(ExactSum& into, const ExactSum& from) {
    for (int i = 0; i < kLimbs; ++i) into.limb[i] += from.limb[i];
    exact_carry(into);
}

// A finite magnitude is mantissa * 2^(place - 149), place = max(exponent, 1) - 1.
FM_INLINE uint32_t magnitude_mantissa(uint32_t key) { return (key & 0x7fffffu) | (key >= 0x800000u ? 0x800000u : 0u); }

FM_INLINE int magnitude_place(uint32_t key) {
    int exponent = static_cast<int>(key >> 23);
    return exponent > 0 ? exponent - 1 : 0;
}

FM_NAMESPACE_END
