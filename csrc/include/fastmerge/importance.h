// The rules of the importance family; `fastmerge/reference/importance.py` has the formulas.
#pragma once

#include "fastmerge/functions.h"
#include "fastmerge/scalar.h"

FM_NAMESPACE_BEGIN

constexpr float kSmallestDistance = 1e-6f;
constexpr float kSmallestShare = 1e-8f;
constexpr float kNear = 0.25f;

// w x + (1 - w) base, w = clamp(t / max(|base - x|, 1e-6), 0, 1). NaN stays NaN.
FM_INLINE float nearswap_of(float base, float x, float t) {
    float distance = bit_cast<float>(bit_cast<uint32_t>(base - x) & 0x7fffffffu);
    float weight = t / (distance < kSmallestDistance ? kSmallestDistance : distance);
    weight = weight > 1.0f ? 1.0f : weight;
    weight = weight < 0.0f ? 0.0f : weight;
    return weight * x + (1.0f - weight) * base;
}

// A delta takes part where it is further from 0 than epsilon; NaN is, too.
FM_INLINE bool is_changed(float delta, float epsilon) {
    return !(bit_cast<float>(bit_cast<uint32_t>(delta) & 0x7fffffffu) <= epsilon);
}

// `count` models take part, whose deltas add up to `total`; `factor` is the one's where it is alone.
FM_INLINE float ram_mean(float count, float total, float factor) {
    float mean = total / (count < 1.0f ? 1.0f : count);
    return count == 1.0f ? total * factor : mean;
}

// p log(p / q) - p + q, of shares that are no zeros; where p is near q by the series of the logarithm, so that nothing
// cancels.
FM_INLINE float divergence_term(float p, float q) {
    float apart = p - q;
    float z = apart / q;
    float ratio = p / q;
    float near = (apart * z) * (0.5f + z * (ratio * log_polynomial(z) - 0.5f));
    float far = p * log_of(ratio) - apart;
    return bit_cast<float>(bit_cast<uint32_t>(z) & 0x7fffffffu) <= kNear ? near : far;
}

FM_NAMESPACE_END
