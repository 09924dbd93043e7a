// Trials of evolutionary search: what crossing over puts in an element's place. See fastmerge/reference/evolve.py.
#pragma once

#include "fastmerge/platform.h"

FM_NAMESPACE_BEGIN

constexpr int kMostDifferences = 3;  // must equal MOST_DIFFERENCES in Python
constexpr int kMostParents = 2 + 2 * kMostDifferences;

enum TrialKind : int32_t { kBlend = 0, kDifferences = 1 };

// own: 1 - F, other: F
FM_INLINE float blended(float x, float reference, float own, float other) { return (own * x) + (other * reference); }

FM_INLINE float with_difference(float sum, float factor, float plus, float minus) {
    return sum + (factor * (plus - minus));
}

FM_NAMESPACE_END
