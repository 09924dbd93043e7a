#include "cuda/api.h"
#include "cuda/kept.h"
#include "fastmerge/exact_sum.h"

FM_NAMESPACE_BEGIN
namespace cuda {
namespace {

// --- NaN and Inf

// Whether none of eight numbers is NaN or infinite, by their bits, of 16-bit dtypes two at once. Numbers past the end
// may be taken for one.
template <bool kWide>
FM_DEVICE bool all_finite(const Raw<kWide>& raw, int32_t dtype) {
    uint32_t high = 0;  // a sign's bit is set where what is added to a magnitude makes it overflow
    if (kWide) {
        FM_UNROLL
        for (int i = 0; i < 8; ++i) high |= (raw.word[kWide ? i : 0] & 0x7fffffffu) + (0x80000000u - kInfBits);
        return (high & 0x80000000u) == 0;
    }
    uint32_t more = (0x8000u - (dtype == kBFloat16 ? 0x7f80u : 0x7c00u)) * 0x10001u;
    FM_UNROLL
    for (int i = 0; i < 4; ++i) high |= (raw.word[i] & 0x7fff7fffu) + more;
    return (high & 0x80008000u) == 0;
}

// Tiles of which a thread's loads are on their way together: 64 bytes.
template <bool kWide>
constexpr int kAtOnce = kWide ? 2 : 4;

// Calls look(at) for elements at .. at + 7 of a block's part that are not all finite, or lie past the end. They are
// few, and of what the loads bring only this is asked.
template <bool kWide, class Look>
FM_DEVICE void each_not_finite(Array x, int64_t begin, int64_t end, const Look& look) {
    constexpr int kTiles = kAtOnce<kWide>;
    bool aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
    for (int64_t at = begin + thread() * kEach; at < end; at += kTiles * kTile) {
        Raw<kWide> raw[kTiles];
        if (aligned && at + (kTiles - 1) * kTile + kEach <= end) {
            FM_UNROLL
            for (int i = 0; i < kTiles; ++i) load_raw<kWide>(x, at + i * kTile, end, true, raw[i]);
        } else {
            FM_UNROLL
            for (int i = 0; i < kTiles; ++i) load_raw<kWide>(x, at + i * kTile, end, false, raw[i]);
        }
        bool finite = true;
        FM_UNROLL
        for (int i = 0; i < kTiles; ++i) finite = finite && all_finite<kWide>(raw[i], x.dtype);
        if (finite) continue;
        FM_ROLLED
        for (int i = 0; i < kTiles; ++i) {
            if (at + i * kTile < end) look(at + i * kTile);
        }
    }
}

template <bool kWide>
FM_KERNEL(kThreads)
count_nonfinite_kernel(Array x, int64_t numel, int64_t part, int64_t* nan_and_inf) {
    int64_t begin = block() * part, end = smaller(numel, begin + part);
    uint32_t nans = 0, infs = 0;
    each_not_finite<kWide>(x, begin, end, [&](int64_t at) {
        float values[kEach];
        load8(x, at, end, values);
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) {
            uint32_t magnitude = bit_cast<uint32_t>(values[t]) & 0x7fffffffu;
            nans += magnitude > kInfBits ? 1u : 0u;
            infs += magnitude == kInfBits ? 1u : 0u;
        }
    });
    nans = sum_of_warp(nans);
    infs = sum_of_warp(infs);
    if (lane() == 0 && nans > 0) atomic_add(&nan_and_inf[0], static_cast<int64_t>(nans));
    if (lane() == 0 && infs > 0) atomic_add(&nan_and_inf[1], static_cast<int64_t>(infs));
}

template <bool kWide>
FM_KERNEL(kThreads)
zero_nonfinite_kernel(void* data, int32_t dtype, int64_t numel, int64_t part) {
    int64_t begin = block() * part, end = smaller(numel, begin + part);
    Array x = {data, dtype};
    each_not_finite<kWide>(x, begin, end, [&](int64_t at) {
        float values[kEach];
        load8(x, at, end, values);
        bool any = false;
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) {
            bool finite = (bit_cast<uint32_t>(values[t]) & 0x7fffffffu) < kInfBits;
            any = any || !finite;
            values[t] = finite ? values[t] : 0.0f;
        }
        if (any) store8(data, dtype, at, end, values);
    });
}

