// Inner products: how a row's products are added up. See fastmerge/reference/geometry.py.
//
// The product of two float32 numbers is exact in float64, so that a compiler that fuses a multiplication with an
// addition (none is allowed to) would not change a bit. Additions are in one order: in a block of kGramBlock elements
// element e goes to lane e % kGramLanes, lanes add in rising order, then halves of the lanes are added.
#pragma once

#include "fastmerge/platform.h"

FM_NAMESPACE_BEGIN

constexpr int kGramBlock = 4096;  // must equal GRAM_BLOCK in Python
constexpr int kGramLanes = 64;

FM_INLINE int64_t gram_pairs(int64_t models) { return models * (models + 1) / 2; }

FM_INLINE int64_t gram_blocks(int64_t row_length) { return (row_length + kGramBlock - 1) / kGramBlock; }

// The place of the pair (i, j), i <= j.
FM_INLINE int64_t gram_pair(int64_t i, int64_t j, int64_t models) { return i * models - i * (i - 1) / 2 + (j - i); }

// float64 with every NaN replaced by the one without a payload.
FM_INLINE double canonical_double(double value) {
    uint64_t bits = bit_cast<uint64_t>(value);
    bool nan = (bits & 0x7fffffffffffffffull) > 0x7ff0000000000000ull;
    return bit_cast<double>(nan ? uint64_t{0x7ff8000000000000ull} : bits);
}

FM_NAMESPACE_END
