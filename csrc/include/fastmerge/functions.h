// exp, tanh and log for float32, the same bits on every machine: only additions, multiplications, one division and
// integer operations on bits, each rounded on its own, and selects instead of branches, so that any compiler vectorises
// them.
//
// exp and tanh write x as k ln 2 + r with |r| <= ln 2 / 2, log as 2^k (1 + f). k ln 2 is taken in two parts, of which
// the first times k is exact. `fastmerge/reference/functions.py` says the same in PyTorch.
#pragma once

#include "fastmerge/platform.h"

FM_NAMESPACE_BEGIN

constexpr float kLog2E = 0x1.715476p+0f;
constexpr float kLn2High = 0x1.62e4p-1f;  // 15 bits: exact when multiplied by k
constexpr float kLn2Low = 0x1.7f7d1cp-20f;
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is in the low bits then
constexpr uint32_t kRounderBits = 0x4b400000u;

struct Reduced {
    float r;
    int32_t k;
};

FM_INLINE Reduced reduce_exp(float x) {
    float shifted = x * kLog2E + kRounder;
    float k = shifted - kRounder;
    Reduced reduced;
    reduced.r = (x - k * kLn2High) - k * kLn2Low;
    reduced.k = static_cast<int32_t>(bit_cast<uint32_t>(shifted) - kRounderBits);
    return reduced;
}

// e^r - 1 for |r| <= ln 2 / 2, as exact for small r as for large. The polynomial is the one that makes the greatest
// relative error of e^r least: 3e-9.
FM_INLINE float reduced_expm1(float r) {
    float q = 0x1.6a23a8p-10f;
    q = q * r + 0x1.123a36p-7f;
    q = q * r + 0x1.5558f4p-5f;
    q = q * r + 0x1.555490p-3f;
    q = q * r + 0x1.fffffcp-2f;
    return r + (r * r) * q;
}

// 2^k for -127 < k < 128
FM_INLINE float power_of_two(int32_t k) { return bit_cast<float>(static_cast<uint32_t>(k + 127) << 23); }

// At most 1 ulp from e^x, measured over every float32. Infinite above 88.72, denormal below -87.34, 0 below -103.97.
FM_INLINE float exp_of(float x) {
    float low = x < -104.0f ? -104.0f : x;
    float bounded = low > 89.0f ? 89.0f : low;
    Reduced reduced = reduce_exp(bounded);
    float value = 1.0f + reduced_expm1(reduced.r);
    // In two factors: 2^128 and 2^-150 are no float32, and a denormal result must be rounded once.
    int32_t half = reduced.k >> 1;
    return (value * power_of_two(half)) * power_of_two(reduced.k - half);
}

// At most 2.7 ulp from tanh x, measured over every float32; odd, never beyond +-1, and x itself where x is tiny.
// From e^2x - 1 rather than e^2x, which would leave nothing of a small x.
FM_INLINE float tanh_of(float x) {
    uint32_t bits = bit_cast<uint32_t>(x);
    float magnitude = bit_cast<float>(bits & 0x7fffffffu);
    float bounded = magnitude > 10.0f ? 10.0f : magnitude;
    Reduced reduced = reduce_exp(bounded + bounded);
    float scale = power_of_two(reduced.k);
    float expm1 = reduced_expm1(reduced.r) * scale + (scale - 1.0f);
    float value = expm1 / (expm1 + 2.0f);
    return bit_cast<float>(bit_cast<uint32_t>(value) | (bits & 0x80000000u));
}

constexpr uint32_t kRootHalfBits = 0x3f3504f3u;  // of the float just below the root of 1/2

// The P of log(1 + f) = f - f^2 / 2 + f^3 P(f), for sqrt(1/2) <= 1 + f < sqrt(2). The polynomial is the one that makes
// the greatest relative error of the logarithm least: 6e-9.
FM_INLINE float log_polynomial(float f) {
    float p = -0x1.38b56ap-4f;
    p = p * f + 0x1.055b66p-3f;
    p = p * f + -0x1.0d8544p-3f;
    p = p * f + 0x1.22da1ep-3f;
    p = p * f + -0x1.547244p-3f;
    p = p * f + 0x1.99a008p-3f;
    p = p * f + -0x1.000226p-2f;
    p = p * f + 0x1.555554p-2f;
    return p;
}

// At most 0.9 ulp from ln x, measured over every float32; -infinity at 0, NaN below. With sqrt(1/2) <= 1 + f < sqrt(2)
// log(1 + f) is f - f^2 / 2 + f^3 P(f), so that nothing is lost where x is near 1.
FM_INLINE float log_of(float x) {
    bool denormal = x < 0x1p-126f;
    uint32_t bits = bit_cast<uint32_t>(denormal ? x * 0x1p23f : x);
    // Arithmetic on the bits: the exponent that leaves a mantissa from sqrt(1/2) on.
    int32_t exponent = static_cast<int32_t>(bits - kRootHalfBits) >> 23;
    float f = bit_cast<float>(bits - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
    float k = static_cast<float>(denormal ? exponent - 23 : exponent);
    float square = f * f;
    float rest = ((f * square) * log_polynomial(f) + k * kLn2Low) - 0.5f * square;
    float value = (f + rest) + k * kLn2High;
    float infinity = bit_cast<float>(0x7f800000u);
    value = x == infinity ? infinity : value;
    value = x == 0.0f ? -infinity : value;
    return x >= 0.0f ? value : bit_cast<float>(0x7fc00000u);
}

FM_NAMESPACE_END
