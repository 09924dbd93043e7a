// Tiles: a thread has eight elements that follow each other, a block has as many threads as that makes a tile. Loads
// are 16 bytes wide wherever the data begin, stores as wide as their address lets them be. The last elements of a
// tensor are taken one by one.
#pragma once

#include "cuda/device.h"
#include "cuda/kernels.h"
#include "fastmerge/keys.h"

FM_NAMESPACE_BEGIN
namespace cuda {

constexpr int kThreads = 256;
constexpr int kEach = 8;                 // elements of a thread
constexpr int kTile = kThreads * kEach;  // elements of a block at a time
constexpr int kWarps = kThreads / 32;
constexpr int kTilesPerTieBlock = static_cast<int>(kTieBlock / kTile);

FM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A tensor from one of its elements on.
FM_INLINE Array from_element(Array x, int64_t i) {
    return {static_cast<const char*>(x.data) + dtype_size(x.dtype) * i, x.dtype};
}

// --- loads
// ------------------------------------------------------------------------------------------------------------

// Sixteen bytes that begin at byte `shift` (1 to 15) of the first of two words of 16 bytes.
FM_DEVICE void shifted16(const uint32_t* first, const uint32_t* second, uint32_t shift, uint32_t* out) {
    uint32_t all[8] = {first[0], first[1], first[2], first[3], second[0], second[1], second[2], second[3]};
    // By selects, for an array that is indexed by a variable is kept in memory.
    FM_UNROLL
    for (int i = 0; i < 6; ++i) all[i] = (shift & 8u) ? all[i + 2] : all[i];
    FM_UNROLL
    for (int i = 0; i < 5; ++i) all[i] = (shift & 4u) ? all[i + 1] : all[i];
    uint32_t bits = 8u * (shift & 3u);
    FM_UNROLL
    for (int i = 0; i < 4; ++i) out[i] = from_bit(all[i], all[i + 1], bits);
}

// Eight elements as they lie in memory, of types of 16 bits or (kWide) of any: so that loads of several tensors are
// under way before the first of them is waited for.
template <bool kWide>
struct Raw {
    uint32_t word[kWide ? 8 : 4];
};

// Sixteen bytes from anywhere, 0 for those at `limit` and past it, where the data end: not a byte is read there. Where
// they do not begin at a multiple of 16 the two words of 16 bytes that they lie in are read; memory is given out in
// whole ones, so that the first may begin before the data. The last bytes of a tensor are read one by one.
FM_DEVICE void load_bytes_before(const char* from, const char* limit, uint32_t* out) {
    uint32_t shift = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(from) & 15u);
    const char* start = from - shift;
    if (start + (shift == 0 ? 16 : 32) <= limit) {
        Words4 first = load16(start);
        if (shift != 0) {
            shifted16(first.word, load16(start + 16).word, shift, out);
            return;
        }
        FM_UNROLL
        for (int i = 0; i < 4; ++i) out[i] = first.word[i];
        return;
    }
    FM_UNROLL
    for (int i = 0; i < 4; ++i) out[i] = 0;
    FM_ROLLED
    for (int i = 0; i < 16 && from + i < limit; ++i) {
        uint32_t byte = load_byte(from + i) << (8 * (i % 4));
        FM_UNROLL
        for (int word = 0; word < 4; ++word) out[word] |= i / 4 == word ? byte : 0u;
    }
}

// Elements at .. at + 7; those from `end` on are rubbish. simple: the data begin at a multiple of 16 bytes, and none of
// the eight is past the end.
template <bool kWide>
FM_DEVICE void load_raw(Array x, int64_t at, int64_t end, bool simple, Raw<kWide>& out) {
    int64_t size = kWide ? dtype_size(x.dtype) : 2;
    const char* from = static_cast<const char*>(x.data) + size * at;
    if (simple) {
        Words4 first = load16(from);
        FM_UNROLL
        for (int i = 0; i < 4; ++i) out.word[i] = first.word[i];
        if (kWide) {
            // The same ones again where there are no more: no branch stands between the loads.
            Words4 second = load16(from + (size == 4 ? 16 : 0));
            FM_UNROLL
            for (int i = 0; i < 4; ++i) out.word[kWide ? 4 + i : i] = second.word[i];
        }
        return;
    }
    const char* limit = static_cast<const char*>(x.data) + size * end;
    load_bytes_before(from, limit, out.word);
    if (kWide && size == 4) load_bytes_before(from + 16, limit, out.word + (kWide ? 4 : 0));
}

