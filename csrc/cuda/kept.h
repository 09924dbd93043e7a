// What a model keeps of the eight elements of a thread: the step that the exact sums, the masks and the merge share.
//
// What is the same for a whole tie block is worked out before its first tile. Of a band these are two limits of
// magnitudes. Where a bound splits equals it is looked for the element behind which they are past the bound, so that
// tiles know by their place, too, and threads need not count together.
#pragma once

#include "cuda/tile.h"

FM_NAMESPACE_BEGIN
namespace cuda {

constexpr int32_t kNowhere = 0x7fffffff;

// A block takes a part of a tie block: at most so many tiles, fewer where there would not be so many parts.
constexpr int kLongestPart = 8;
constexpr int kPartsPerProcessor = 16;

// Elements in a part, where there are `numel` elements in all: long enough that what is worked out for each part does
// not count, and enough parts to keep all processors busy.
inline int64_t part_of_so_many(int64_t numel, int64_t processors) {
    int64_t tiles = kLongestPart;
    while (tiles > 1 && numel / (tiles * kTile) < kPartsPerProcessor * processors) tiles /= 2;
    return tiles * kTile;
}

// What one model keeps of a tie block.
struct Kept {
    // A band: past a bound are the magnitudes, as bits, below `before`, and from element `from` on those below `after`.
    uint32_t before[2], after[2];
    int32_t from[2];       // counted from the tie block's begin
    int32_t split;         // bit b: bound b splits equals within this tie block
    int32_t left[2];       // how many of them are before the bound
    uint32_t least, span;  // unless it does: twice the magnitudes from `least` to `least + span` are kept
    uint32_t threshold[2];
    // Random words: those below `limit`, or every one.
    uint32_t limit, every;
    PhiloxStream stream;
    const uint8_t* mask;
};

// Of keys all NaNs are one, of bits they are not: the bits that are below a key.
FM_INLINE uint32_t bits_below(uint32_t key) {
    if (key > kNanBits) return kKeyEnd;
    return key > kInfBits ? kInfBits + 1 : key;
}

// For model number `model`. bounds: its two, ties_before: of its first bound in this tie block, last: whether the
// tensor has no tie block after it.
FM_DEVICE void open_kept(const Rule& rule, int32_t model, const int64_t* bounds, const int64_t* ties_before, bool last,
                         uint64_t tensor_id, Kept& kept) {
    kept.split = 0;
    kept.every = 1;
    if (rule.method == kBand) {
        for (int b = 0; b < 2; ++b) {
            int64_t threshold = bounds[2 * b], ties = bounds[2 * b + 1];
            uint32_t key = static_cast<uint32_t>(threshold);
            kept.left[b] = 0;
            kept.from[b] = kNowhere;
            kept.threshold[b] = key;
            if (ties > 0) {
                const int64_t* before = ties_before + b * rule.blocks;
                int64_t left = ties - before[0];
                if (left <= 0) {
                    kept.from[b] = 0;
                } else if (last || before[1] > ties) {
                    kept.split |= 1 << b;
                    kept.left[b] = static_cast<int32_t>(smaller(left, kNowhere));
                }
            }
            kept.before[b] = bits_below(kept.from[b] == 0 ? key + 1 : key);
            kept.after[b] = bits_below(ties > 0 ? key + 1 : key);
        }
        // Doubled bits are even: none of them is 1.
        uint32_t high = kept.before[0], low = kept.before[1];
        kept.least = low < high ? low << 1 : 1u;
        kept.span = low < high ? ((high - low) << 1) - 1u : 0u;
    } else if (rule.method == kBernoulli) {
        kept.every = (rule.limit[model] >> 32) != 0 ? 1 : 0;
        kept.limit = static_cast<uint32_t>(rule.limit[model]);
        kept.stream = philox_stream(rule.seed, tensor_id, rule.stream[model]);
    } else if (rule.method == kMask) {
        kept.mask = rule.masks + model * rule.mask_stride;
    }
}

// The delta of one model, or the model where nothing is subtracted. Elements past the end are 0.
FM_DEVICE void delta_at(Array base, bool subtract, Array x, int32_t compute, int64_t at, int64_t end, float* delta) {
    // Both loads before the first use, so that they are under way together.
    Raw<true> raw, raw_base;
    load_raw<true>(x, at, end, false, raw);
    if (subtract) load_raw<true>(base, at, end, false, raw_base);
    delta_of<true>(raw, x.dtype, subtract, raw_base, base.dtype, compute, delta);
    if (at + kEach <= end) return;
    FM_UNROLL
    for (int t = 0; t < kEach; ++t) delta[t] = at + t < end ? delta[t] : 0.0f;
}

// Finds where the bounds lie that split equals within the tie block from `begin` on, looking no further than `end`. By
// the whole block, after a barrier; ends with one. `partial` as for sum_before.
FM_DEVICE void find_cuts(Array base, bool subtract, Array x, int32_t compute, int64_t begin, int64_t end, Kept& kept,
                         uint32_t* partial) {
    constexpr int kRun = 4;  // times eight elements of a thread
    int32_t split = kept.split;
    uint32_t key0 = kept.threshold[0], key1 = kept.threshold[1];
    uint32_t left0 = (split & 1) ? static_cast<uint32_t>(kept.left[0]) : 0;
    uint32_t left1 = (split & 2) ? static_cast<uint32_t>(kept.left[1]) : 0;
    for (int64_t start = begin; start < end && (left0 > 0 || left1 > 0); start += kRun * kTile) {
        int64_t first = start + static_cast<int64_t>(thread()) * (kRun * kEach);
        uint32_t equal0 = 0, equal1 = 0;  // a bit for each element
        FM_ROLLED
        for (int run = 0; run < kRun; ++run) {
            int64_t at = first + run * kEach;
            if (at < end) {
                float delta[kEach];
                delta_at(base, subtract, x, compute, at, end, delta);
                FM_UNROLL
                for (int t = 0; t < kEach; ++t) {
                    uint32_t key = magnitude_key(delta[t]);
                    bool there = at + t < end;
                    equal0 |= there && key == key0 ? 1u << (run * kEach + t) : 0u;
                    equal1 |= there && key == key1 ? 1u << (run * kEach + t) : 0u;
                }
            }
        }
        uint32_t total;
        uint32_t own = static_cast<uint32_t>(count_bits(equal0)) | static_cast<uint32_t>(count_bits(equal1)) << 16;
        uint32_t before = sum_before(own, partial, &total);
        for (int b = 0; b < 2; ++b) {
            uint32_t equal = b == 0 ? equal0 : equal1;
            uint32_t lower = (before >> (16 * b)) & 0xffffu;
            uint32_t wanted = b == 0 ? left0 : left1;
            if (wanted > lower && wanted <= lower + static_cast<uint32_t>(count_bits(equal))) {
                // Of this thread's equals the one that is the last before the bound.
                for (uint32_t skipped = lower + 1; skipped < wanted; ++skipped) equal &= equal - 1;
                int32_t place = count_bits((equal & (0u - equal)) - 1u);
                kept.from[b] = static_cast<int32_t>(first - begin) + place + 1;
            }
        }
        left0 = left0 > (total & 0xffffu) ? left0 - (total & 0xffffu) : 0;
        left1 = left1 > (total >> 16) ? left1 - (total >> 16) : 0;
    }
    sync();
}

// Random words of elements index .. index + 7 of a tensor that are below the limit, as bits.
FM_DEVICE uint32_t drawn8(const Kept& kept, uint64_t index) {
    PhiloxStream stream = kept.stream;
    uint64_t counter = index >> 2;
    uint32_t lead = static_cast<uint32_t>(index & 3u);
    uint32_t bits = 0, limit = kept.limit;
    // Philox once, in a loop: words are compared at once, and only bits are kept.
    int32_t count = lead == 0 ? 2 : 3;
    for (int32_t i = 0; i < count; ++i) {
        PhiloxBlock block = philox_at(stream, counter + static_cast<uint64_t>(i));
        FM_UNROLL
        for (int t = 0; t < 4; ++t) bits |= (block.word[t] < limit ? 1u : 0u) << (4 * i + t);
    }
    return (bits >> lead) & 0xffu;
}

// What is kept of elements at .. at + 7, a bit for each, where the rule does not look at values.
FM_DEVICE uint32_t kept_bits(const Rule& rule, const Kept& kept, int64_t at) {
    if (rule.method == kMask) return kept.mask[at / kEach];
    if (rule.method == kBernoulli && kept.every == 0) return drawn8(kept, rule.offset + static_cast<uint64_t>(at));
    return 0xffu;
}

// Calls each(t, whether the band keeps delta[t]); place: of the first element in its tie block.
template <class Each>
FM_DEVICE void each_in_band(const Kept& kept, int32_t place, const float* delta, const Each& each) {
    if (kept.split == 0) {
        uint32_t least = kept.least, span = kept.span;
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) each(t, bit_cast<uint32_t>(delta[t]) * 2u - least <= span);
        return;
    }
    uint32_t before0 = kept.before[0], before1 = kept.before[1], after0 = kept.after[0], after1 = kept.after[1];
    int32_t from0 = kept.from[0], from1 = kept.from[1];
    FM_UNROLL
    for (int t = 0; t < kEach; ++t) {
        uint32_t magnitude = bit_cast<uint32_t>(delta[t]) & 0x7fffffffu;
        uint32_t high = place + t >= from0 ? after0 : before0;
        uint32_t low = place + t >= from1 ? after1 : before1;
        each(t, magnitude < high && magnitude >= low);
    }
}

}  // namespace cuda
FM_NAMESPACE_END
