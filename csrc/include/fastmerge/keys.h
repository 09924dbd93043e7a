// Order-preserving keys: the magnitude's bit pattern, with every NaN at one key above infinity.
#pragma once

#include "fastmerge/scalar.h"

FM_NAMESPACE_BEGIN

constexpr uint32_t kKeyEnd = 0x80000000u;  // above every key

FM_INLINE uint32_t magnitude_key(float value) {
    uint32_t key = bit_cast<uint32_t>(value) & 0x7fffffffu;
    return key > kInfBits ? kNanBits : key;
}

FM_INLINE uint32_t magnitude_key16(uint16_t bits, int32_t dtype) {
    uint32_t key = bits & 0x7fffu;
    uint32_t inf = dtype == kBFloat16 ? 0x7f80u : 0x7c00u;
    uint32_t nan = dtype == kBFloat16 ? 0x7fc0u : 0x7e00u;
    return key > inf ? nan : key;
}

// A cut in the order (key falling, index rising): the elements at or past it are those with key < threshold, and those
// with key == threshold that have at least `ties` equals before them. ties > 0 only where the cut splits equals.
struct RankBound {
    int64_t threshold;
    int64_t ties;
};

FM_NAMESPACE_END