template <bool kWide>
FM_DEVICE void widen_raw(const Raw<kWide>& raw, int32_t dtype, float* out) {
    if (kWide && dtype == kFloat32) {
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) out[t] = bit_cast<float>(raw.word[kWide ? t : 0]);
    } else if (dtype == kBFloat16) {
        FM_UNROLL
        for (int i = 0; i < 4; ++i) {
            out[2 * i] = bit_cast<float>(raw.word[i] << 16);
            out[2 * i + 1] = bit_cast<float>(raw.word[i] & 0xffff0000u);
        }
    } else {
        FM_UNROLL
        for (int i = 0; i < 4; ++i) {
            out[2 * i] = widen_float16(static_cast<uint16_t>(raw.word[i]));
            out[2 * i + 1] = widen_float16(static_cast<uint16_t>(raw.word[i] >> 16));
        }
    }
}

// Elements at .. at + 7 as float32; those from `end` on are 0.
FM_DEVICE void load8(Array x, int64_t at, int64_t end, float* out) {
    Raw<true> raw;
    load_raw<true>(x, at, end, false, raw);
    widen_raw<true>(raw, x.dtype, out);
    if (at + kEach <= end) return;
    FM_UNROLL
    for (int t = 0; t < kEach; ++t) out[t] = at + t < end ? out[t] : 0.0f;
}

// The bits of element i, which is there, at a multiple of its size.
FM_DEVICE uint32_t bits_at(Array x, int64_t i) {
    const char* from = static_cast<const char*>(x.data) + dtype_size(x.dtype) * i;
    return x.dtype == kFloat32 ? load4bytes(from) : load2bytes(from);
}

FM_DEVICE float widened(uint32_t bits, int32_t dtype) {
    if (dtype == kFloat32) return bit_cast<float>(bits);
    return dtype == kBFloat16 ? bit_cast<float>(bits << 16) : widen_float16(static_cast<uint16_t>(bits));
}

FM_INLINE void round8(int32_t compute, float* values) {
    if (compute == kBFloat16) {
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) values[t] = widen_bfloat16(round_bfloat16(values[t]));
    } else if (compute == kFloat16) {
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) values[t] = widen_float16(round_float16(values[t]));
    }
}

// The inputs themselves as the compute dtype holds them.
FM_DEVICE void load_rounded(Array x, int32_t compute, int64_t at, int64_t end, float* out) {
    load8(x, at, end, out);
    if (x.dtype != compute) round8(compute, out);
}

// round_C(model - base), or round_C(model) where nothing is subtracted. `base` holds load_rounded of the base.
FM_DEVICE void delta8(Array x, bool subtract, int32_t compute, int64_t at, int64_t end, const float* base, float* out) {
    load_rounded(x, compute, at, end, out);
    if (!subtract) return;
    FM_UNROLL
    for (int t = 0; t < kEach; ++t) out[t] = out[t] - base[t];
    round8(compute, out);
}

// The same of eight numbers as they lie in memory, those of the base, too.
template <bool kWide>
FM_DEVICE void delta_of(const Raw<kWide>& x, int32_t dtype, bool subtract, const Raw<kWide>& base, int32_t base_dtype,
                        int32_t compute, float* delta) {
    widen_raw<kWide>(x, dtype, delta);
    if (dtype != compute) round8(compute, delta);
    if (!subtract) return;
    float reference[kEach];
    widen_raw<kWide>(base, base_dtype, reference);
    if (base_dtype != compute) round8(compute, reference);
    FM_UNROLL
    for (int t = 0; t < kEach; ++t) delta[t] = delta[t] - reference[t];
    round8(compute, delta);
}

// --- stores
// -----------------------------------------------------------------------------------------------------------

