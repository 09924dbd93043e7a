// What a model keeps of a tile, whatever the rule: the step that the exact sums and the merge share.
#pragma once

#include "cpu/kernels/select.h"
#include "cpu/kernels/words.h"

FM_NAMESPACE_BEGIN
namespace {

// Scratch for DELLA's rows. A row's keys are counted into bins fine enough that a bin's span of ranks decides nearly
// every element against its random word; the few left over are ranked exactly by looking through the row again.
struct DellaScratch {
    uint32_t* keys;  // [row_length]
    uint32_t* bin;   // [row_length]
    uint32_t* span;  // [4 * kDellaBins]
    uint8_t* keep;   // [n, row_length]
};

constexpr int kDellaBins = 4096;

inline size_t aligned(size_t bytes) { return (bytes + 63) & ~static_cast<size_t>(63); }

inline size_t della_bytes(int32_t models, int64_t row_length) {
    if (row_length > cpu::kLongRow) return 0;
    size_t length = static_cast<size_t>(row_length);
    return 2 * aligned(4 * length) + aligned(16 * kDellaBins) + aligned(length * static_cast<size_t>(models));
}

inline DellaScratch della_scratch(char* memory, int64_t row_length) {
    DellaScratch scratch;
    size_t length = static_cast<size_t>(row_length);
    scratch.keys = reinterpret_cast<uint32_t*>(memory);
    memory += aligned(4 * length);
    scratch.bin = reinterpret_cast<uint32_t*>(memory);
    memory += aligned(4 * length);
    scratch.span = reinterpret_cast<uint32_t*>(memory);
    memory += aligned(16 * kDellaBins);
    scratch.keep = reinterpret_cast<uint8_t*>(memory);
    return scratch;
}

// Decides DELLA for one short row of one model into keep[0 .. row_length - 1].
void della_row(const Models& models, const Rule& rule, int32_t model, int64_t begin, const DellaScratch& scratch,
               uint8_t* keep);

// The same for a tile of a long row, whose keys the driver has sorted.
void della_long_tile(const Rule& rule, int32_t model, int count, const float* delta, const uint32_t* words,
                     uint32_t* keep);

// keep[t] = all ones or 0 by the bits that were set before; `begin` is a multiple of 8.
inline void mask_tile(const uint8_t* mask, int64_t begin, int count, uint32_t* __restrict keep) {
    const uint8_t* from = mask + begin / 8;
    int t = 0;
    for (; t + 32 <= count; t += 32) {
        uint32_t bits;
        memcpy(&bits, from + t / 8, 4);
        for (int j = 0; j < 32; ++j) keep[t + j] = 0u - ((bits >> j) & 1u);
    }
    for (; t < count; ++t) keep[t] = 0u - ((static_cast<uint32_t>(from[t / 8]) >> (t % 8)) & 1u);
}

// Sets bits by bytes that are 1 where an element is kept. Bytes that other ranges share are not written by others now.
inline void set_bits(const uint8_t* keep, int64_t begin, int64_t count, uint8_t* mask) {
    int64_t t = 0;
    auto one = [&] {
        mask[(begin + t) / 8] |= static_cast<uint8_t>(keep[t] << ((begin + t) % 8));
        ++t;
    };
    while (t < count && (begin + t) % 8 != 0) one();
    for (; t + 8 <= count; t += 8) {
        uint64_t eight;
        memcpy(&eight, keep + t, 8);
        mask[(begin + t) / 8] = static_cast<uint8_t>((eight * 0x0102040810204080ull) >> 56);
    }
    while (t < count) one();
}

// keep[t] = all ones or 0 for one model. `della_keep` holds the decisions of the short row that the tile lies in,
// counted from `row_begin`; `cursor` is the model's cursor for bands.
inline void keep_tile(const Rule& rule, int32_t model, int64_t begin, int count, const float* delta, BandCursor& cursor,
                      const uint8_t* della_keep, uint32_t* buffer, uint32_t* __restrict keep) {
    if (rule.method == kBand) {
        band_keep(cursor, count, delta, keep);
        return;
    }
    if (rule.method == kMask) {
        mask_tile(rule.masks + model * rule.mask_stride, begin, count, keep);
        return;
    }
    if (rule.method == kKeepAll || rule.density[model] >= 1.0) {
        for (int t = 0; t < count; ++t) keep[t] = 0xffffffffu;
        return;
    }
    if (!(rule.density[model] > 0.0)) {
        for (int t = 0; t < count; ++t) keep[t] = 0u;
        return;
    }
    if (rule.method == kDella && rule.sorted_row == nullptr) {
        for (int t = 0; t < count; ++t) keep[t] = della_keep[t] ? 0xffffffffu : 0u;
        return;
    }
    const uint32_t* word = word_tile(rule.streams[model], rule.offset + static_cast<uint64_t>(begin), count, buffer);
    if (rule.method == kBernoulli) {
        uint32_t limit = static_cast<uint32_t>(keep_limit(rule.density[model]));
        for (int t = 0; t < count; ++t) keep[t] = word[t] < limit ? 0xffffffffu : 0u;
    } else {
        della_long_tile(rule, model, count, delta, word, keep);
    }
}

}  // namespace
FM_NAMESPACE_END