// Elements that a block looks at: no fewer than are loaded together.
int64_t part_of_loads(int32_t dtype, int64_t numel) {
    int64_t least = kTile * (dtype == kFloat32 ? kAtOnce<true> : kAtOnce<false>);
    int64_t part = part_of_so_many(numel, processors());
    return part < least ? least : part;
}

// --- one model in each block: exact sums, masks

// Neighbouring blocks take the same part of all models, so that the base is read once.
struct Each {
    Models models;
    Rule rule;
    int64_t part;
};

// The block's part of a model. Elements are counted from the part's first one.
struct Own {
    Array base, x;
    int64_t begin;  // in the tensor
    int32_t model;
    int32_t length;
    int32_t place;  // of the first element in its tie block
};

// What the block takes, and what is kept of it. By the whole block.
FM_DEVICE Own open_own(const Each& each, Kept& kept, uint32_t* partial) {
    const Models& models = each.models;
    Own own;
    own.model = static_cast<int32_t>(block() % models.count);
    own.begin = block() / models.count * each.part;
    own.length = static_cast<int32_t>(smaller(models.numel - own.begin, each.part));
    own.x = from_element(model_of(models, own.model), own.begin);
    own.base = from_element(models.base, own.begin);
    int64_t number = own.begin / kTieBlock;
    own.place = static_cast<int32_t>(own.begin - number * kTieBlock);
    if (thread() == 0) {
        open_kept(each.rule, own.model, each.rule.bounds + 4 * own.model,
                  each.rule.ties_before + 2 * own.model * each.rule.blocks + number, number + 1 >= each.rule.blocks,
                  each.rule.tensor_id, kept);
    }
    sync();
    if (kept.split != 0) {
        find_cuts(own.base, models.base.data != nullptr, own.x, models.compute, -own.place, own.length, kept, partial);
    }
    return own;
}

FM_DEVICE void own_delta(const Each& each, const Own& own, int32_t at, float* delta) {
    const Models& models = each.models;
    delta_at(own.base, models.base.data != nullptr, own.x, models.compute, at, own.length, delta);
}

// What is kept of eight elements, a bit for each; delta is looked at by bands alone.
FM_DEVICE uint32_t own_bits(const Each& each, const Own& own, const Kept& kept, int32_t at, const float* delta) {
    if (each.rule.method != kBand) return kept_bits(each.rule, kept, own.begin + at);
    uint32_t bits = 0;
    each_in_band(kept, own.place + at, delta, [&](int t, bool keep) { bits |= (keep ? 1u : 0u) << t; });
    return bits;
}

struct MaskShared {
    Kept kept;
    uint32_t partial[kWarps + 1];
};

FM_KERNEL_RESIDENT(kThreads, 3) kept_masks_kernel(FM_LARGE Each each, uint8_t* masks) {
    MaskShared& mine = shared<MaskShared>();
    Own own = open_own(each, mine.kept, mine.partial);
    uint8_t* mask = masks + own.model * ((each.models.numel + 7) / 8) + own.begin / 8;
    for (int32_t at = thread() * kEach; at < own.length; at += kTile) {
        float delta[kEach];
        if (each.rule.method == kBand) own_delta(each, own, at, delta);
        uint32_t bits = own_bits(each, own, mine.kept, at, delta);
        if (at + kEach > own.length) bits &= (1u << (own.length - at)) - 1u;
        mask[at / kEach] = static_cast<uint8_t>(bits);
    }
}

// Mantissas are added in units of 2^32, 2^64 and so on, each by each thread for itself: 256 times 55 bits fit 64.
constexpr int kGroups = 8;
static_assert(kTieBlock / kThreads <= 256, "a thread's sums do not overflow");

struct MassShared {
    uint64_t sum[2][kGroups][kThreads];  // of all, of those that are kept
    Kept kept;
    uint32_t partial[kWarps + 1];
};

