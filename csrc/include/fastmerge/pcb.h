// PCB-Merging (Du et al., "Parameter Competition Balancing for Model Merging", NeurIPS 2024): the rules that do not
// depend on how elements are laid out. The formulas are in `fastmerge/reference/pcb.py`.
#pragma once

#include "fastmerge/functions.h"
#include "fastmerge/scalar.h"

FM_NAMESPACE_BEGIN

// Two of the released scripts score alike: kPcbScript is `script` and `nlp`.
enum PcbVariant : int32_t { kPcbScript = 0, kPcbVision = 1, kPcbVisionEs = 2, kPcbPaper = 3 };

constexpr float kLargestSum = 0x1.fffffep+127f;      // the largest float32
constexpr float kLargestProduct = 0x1.fffffep+126f;  // half of it, so that the difference of two does not overflow
constexpr float kSmallestDivisor = 1e-12f;

FM_INLINE int64_t pcb_pairs(int32_t models) { return static_cast<int64_t>(models) * (models + 1) / 2; }

// What is subtracted from n z^2 before exp. A factor of all of a row's scores, which cancels.
FM_INLINE float pcb_shift(int32_t models) {
    return static_cast<float>(models <= 160 ? static_cast<double>(models) / 2.0 : static_cast<double>(models - 80));
}

// x within [low, high]. NaN stays NaN, and `low` wins where the bounds are out of order.
FM_INLINE float between(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }

// +1, -1 or +0; NaN stays NaN.
FM_INLINE float direction(float x) { return x > 0.0f ? 1.0f : (x < 0.0f ? -1.0f : (x != x ? x : 0.0f)); }

// The scale of values from `low` on: [low, low + width] becomes [0, 1], or all 0 where there is no width.
struct Norm {
    float low, width;
};

FM_INLINE Norm norm_of(float low, float high) {
    Norm norm = {low, high - low};
    return norm;
}

FM_INLINE float normalised(float x, Norm norm) { return norm.width == 0.0f ? 0.0f : (x - norm.low) / norm.width; }

// Order-preserving keys of signed scores: as unsigned numbers they order as the scores do. NaN is the lowest, 0.
constexpr int64_t kScoreKeyEnd = 0xff800001;  // above every key

FM_INLINE uint32_t score_key(float score) {
    uint32_t bits = bit_cast<uint32_t>(score);
    uint32_t key = bits ^ ((0u - (bits >> 31)) | 0x80000000u);
    return (bits & 0x7fffffffu) > kInfBits ? 0u : key;
}

// A float's bits as a number that orders as the floats do, signed; and back.
FM_INLINE int32_t ordered_bits(float x) {
    uint32_t bits = bit_cast<uint32_t>(x);
    return static_cast<int32_t>(bits ^ ((0u - (bits >> 31)) >> 1));
}

FM_INLINE float from_ordered_bits(int32_t ordered) {
    uint32_t bits = static_cast<uint32_t>(ordered);
    return bit_cast<float>(bits ^ ((0u - (bits >> 31)) >> 1));
}

FM_NAMESPACE_END
