// Tiles: loads, deltas, stores and random words for a few hundred elements at a time, in loops that any compiler
// vectorises for the instruction set that the unit is compiled for.
#pragma once

#include "cpu/kernels.h"
#include "fastmerge/keys.h"
#include "fastmerge/sparsify.h"

FM_NAMESPACE_BEGIN
namespace {

using cpu::Array;
using cpu::kTieBlock;
using cpu::kTile;
using cpu::Models;
using cpu::Rule;

FM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Unaligned reads: safetensors data starts anywhere, odd addresses included.
FM_INLINE float read_float(const void* data, int64_t i) {
    float value;
    memcpy(&value, static_cast<const char*>(data) + 4 * i, 4);
    return value;
}

FM_INLINE uint16_t read_half(const void* data, int64_t i) {
    uint16_t value;
    memcpy(&value, static_cast<const char*>(data) + 2 * i, 2);
    return value;
}

inline void load_tile(Array x, int64_t begin, int count, float* __restrict out) {
    if (x.dtype == kFloat32) {
        for (int t = 0; t < count; ++t) out[t] = read_float(x.data, begin + t);
    } else if (x.dtype == kBFloat16) {
        for (int t = 0; t < count; ++t) out[t] = widen_bfloat16(read_half(x.data, begin + t));
    } else {
        for (int t = 0; t < count; ++t) out[t] = widen_float16(read_half(x.data, begin + t));
    }
}

// out = x - base, base already widened
inline void subtract_tile(Array x, int64_t begin, int count, const float* __restrict base, float* __restrict out) {
    if (x.dtype == kFloat32) {
        for (int t = 0; t < count; ++t) out[t] = read_float(x.data, begin + t) - base[t];
    } else if (x.dtype == kBFloat16) {
        for (int t = 0; t < count; ++t) out[t] = widen_bfloat16(read_half(x.data, begin + t)) - base[t];
    } else {
        for (int t = 0; t < count; ++t) out[t] = widen_float16(read_half(x.data, begin + t)) - base[t];
    }
}

inline void round_tile(int32_t compute, int count, float* __restrict values) {
    if (compute == kBFloat16) {
        for (int t = 0; t < count; ++t) values[t] = widen_bfloat16(round_bfloat16(values[t]));
    } else if (compute == kFloat16) {
        for (int t = 0; t < count; ++t) values[t] = widen_float16(round_float16(values[t]));
    }
}

// The inputs themselves as the compute dtype holds them: what the peer's `.to(dtype)` does before anything else.
inline void load_rounded(Array x, int32_t compute, int64_t begin, int count, float* __restrict out) {
    load_tile(x, begin, count, out);
    if (x.dtype != compute) round_tile(compute, count, out);
}

// round_C(model - base), or round_C(model) where there is no base. `base` holds load_rounded(models.base).
inline void delta_tile(const Models& models, int32_t model, int64_t begin, int count, const float* base, float* out) {
    const Array& x = models.models[model];
    if (models.base.data == nullptr) {
        load_rounded(x, models.compute, begin, count, out);
        return;
    }
    if (models.compute == kFloat32 || models.compute == x.dtype) {
        subtract_tile(x, begin, count, base, out);
    } else {
        load_rounded(x, models.compute, begin, count, out);
        for (int t = 0; t < count; ++t) out[t] = out[t] - base[t];
    }
    round_tile(models.compute, count, out);
}

inline void base_tile(const Models& models, int64_t begin, int count, float* out) {
    if (models.base.data != nullptr) load_rounded(models.base, models.compute, begin, count, out);
}

// By way of a buffer: compilers cannot know that an output of bytes does not overlap the values.
inline void store_tile(void* data, int32_t dtype, int64_t begin, int count, const float* __restrict values) {
    if (dtype == kFloat32) {
        float rounded[kTile];
        for (int t = 0; t < count; ++t) rounded[t] = canonical(values[t]);
        memcpy(static_cast<char*>(data) + 4 * begin, rounded, 4 * static_cast<size_t>(count));
        return;
    }
    uint16_t rounded[kTile];
    if (dtype == kBFloat16) {
        for (int t = 0; t < count; ++t) rounded[t] = round_bfloat16(values[t]);
    } else {
        for (int t = 0; t < count; ++t) rounded[t] = round_float16(values[t]);
    }
    memcpy(static_cast<char*>(data) + 2 * begin, rounded, 2 * static_cast<size_t>(count));
}

inline void key_tile(int count, const float* __restrict values, uint32_t* __restrict keys) {
    for (int t = 0; t < count; ++t) keys[t] = magnitude_key(values[t]);
}

}  // namespace
FM_NAMESPACE_END