FM_KERNEL(kThreads) l1_sums_kernel(FM_LARGE Each each, int64_t* limbs) {
    MassShared& mine = shared<MassShared>();
    FM_UNROLL
    for (int group = 0; group < kGroups; ++group) mine.sum[0][group][thread()] = mine.sum[1][group][thread()] = 0;
    Own own = open_own(each, mine.kept, mine.partial);
    // The sums of one group are in registers: neighbours are of one size mostly.
    uint64_t all = 0, some = 0;
    int group = 0;
    auto put_aside = [&] {
        mine.sum[0][group][thread()] += all;
        mine.sum[1][group][thread()] += some;
        all = some = 0;
    };
    for (int32_t at = thread() * kEach; at < own.length; at += kTile) {
        float delta[kEach];
        own_delta(each, own, at, delta);
        uint32_t bits = own_bits(each, own, mine.kept, at, delta);
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) {
            uint32_t key = bit_cast<uint32_t>(delta[t]) & 0x7fffffffu;
            // What is not finite has no mass; what is past the end is 0.
            uint32_t mantissa = key < kInfBits ? magnitude_mantissa(key) : 0u;
            int place = magnitude_place(key);
            if (mantissa != 0 && place >> 5 != group) {
                put_aside();
                group = place >> 5;
            }
            uint64_t mass = static_cast<uint64_t>(mantissa) << (place & 31);
            all += mass;
            some += (bits >> t) & 1u ? mass : 0;
        }
    }
    put_aside();
    sync();
    for (int which = thread() / 32; which < 2 * kGroups; which += kWarps) {
        const uint64_t* sums = mine.sum[which / kGroups][which % kGroups];
        uint64_t low = 0, high = 0;
        for (int i = lane(); i < kThreads; i += 32) {
            low += sums[i] & 0xffffffffu;
            high += sums[i] >> 32;
        }
        for (int mask = 16; mask > 0; mask /= 2) {
            low += from_across(low, mask);
            high += from_across(high, mask);
        }
        if (lane() == 0 && (low | high) != 0) {
            // Below 2^33 each, so that no number of blocks overflows a limb.
            int64_t* limb = limbs + (2 * own.model + which / kGroups) * kLimbs + which % kGroups;
            atomic_add(limb, static_cast<int64_t>(low & 0xffffffffu));
            atomic_add(limb + 1, static_cast<int64_t>((low >> 32) + (high & 0xffffffffu)));
            if (high >> 32 != 0) atomic_add(limb + 2, static_cast<int64_t>(high >> 32));
        }
    }
}

FM_KERNEL(kThreads) carry_kernel(int64_t* limbs, int32_t sums) {
    if (thread() >= sums) return;
    int64_t* mine = limbs + thread() * kLimbs;
    uint64_t carried = 0;
    for (int i = 0; i < kLimbs; ++i) {
        carried += static_cast<uint64_t>(mine[i]);
        mine[i] = static_cast<int64_t>(carried & 0xffffffffu);
        carried >>= 32;
    }
}
static_assert(2 * kMostModels <= kThreads, "a thread for each sum");

// --- DELLA: ranks within rows

FM_DEVICE void row_delta(const Rows& rows, int64_t at, int64_t end, float* delta) {
    delta_at(rows.base, rows.base.data != nullptr, rows.x, rows.compute, at, end, delta);
}

FM_KERNEL(kThreads) row_keys_kernel(Rows rows, int32_t* keys) {
    int64_t end = rows.count * rows.length, at = block() * kTile + thread() * kEach;
    if (at >= end) return;
    float delta[kEach];
    row_delta(rows, at, end, delta);
    if (at + kEach <= end) {
        // Memory from PyTorch begins at a multiple of 16 bytes.
        FM_UNROLL
        for (int half = 0; half < 2; ++half) {
            Words4 four;
            FM_UNROLL
            for (int i = 0; i < 4; ++i) four.word[i] = magnitude_key(delta[4 * half + i]);
            store16(keys + at + 4 * half, four);
        }
        return;
    }
    FM_UNROLL
    for (int t = 0; t < kEach; ++t) {
        if (at + t < end) keys[at + t] = static_cast<int32_t>(magnitude_key(delta[t]));
    }
}

