// The scalar types of checkpoints: exact widening to float32, and rounding back to nearest, ties to even.
//
// All of it is integer arithmetic and selects, so that every compiler vectorises it and every backend agrees. A NaN
// that is written has one bit pattern, because hardware differs in which payload it lets through.
#pragma once

#include "fastmerge/platform.h"

FM_NAMESPACE_BEGIN

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr uint32_t kInfBits = 0x7f800000u;
constexpr uint32_t kNanBits = 0x7fc00000u;

FM_INLINE int64_t dtype_size(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

FM_INLINE float widen_bfloat16(uint16_t bits) { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

FM_INLINE float widen_float16(uint16_t bits) {
    // Shifting the half's exponent and mantissa into a float's place leaves a value that is 2^112 too small, denormals
    // included; one exact multiplication puts all finite ones right.
    uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
    uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * bit_cast<float>(0x77800000u));
    uint32_t special = magnitude | kInfBits;
    uint32_t chosen = magnitude >= 0x0f800000u ? special : finite;
    return bit_cast<float>(chosen | (static_cast<uint32_t>(bits & 0x8000u) << 16));
}

FM_INLINE float canonical(float value) {
    uint32_t bits = bit_cast<uint32_t>(value);
    return bit_cast<float>((bits & 0x7fffffffu) > kInfBits ? kNanBits : bits);
}

FM_INLINE uint16_t round_bfloat16(float value) {
    uint32_t bits = bit_cast<uint32_t>(value);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > kInfBits ? 0x7fc0u : rounded);
}

FM_INLINE uint16_t round_float16(float value) {
    uint32_t bits = bit_cast<uint32_t>(value);
    uint32_t magnitude = bits & 0x7fffffffu;
    // Normal halves: add half of the last kept place less one, plus the bit that makes ties even, and rebias.
    uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    // Subnormal halves: adding 0.5 leaves the result, rounded by the addition itself, in the low bits of the sum.
    uint32_t small = magnitude < 0x38800000u ? magnitude : 0u;
    uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(small) + 0.5f) - 0x3f000000u;
    uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x477ff000u ? 0x7c00u : result;
    uint32_t sign = (bits >> 16) & 0x8000u;
    return static_cast<uint16_t>(magnitude > kInfBits ? 0x7e00u : (result | sign));
}

FM_INLINE float round_through(float value, int32_t dtype) {
    if (dtype == kBFloat16) return widen_bfloat16(round_bfloat16(value));
    if (dtype == kFloat16) return widen_float16(round_float16(value));
    return value;
}

FM_NAMESPACE_END
