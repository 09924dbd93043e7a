// Sign election and disjoint merging: the rules of the consensus family.
#pragma once

#include "fastmerge/scalar.h"

FM_NAMESPACE_BEGIN

enum Election : int32_t { kElectNone = 0, kElectWeighted = 1, kElectTotal = 2, kElectFrequency = 3 };
enum Divisor : int32_t { kDivideNone = 0, kDivideWeights = 1, kDivideCount = 2, kDivideValue = 3 };

// +1, -1 or 0. A sum that is NaN elects the negative sign, as `sum >= 0 ? + : -` does.
FM_INLINE float elected_sign(float sum, float zero_sign) {
    float sign = sum > 0.0f ? 1.0f : -1.0f;
    return sum == 0.0f ? zero_sign : sign;
}

FM_INLINE float sign_of(float value) { return value > 0.0f ? 1.0f : (value < 0.0f ? -1.0f : 0.0f); }

// An element takes part when it has the elected sign; zeros and NaN never do.
FM_INLINE bool takes_part(float value, float elected) { return value * elected > 0.0f; }

FM_NAMESPACE_END