// How many of the sorted keys are below `key`.
FM_DEVICE int64_t count_below(const int32_t* sorted, int64_t length, int32_t key) {
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

FM_DEVICE uint64_t rank_limit(const Rows& rows, int64_t twice_rank) {
    return keep_limit(della_probability(rows.density, rows.epsilon, twice_rank, rows.length));
}

FM_KERNEL(kThreads) row_masks_kernel(Rows rows, const int32_t* sorted, uint8_t* mask) {
    int64_t end = rows.count * rows.length, at = block() * kTile + thread() * kEach;
    if (at >= end) return;
    // Rounding keeps the order, so that the limits of all ranks lie between those of the first and the last.
    uint64_t least = rank_limit(rows, 0), most = rank_limit(rows, 2 * (rows.length - 1));
    PhiloxStream stream = philox_stream(rows.seed, rows.tensor_id, rows.stream);
    uint64_t index = rows.offset + static_cast<uint64_t>(at);
    uint32_t lead = static_cast<uint32_t>(index & 3u);
    float delta[kEach];
    row_delta(rows, at, end, delta);
    int64_t row = at / rows.length, next = (row + 1) * rows.length;
    uint32_t kept = 0;
    PhiloxBlock words = philox_at(stream, index >> 2);
    FM_UNROLL
    for (int t = 0; t < kEach; ++t) {
        if (at + t >= end) break;
        if (at + t == next) {
            ++row;
            next += rows.length;
        }
        uint32_t which = (lead + static_cast<uint32_t>(t)) & 3u;
        if (which == 0 && t > 0) words = philox_at(stream, (index + static_cast<uint64_t>(t)) >> 2);
        uint32_t low = which & 1u ? words.word[1] : words.word[0], high = which & 1u ? words.word[3] : words.word[2];
        uint32_t word = which & 2u ? high : low;
        bool keep = word < least;
        if (!keep && word < most) {
            const int32_t* own = sorted + row * rows.length;
            int32_t key = static_cast<int32_t>(magnitude_key(delta[t]));
            int64_t first = count_below(own, rows.length, key);
            int64_t last = first + count_below(own + first, rows.length - first, key + 1) - 1;
            keep = word < rank_limit(rows, first + last);
        }
        kept |= (keep ? 1u : 0u) << t;
    }
    mask[at / kEach] = static_cast<uint8_t>(kept);
}

}  // namespace

int kept_masks(Place place, const Models& models, const Rule& rule, uint8_t* masks) {
    int64_t part = part_of_so_many(models.numel * models.count, processors());
    int64_t grid = (models.numel + part - 1) / part * models.count;
    Each each = {models, rule, part};
    return launch(kept_masks_kernel, grid, kThreads, sizeof(MaskShared), place.stream, each, masks);
}

int l1_sums(Place place, const Models& models, const Rule& rule, int64_t* limbs) {
    int64_t part = part_of_so_many(models.numel * models.count, processors());
    int64_t grid = (models.numel + part - 1) / part * models.count;
    Each each = {models, rule, part};
    int error = launch(l1_sums_kernel, grid, kThreads, sizeof(MassShared), place.stream, each, limbs);
    return error != 0 ? error : launch(carry_kernel, 1, kThreads, 0, place.stream, limbs, 2 * models.count);
}

int row_keys(Place place, const Rows& rows, int32_t* keys) {
    int64_t grid = (rows.count * rows.length + kTile - 1) / kTile;
    return launch(row_keys_kernel, grid, kThreads, 0, place.stream, rows, keys);
}

int row_masks(Place place, const Rows& rows, const int32_t* sorted, uint8_t* mask) {
    int64_t grid = (rows.count * rows.length + kTile - 1) / kTile;
    return launch(row_masks_kernel, grid, kThreads, 0, place.stream, rows, sorted, mask);
}

int count_nonfinite(Place place, Array x, int64_t numel, int64_t* nan_and_inf) {
    int64_t part = part_of_loads(x.dtype, numel);
    return launch(x.dtype == kFloat32 ? count_nonfinite_kernel<true> : count_nonfinite_kernel<false>,
                  (numel + part - 1) / part, kThreads, 0, place.stream, x, numel, part, nan_and_inf);
}

int zero_nonfinite(Place place, void* data, int32_t dtype, int64_t numel) {
    int64_t part = part_of_loads(dtype, numel);
    return launch(dtype == kFloat32 ? zero_nonfinite_kernel<true> : zero_nonfinite_kernel<false>,
                  (numel + part - 1) / part, kThreads, 0, place.stream, data, dtype, numel, part);
}

}  // namespace cuda
FM_NAMESPACE_END
