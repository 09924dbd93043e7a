// A fused multiply-add in float32 by plain arithmetic in float64: the same bits, whether or not a processor has one.
#pragma once

#include "fastmerge/scalar.h"

FM_NAMESPACE_BEGIN

// What a sum in float64 that lost something is replaced by, lest its rounding to float32 be a second one: round to odd.
FM_INLINE double round_to_odd(double sum, double lost) {
    // By masks, which compilers vectorise.
    int64_t bits = bit_cast<int64_t>(sum);
    int64_t apart = (bit_cast<int64_t>(lost) ^ bits) >> 63;  // -1 where the signs differ
    int64_t inexact = lost != 0.0 ? -1 : 0;
    int64_t finite = lost - lost == 0.0 ? -1 : 0;
    int64_t even = (bits & 1) - 1;
    return bit_cast<double>(bits + ((2 * apart + 1) & inexact & finite & even));
}

// before + x * factor, rounded to float32 once. float64 holds the product; Knuth's TwoSum tells what the sum has lost.
FM_INLINE float multiplied_and_added(float before, float x, float factor) {
    double product = static_cast<double>(x) * static_cast<double>(factor);
    double earlier = static_cast<double>(before);
    double sum = product + earlier;
    double virtual_part = sum - product;
    double lost = (product - (sum - virtual_part)) + (earlier - virtual_part);
    return static_cast<float>(round_to_odd(sum, lost));
}

FM_NAMESPACE_END
