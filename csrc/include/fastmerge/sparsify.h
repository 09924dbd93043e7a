// Which elements a model keeps: the rules of the sparsify family.
#pragma once

#include "fastmerge/keys.h"

FM_NAMESPACE_BEGIN

enum SparsifyMethod : int32_t { kKeepAll = 0, kBand = 1, kBernoulli = 2, kDella = 3, kMask = 4 };

// Probability p keeps the words below floor(p * 2^32); 2^32 itself keeps every word.
FM_INLINE uint64_t keep_limit(double probability) {
    if (probability >= 1.0) return 0x100000000ull;
    if (!(probability > 0.0)) return 0;
    return static_cast<uint64_t>(probability * 4294967296.0);
}

// DELLA: the probability of an element whose tie group spans the ascending positions a..b of a row of `length`
// elements, twice_rank = a + b (the middle rank, doubled, so that it is an integer).
FM_INLINE double della_probability(double density, double epsilon, int64_t twice_rank, int64_t length) {
    double rank = length == 1 ? 0.5 : static_cast<double>(twice_rank) / (2.0 * static_cast<double>(length - 1));
    double low = density - epsilon;
    double spread = (2.0 * epsilon) * rank;
    return low + spread;
}

FM_NAMESPACE_END