FM_INLINE uint32_t rounded_bits(int32_t dtype, float value) {
    if (dtype == kFloat32) return bit_cast<uint32_t>(canonical(value));
    return dtype == kBFloat16 ? round_bfloat16(value) : round_float16(value);
}

// Eight values of a dtype as they lie in memory, in four words, or eight where it is float32.
FM_DEVICE void pack8(int32_t dtype, const float* values, uint32_t* words) {
    if (dtype == kFloat32) {
        FM_UNROLL
        for (int i = 0; i < kEach; ++i) words[i] = rounded_bits(kFloat32, values[i]);
        return;
    }
    // A GPU rounds two at once, but has a NaN of its own.
    bool nan = false;
    FM_UNROLL
    for (int i = 0; i < kEach; ++i) nan = nan || values[i] != values[i];
    if (nan) {
        FM_UNROLL
        for (int i = 0; i < 4; ++i) {
            words[i] = rounded_bits(dtype, values[2 * i]) | (rounded_bits(dtype, values[2 * i + 1]) << 16);
        }
    } else if (dtype == kBFloat16) {
        FM_UNROLL
        for (int i = 0; i < 4; ++i) words[i] = two_bfloat16(values[2 * i], values[2 * i + 1]);
    } else {
        FM_UNROLL
        for (int i = 0; i < 4; ++i) words[i] = two_float16(values[2 * i], values[2 * i + 1]);
    }
}

// Eight values as pack8 makes them.
FM_DEVICE void store_packed8(void* data, int32_t dtype, int64_t at, int64_t end, const uint32_t* words) {
    int64_t size = dtype_size(dtype);
    unsigned char* to = static_cast<unsigned char*>(data) + size * at;
    uint32_t past = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(to) & 15u);  // a multiple of 16
    if (at + kEach <= end && past == 0) {
        Words4 first = {{words[0], words[1], words[2], words[3]}}, second = {{words[4], words[5], words[6], words[7]}};
        store16(to, first);
        if (dtype == kFloat32) store16(to + 16, second);
        return;
    }
    if (at + kEach <= end && past % 4 == 0) {
        FM_UNROLL
        for (int i = 0; i < kEach; ++i) {
            if (i < 4 || dtype == kFloat32) store4bytes(to + 4 * i, words[i]);
        }
        return;
    }
    FM_UNROLL
    for (int t = 0; t < kEach; ++t) {
        if (at + t >= end) break;
        uint32_t bits = dtype == kFloat32 ? words[t] : words[t / 2] >> (16 * (t % 2));
        if (dtype != kFloat32 && past % 2 == 0) {
            store2bytes(to + 2 * t, bits);
        } else {
            for (int64_t i = 0; i < size; ++i) to[size * t + i] = static_cast<unsigned char>(bits >> (8 * i));
        }
    }
}

FM_DEVICE void store8(void* data, int32_t dtype, int64_t at, int64_t end, const float* values) {
    uint32_t words[kEach] = {0, 0, 0, 0, 0, 0, 0, 0};
    pack8(dtype, values, words);
    store_packed8(data, dtype, at, end, words);
}

// --- a block together
// -------------------------------------------------------------------------------------------------

// What the threads before this one have together, and what all have, over a block of kBlock. Called by all of them.
// `partial` is shared memory for kBlock / 32 + 1 numbers, not to be used for anything else before the next barrier.
template <int kBlock = kThreads>
FM_DEVICE uint32_t sum_before(uint32_t own, uint32_t* partial, uint32_t* total) {
    uint32_t upto = own;
    for (int distance = 1; distance < 32; distance *= 2) {
        uint32_t before = from_before(upto, distance);
        if (lane() >= distance) upto += before;
    }
    sync();
    if (lane() == 31) partial[thread() / 32] = upto;
    sync();
    uint32_t lower = 0, all = 0;
    FM_UNROLL
    for (int warp = 0; warp < kBlock / 32; ++warp) {
        uint32_t of_warp = partial[warp];
        lower += warp < thread() / 32 ? of_warp : 0u;
        all += of_warp;
    }
    *total = all;
    return lower + upto - own;
}

}  // namespace cuda
FM_NAMESPACE_END
