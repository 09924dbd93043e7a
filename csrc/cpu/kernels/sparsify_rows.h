// DELLA's ranks: exact integer ranks along a row, ties sharing the middle one.
#pragma once

#include "cpu/kernels/sparsify.h"

FM_NAMESPACE_BEGIN
namespace {

// Up to 2^32: density + epsilon lies below 1, but the sum that the formula takes may round to it.
FM_INLINE uint64_t della_limit(const Rule& rule, int32_t model, int64_t twice_rank) {
    return keep_limit(della_probability(rule.density[model], rule.epsilon[model], twice_rank, rule.row_length));
}

// The row's bins. Zeros have bin 0 to themselves, so that they do not stretch the range that the others share.
struct DellaBins {
    uint32_t least;
    int shift, count;
};

inline DellaBins della_bins(const uint32_t* keys, int64_t length, uint32_t* __restrict bin) {
    // One less than each key: zero wraps to the top and does not count for the minimum.
    uint32_t most = 0, least_less_one = 0xffffffffu;
    for (int64_t i = 0; i < length; ++i) {
        uint32_t less_one = keys[i] - 1u;
        most = keys[i] > most ? keys[i] : most;
        least_less_one = less_one < least_less_one ? less_one : least_less_one;
    }
    uint32_t least = least_less_one + 1u;  // 0 where there are only zeros
    if (least == 0) least = most = 1;
    int64_t wanted = length < 64 * 4 ? 64 : (length / 4 < kDellaBins - 2 ? length / 4 : kDellaBins - 2);
    int shift = 0;
    while (static_cast<int64_t>((most - least) >> shift) >= wanted) ++shift;
    for (int64_t i = 0; i < length; ++i) {
        uint32_t key = keys[i];
        bin[i] = key == 0 ? 0u : ((key - least) >> shift) + 1u;
    }
    return {least, shift, static_cast<int>((most - least) >> shift) + 2};
}

// span[b] = keys in lower bins | (keys in the bin - 1) << 16
inline void della_spans(const uint32_t* __restrict bin, int64_t length, int count, uint32_t* span) {
    // Four sets of bins, so that neighbours that are equal, as zeros often are, do not wait for one counter.
    for (int b = 0; b < 4 * count; ++b) span[b] = 0;
    uint32_t *second = span + count, *third = second + count, *fourth = third + count;
    int64_t i = 0;
    for (; i + 4 <= length; i += 4) {
        span[bin[i]] += 1;
        second[bin[i + 1]] += 1;
        third[bin[i + 2]] += 1;
        fourth[bin[i + 3]] += 1;
    }
    for (; i < length; ++i) span[bin[i]] += 1;
    for (int b = 0; b < count; ++b) span[b] += second[b] + third[b] + fourth[b];
    uint32_t below = 0;
    for (int b = 0; b < count; ++b) {
        uint32_t here = span[b];
        span[b] = below | ((here - 1u) << 16);
        below += here;
    }
    // Zeros all share the middle of their ranks 0 .. n - 1: n / 2 rounded both ways.
    uint32_t zeros = count > 1 ? (span[1] & 0xffffu) : static_cast<uint32_t>(length);
    if (zeros > 0) span[0] = ((zeros - 1u) / 2u) | (((zeros - 1u) & 1u) << 16);
}

// Limits of keys that were looked up already: equal deltas are the norm in half precision.
struct LimitCache {
    uint32_t key[64];
    uint64_t limit[64];
};

inline uint64_t della_exact_limit(const Rule& rule, int32_t model, const uint32_t* keys, uint32_t key,
                                  LimitCache& cache) {
    uint32_t slot = (key * 0x9E3779B9u) >> 26;
    if (cache.key[slot] == key) return cache.limit[slot];
    int32_t below = 0, equal = 0;
    for (int64_t i = 0; i < rule.row_length; ++i) {
        below += keys[i] < key ? 1 : 0;
        equal += keys[i] == key ? 1 : 0;
    }
    cache.key[slot] = key;
    cache.limit[slot] = della_limit(rule, model, 2 * static_cast<int64_t>(below) + equal - 1);
    return cache.limit[slot];
}

inline void della_row(const Models& models, const Rule& rule, int32_t model, int64_t begin, const DellaScratch& scratch,
                      uint8_t* keep) {
    int64_t length = rule.row_length;
    uint32_t* keys = scratch.keys;
    float base[kTile], delta[kTile];
    for (int64_t done = 0; done < length; done += kTile) {
        int tile = static_cast<int>(smaller(kTile, length - done));
        base_tile(models, begin + done, tile, base);
        delta_tile(models, model, begin + done, tile, base, delta);
        key_tile(tile, delta, keys + done);
    }
    DellaBins bins = della_bins(keys, length, scratch.bin);
    della_spans(scratch.bin, length, bins.count, scratch.span);

    // Limits in units of 2^-31 from the bin's lowest and highest rank, in single precision with slack for its rounding:
    // outside them the element is decided, between them its exact rank is looked up. Where all keys of a row tie (or
    // all zeros do), the exact rank is the middle of the bin and lies between them too.
    float scale = 2147483648.0f;
    float low = static_cast<float>((rule.density[model] - rule.epsilon[model]) * 2147483648.0);
    float step = length == 1
                     ? 0.0f
                     : static_cast<float>(2.0 * rule.epsilon[model] * 2147483648.0 / static_cast<double>(length - 1));
    if (length == 1) low = static_cast<float>(rule.density[model] * 2147483648.0);
    float slack = scale * 1e-6f;
    LimitCache cache;
    for (int i = 0; i < 64; ++i) cache.key[i] = 0xffffffffu;
    uint32_t buffer[kTile + kWordSlack];
    uint8_t verdict[kTile];
    for (int64_t done = 0; done < length; done += kTile) {
        int tile = static_cast<int>(smaller(kTile, length - done));
        const uint32_t* __restrict word =
            word_tile(rule.streams[model], rule.offset + static_cast<uint64_t>(begin + done), tile, buffer);
        const uint32_t* __restrict bin = scratch.bin + done;
        const uint32_t* __restrict span = scratch.span;
        int open = 0;
        for (int t = 0; t < tile; ++t) {
            uint32_t packed = span[bin[t]];
            float lowest = static_cast<float>(static_cast<int32_t>(packed & 0xffffu));
            float width = static_cast<float>(static_cast<int32_t>(packed >> 16));
            float bottom = low + lowest * step - slack;
            int32_t all = static_cast<int32_t>(bottom < 2147483520.0f ? bottom : 2147483520.0f);
            float top = low + (lowest + width) * step + slack;
            int32_t none = top < 2147483520.0f ? static_cast<int32_t>(top) : 0x7fffffff;
            int32_t half = static_cast<int32_t>(word[t] >> 1);
            int undecided = half >= all && half <= none;
            verdict[t] = static_cast<uint8_t>(half < all ? 1 : 2 * undecided);
            open += undecided;
        }
        for (int t = 0; t < tile; ++t) keep[done + t] = verdict[t] & 1;
        if (open == 0) continue;
        for (int t = 0; t < tile; ++t) {
            if (t % 8 == 0 && t + 8 <= tile) {
                uint64_t eight;
                memcpy(&eight, verdict + t, 8);
                if ((eight & 0x0202020202020202ull) == 0) {
                    t += 7;
                    continue;
                }
            }
            if (verdict[t] != 2) continue;
            keep[done + t] = word[t] < della_exact_limit(rule, model, keys, keys[done + t], cache);
        }
    }
}

// First index of `sorted` whose key is >= key (or > key).
FM_INLINE int64_t first_at_least(const uint32_t* sorted, int64_t length, uint64_t key) {
    int64_t low = 0, high = length;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (sorted[middle] < key) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

inline void della_long_tile(const Rule& rule, int32_t model, int count, const float* delta, const uint32_t* words,
                            uint32_t* keep) {
    const uint32_t* sorted = rule.sorted_row[model];
    uint64_t least = della_limit(rule, model, 0);
    uint64_t most = della_limit(rule, model, 2 * (rule.row_length - 1));
    for (int t = 0; t < count; ++t) {
        bool kept = words[t] < least;
        if (!kept && words[t] < most) {
            uint32_t key = magnitude_key(delta[t]);
            int64_t first = first_at_least(sorted, rule.row_length, key);
            int64_t last = first_at_least(sorted, rule.row_length, static_cast<uint64_t>(key) + 1) - 1;
            kept = words[t] < della_limit(rule, model, first + last);
        }
        keep[t] = kept ? 0xffffffffu : 0u;
    }
}

}  // namespace
FM_NAMESPACE_END
