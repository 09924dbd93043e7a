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

// kSquares: of the squares, each rounded.
template <bool kSquares>
FM_KERNEL_RESIDENT(kThreads, 3)
l1_sums_kernel(FM_LARGE Each each, int64_t* limbs) {
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
            float value = kSquares ? delta[t] * delta[t] : delta[t];
            uint32_t key = bit_cast<uint32_t>(value) & 0x7fffffffu;
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

FM_DEVICE void row_keys_at(const Rows& rows, int64_t at, int64_t end, uint32_t* keys) {
    float delta[kEach];
    delta_at(rows.base, rows.base.data != nullptr, rows.x, rows.compute, at, end, delta);
    FM_UNROLL
    for (int t = 0; t < kEach; ++t) keys[t] = magnitude_key(delta[t]);
}

FM_DEVICE uint64_t rank_limit(const Rows& rows, int64_t twice_rank) {
    return keep_limit(della_probability(rows.density, rows.epsilon, twice_rank, rows.length));
}

// The random words of elements at .. at + 7.
FM_DEVICE void row_words_at(const Rows& rows, int64_t at, uint32_t* words) {
    PhiloxStream stream = philox_stream(rows.seed, rows.tensor_id, rows.stream);
    uint64_t index = rows.offset + static_cast<uint64_t>(at);
    PhiloxBlock first = philox_at(stream, index >> 2), second = philox_at(stream, (index >> 2) + 1), third = second;
    if ((index & 3u) != 0) third = philox_at(stream, (index >> 2) + 2);
    uint32_t all[12];
    FM_UNROLL
    for (int i = 0; i < 4; ++i) {
        all[i] = first.word[i];
        all[4 + i] = second.word[i];
        all[8 + i] = third.word[i];
    }
    // By selects, for an array that is indexed by a variable is kept in memory.
    FM_UNROLL
    for (int i = 0; i < 10; ++i) all[i] = (index & 2u) ? all[i + 2] : all[i];
    FM_UNROLL
    for (int t = 0; t < kEach; ++t) words[t] = (index & 1u) ? all[t + 1] : all[t];
}

// One of eight, by selects.
FM_DEVICE uint32_t one_of8(const uint32_t* values, int which) {
    uint32_t found = values[0];
    FM_UNROLL
    for (int t = 1; t < kEach; ++t) found = t == which ? values[t] : found;
    return found;
}

FM_DEVICE uint32_t one_word(const PhiloxStream& stream, uint64_t index) {
    PhiloxBlock words = philox_at(stream, index >> 2);
    uint32_t low = index & 1u ? words.word[1] : words.word[0], high = index & 1u ? words.word[3] : words.word[2];
    return index & 2u ? high : low;
}

// What is kept of elements at .. at + 7, whose twice_rank(row, key) is known. Words that all ranks keep, or none, need
// none.
template <class Rank>
FM_DEVICE uint32_t kept_by_rank(const Rows& rows, int64_t at, int64_t end, Rank twice_rank) {
    // Rounding keeps the order, so that the limits of all ranks lie between those of the first and the last.
    uint64_t least = rank_limit(rows, 0), most = rank_limit(rows, 2 * (rows.length - 1));
    uint32_t keys[kEach], words[kEach], kept = 0, open = 0;
    row_keys_at(rows, at, end, keys);
    row_words_at(rows, at, words);
    FM_UNROLL
    for (int t = 0; t < kEach; ++t) {
        bool there = at + t < end;
        kept |= (there && words[t] < least ? 1u : 0u) << t;
        open |= (there && words[t] >= least && words[t] < most ? 1u : 0u) << t;
    }
    for (; open != 0; open &= open - 1) {
        int t = lowest_bit(open);
        int64_t rank = twice_rank((at + t) / rows.length, one_of8(keys, t));
        kept |= (one_of8(words, t) < rank_limit(rows, rank) ? 1u : 0u) << t;
    }
    return kept;
}

// Rows that are longer than a block has room for: their keys are sorted elsewhere.
FM_KERNEL(kThreads) row_keys_kernel(Rows rows, int32_t* keys) {
    int64_t end = rows.count * rows.length, at = block() * kTile + thread() * kEach;
    if (at >= end) return;
    uint32_t own[kEach];
    row_keys_at(rows, at, end, own);
    if (at + kEach <= end) {
        // Memory from PyTorch begins at a multiple of 16 bytes.
        FM_UNROLL
        for (int half = 0; half < 2; ++half) {
            Words4 four;
            FM_UNROLL
            for (int i = 0; i < 4; ++i) four.word[i] = own[4 * half + i];
            store16(keys + at + 4 * half, four);
        }
        return;
    }
    FM_UNROLL
    for (int t = 0; t < kEach; ++t) {
        if (at + t < end) keys[at + t] = static_cast<int32_t>(own[t]);
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

FM_KERNEL(kThreads) row_masks_kernel(Rows rows, const int32_t* sorted, uint8_t* mask) {
    int64_t end = rows.count * rows.length, at = block() * kTile + thread() * kEach;
    if (at >= end) return;
    uint32_t kept = kept_by_rank(rows, at, end, [&](int64_t row, uint32_t wanted) {
        const int32_t* own = sorted + row * rows.length;
        int32_t key = static_cast<int32_t>(wanted);
        int64_t first = count_below(own, rows.length, key);
        return 2 * first + count_below(own + first, rows.length - first, key + 1) - 1;
    });
    mask[at / kEach] = static_cast<uint8_t>(kept);
}

// Short rows: a block has the keys of all rows of a tile, and each element that needs its rank looks through its row.
constexpr int kShortRow = 128;

FM_KERNEL(kThreads) short_rows_kernel(Rows rows, uint8_t* mask) {
    uint32_t* keys = &shared<uint32_t>();
    int64_t numel = rows.count * rows.length, begin = block() * kTile, end = smaller(numel, begin + kTile);
    // From the first element of the tile's first row to the last one of its last, in eights.
    int64_t from = begin / rows.length * rows.length / kEach * kEach;
    int64_t upto = ((end - 1) / rows.length + 1) * rows.length;
    for (int64_t at = from + thread() * kEach; at < upto; at += kTile) {
        uint32_t own[kEach];
        row_keys_at(rows, at, numel, own);
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) keys[at - from + t] = own[t];
    }
    sync();
    int64_t at = begin + thread() * kEach;
    if (at >= end) return;
    uint32_t kept = kept_by_rank(rows, at, end, [&](int64_t row, uint32_t key) {
        const uint32_t* own = keys + (row * rows.length - from);
        int32_t twice = -1;
        for (int32_t i = 0; i < static_cast<int32_t>(rows.length); ++i) {
            twice += (own[i] < key ? 1 : 0) + (own[i] <= key ? 1 : 0);
        }
        return static_cast<int64_t>(twice);
    });
    mask[at / kEach] = static_cast<uint8_t>(kept);
}

// Other rows: a block ranks a whole row, digit by digit, as far as the random words ask for it. The row's keys are
// counted in bins, zeros in one of their own. What lies in a bin has one of the ranks that the bin spans, and nearly
// every word decides against all of them alike. Only bins with a word that does not are open, and their keys are
// counted again by their next bits, until no bit is left: then the keys of a bin are equal, and share the middle rank.
constexpr uint32_t kNoBin = 0xffffu;
constexpr int64_t kRankedRow = 65535;  // ranks, counts and bins have 16 bits
constexpr float kSlack = 1e-6f;        // more than single precision may be wrong by: probabilities are below 1

// A row in the bytes of the mask that have any of it: elements are counted from the first one of its first byte.
struct RowAt {
    Rows rows;  // from there on
    int32_t begin, end;
    int32_t limit;  // where the last row ends, or beyond this one
    int32_t bytes;
};

// Bytes of a row, at most.
FM_INLINE int64_t rank_bytes(int64_t length) { return (length + 2 * kEach - 2) / kEach; }

// The digit that is counted: `width` bits of the keys, from bit `shift` on. `used` bins, those of an open bin together.
struct RankDigit {
    int32_t shift, width;
    uint32_t used;
    uint32_t apart;  // 1: of keys other than 0 bins are one further on
};

template <int kBlock, int kBins>
struct alignas(16) Ranking {
    uint32_t count[kBins];      // then how many keys lie below the bin, and in it (high half)
    uint32_t span[kBins / 4];   // the same of each open bin of the digit before
    uint32_t open[kBins / 32];  // a bit for each bin
    uint32_t before[kBins / 32];
    uint32_t partial[kBlock / 32 + 1];
    uint32_t bits;        // that any key has that was counted
    uint32_t carried[2];  // the row's last byte, which the next row begins in
    PhiloxStream stream;
    RowAt row;
    RankDigit digit;
    // The probability of twice_rank is low + step * twice_rank, nearly; high: the last rank's.
    float low, step, high;
    int32_t stride;
    // Behind it come for each byte the bins of its elements, two in a word, and which are kept (low half) and
    // undecided. A thread has bytes of its own and looks at no others.
};

template <class Shared>
FM_DEVICE uint32_t* pairs_of(Shared& mine) {
    return reinterpret_cast<uint32_t*>(&mine + 1);
}

template <class Shared>
FM_DEVICE uint16_t* states_of(Shared& mine) {
    return reinterpret_cast<uint16_t*>(pairs_of(mine) + 4 * mine.stride);
}

template <class Shared>
FM_DEVICE uint32_t bin_of(Shared& mine, int32_t byte, int t) {
    return (pairs_of(mine)[(t / 2) * mine.stride + byte] >> (16 * (t % 2))) & 0xffffu;
}

FM_DEVICE RowAt row_at(const Rows& rows, int64_t number) {
    int64_t begin = number * rows.length, start = begin / kEach * kEach;
    RowAt row;
    row.rows = rows;
    if (rows.base.data != nullptr) row.rows.base = from_element(rows.base, start);
    row.rows.x = from_element(rows.x, start);
    row.rows.offset += static_cast<uint64_t>(start);
    row.begin = static_cast<int32_t>(begin - start);
    row.end = row.begin + static_cast<int32_t>(rows.length);
    row.limit = static_cast<int32_t>(smaller(rows.count * rows.length - start, 2 * kRankedRow));
    row.bytes = (row.end + kEach - 1) / kEach;
    return row;
}

// Which of the elements of a byte are the row's.
FM_DEVICE uint32_t own_of_byte(const RowAt& row, int32_t byte) {
    int32_t before = row.begin - byte * kEach, past = (byte + 1) * kEach - row.end;
    return (before > 0 ? 0xffu << before : 0xffu) & (past > 0 ? 0xffu >> past : 0xffu);
}

// Goes through a row from the leading digit on: all of it lies in one bin.
template <int kBlock, int kBins, class Shared>
FM_DEVICE void open_row(Shared& mine) {
    if (thread() == 0) {
        mine.span[0] = 0;
        mine.digit.width = 0;
        while (kBins >> mine.digit.width > 1) ++mine.digit.width;
        mine.digit.shift = 31 - mine.digit.width;
        mine.digit.used = kBins;
        mine.digit.apart = 1;
    }
    for (int32_t byte = thread(); byte < mine.row.bytes; byte += kBlock) {
        uint32_t own = own_of_byte(mine.row, byte);
        FM_UNROLL
        for (int i = 0; i < 4; ++i) {
            pairs_of(mine)[i * mine.stride + byte] =
                ((own >> (2 * i)) & 1u ? 0u : kNoBin) | ((own >> (2 * i + 1)) & 1u ? 0u : kNoBin << 16);
        }
    }
    sync();
}

// The next bits, as many as there are bins for, but none that no key has.
FM_DEVICE void choose_next(RankDigit& digit, uint32_t opened, uint32_t bits, uint32_t bins) {
    int32_t width = 0, left = digit.shift - lowest_bit(bits);
    while (width < left && (opened << (width + 1)) <= bins) ++width;
    digit.shift -= width;
    digit.width = width;
    digit.used = opened << width;
    digit.apart = 0;
}

template <int kBlock, int kBins, class Shared>
FM_DEVICE void count_row(Shared& mine) {
    for (uint32_t i = static_cast<uint32_t>(thread()); i < mine.digit.used; i += kBlock) mine.count[i] = 0;
    if (thread() < kBins / 32) mine.open[thread()] = 0;
    if (thread() == 0) mine.bits = 0;
    sync();
    uint32_t bits = 0;
    FM_ROLLED
    for (int32_t byte = thread(); byte < mine.row.bytes; byte += kBlock) {
        uint32_t* pair = pairs_of(mine) + byte;
        int32_t stride = mine.stride;
        if ((pair[0] & pair[stride] & pair[2 * stride] & pair[3 * stride]) == 0xffffffffu) continue;
        uint32_t keys[kEach];
        row_keys_at(mine.row.rows, byte * kEach, mine.row.limit, keys);
        int32_t shift = mine.digit.shift, width = mine.digit.width;
        uint32_t apart = mine.digit.apart;
        FM_UNROLL
        for (int i = 0; i < 4; ++i) {
            uint32_t two = pair[i * stride], bins = 0;
            FM_UNROLL
            for (int half = 0; half < 2; ++half) {
                uint32_t key = keys[2 * i + half], from = (two >> (16 * half)) & 0xffffu;
                bool counted = from != kNoBin;
                uint32_t bin = (from << width) + ((key >> shift) & ((1u << width) - 1u)) + (key != 0 ? apart : 0u);
                if (counted) atomic_add(&mine.count[bin], 1u);
                bins |= (counted ? bin : kNoBin) << (16 * half);
                bits |= counted ? key : 0u;
            }
            pair[i * stride] = bins;
        }
    }
    for (int other = 16; other > 0; other /= 2) bits |= from_across(bits, other);
    if (lane() == 0) atomic_or(&mine.bits, bits);
    sync();
}

// The keys below each bin: those of the bins before it, and what lies between open bins.
template <int kBlock, int kBins, class Shared>
FM_DEVICE void add_up_bins(Shared& mine) {
    constexpr uint32_t kWarpBins = 32 * kBins / kBlock;
    uint32_t begin = static_cast<uint32_t>(thread() / 32) * kWarpBins, total;
    uint32_t end = begin + kWarpBins < mine.digit.used ? begin + kWarpBins : mine.digit.used;
    // Of an open bin's first one how many keys lie between that open bin and the one before it.
    auto between = [&](uint32_t bin) {
        uint32_t number = bin >> mine.digit.width;
        if (bin >= end || number << mine.digit.width != bin) return 0u;
        uint32_t previous = number == 0 ? 0u : mine.span[number - 1];
        return (mine.span[number] & 0xffffu) - (previous & 0xffffu) - (previous >> 16);
    };
    uint32_t sum = 0;
    FM_ROLLED
    for (uint32_t bin = begin + static_cast<uint32_t>(lane()); bin < end; bin += 32) {
        sum += mine.count[bin] + between(bin);
    }
    uint32_t below = from_lane(sum_before<kBlock>(sum, mine.partial, &total), 0);
    FM_ROLLED
    for (uint32_t first = begin; first < end; first += 32) {
        uint32_t bin = first + static_cast<uint32_t>(lane()), count = bin < end ? mine.count[bin] : 0u;
        uint32_t upto = count + between(bin);
        for (int distance = 1; distance < 32; distance *= 2) {
            uint32_t before = from_before(upto, distance);
            if (lane() >= distance) upto += before;
        }
        if (bin < end) mine.count[bin] = (below + upto - count) | (count << 16);
        below += from_lane(upto, 31);
    }
    sync();
}

// Decides what the bins decide, opens the others; whether there are any. A barrier.
template <int kBlock, class Shared>
FM_DEVICE bool decide(Shared& mine) {
    // No bit is left that two keys of a bin could differ in.
    bool any = false, whole = (mine.bits & ((1u << mine.digit.shift) - 1u)) == 0;
    FM_ROLLED
    for (int32_t byte = thread(); byte < mine.row.bytes; byte += kBlock) {
        uint32_t state = states_of(mine)[byte], kept = state & 0xffu, undecided = state >> 8, left = 0, near = 0;
        if (undecided == 0) continue;
        uint64_t index = mine.row.rows.offset + static_cast<uint64_t>(byte * kEach);
        // Philox once, in a loop: only bits are kept of the words.
        FM_ROLLED
        for (int from = -static_cast<int>(index & 3u); from < kEach; from += 4) {
            PhiloxBlock drawn = philox_at(mine.stream, (index + static_cast<uint64_t>(from)) >> 2);
            FM_UNROLL
            for (int i = 0; i < 4; ++i) {
                int t = from + i;
                if (t < 0 || ((undecided >> t) & 1u) == 0) continue;
                float word = static_cast<float>(drawn.word[i]) * 0x1p-32f;
                // Words that all ranks keep, or none, need none.
                if (word < mine.low - kSlack) kept |= 1u << t;
                if (word < mine.low - kSlack || word > mine.high + kSlack) continue;
                uint32_t bin = bin_of(mine, byte, t);
                if (bin == kNoBin) {
                    left |= 1u << t;
                    continue;
                }
                uint32_t span = mine.count[bin], twice = 2 * (span & 0xffffu), more = (span >> 16) - 1;
                bool equal = whole || more == 0 || (mine.digit.apart != 0 && bin == 0);
                float least = mine.low + mine.step * static_cast<float>(twice + (equal ? more : 0u));
                float most = mine.low + mine.step * static_cast<float>(twice + (equal ? more : 2 * more));
                if (word < least - kSlack) {
                    kept |= 1u << t;
                } else if (word <= most + kSlack) {
                    near |= equal ? 1u << t : 0u;
                    left |= equal ? 0u : 1u << t;
                    if (equal) continue;
                    uint32_t bit = 1u << (bin % 32);
                    if ((mine.open[bin / 32] & bit) == 0) atomic_or(&mine.open[bin / 32], bit);
                    any = true;
                }
            }
        }
        // Single precision does not say: by the formula itself. So few that they are taken one by one.
        FM_ROLLED
        for (; near != 0; near &= near - 1) {
            int t = lowest_bit(near);
            uint32_t span = mine.count[bin_of(mine, byte, t)];
            uint32_t word = one_word(mine.stream, index + static_cast<uint64_t>(t));
            int64_t rank = 2 * static_cast<int64_t>(span & 0xffffu) + (span >> 16) - 1;
            kept |= (word < rank_limit(mine.row.rows, rank) ? 1u : 0u) << t;
        }
        states_of(mine)[byte] = static_cast<uint16_t>(kept | (left << 8));
    }
    return any_of_block(any);
}

// Numbers open bins in their order, and has elements know their bin's number; returns how many are open. Those from
// `allowed` on stay undecided.
template <int kBlock, int kBins, class Shared>
FM_DEVICE uint32_t number_open(Shared& mine, uint32_t allowed) {
    uint32_t open = thread() < kBins / 32 ? mine.open[thread()] : 0u, opened;
    uint32_t next = sum_before<kBlock>(static_cast<uint32_t>(count_bits(open)), mine.partial, &opened);
    if (thread() < kBins / 32) mine.before[thread()] = next;
    for (; open != 0 && next < allowed; open &= open - 1, ++next) {
        mine.span[next] = mine.count[32 * thread() + lowest_bit(open)];
    }
    sync();
    FM_ROLLED
    for (int32_t byte = thread(); byte < mine.row.bytes; byte += kBlock) {
        FM_UNROLL
        for (int i = 0; i < 4; ++i) {
            uint32_t* pair = pairs_of(mine) + i * mine.stride + byte;
            uint32_t two = *pair, now = 0;
            FM_UNROLL
            for (int half = 0; half < 2; ++half) {
                uint32_t bin = (two >> (16 * half)) & 0xffffu, found = kNoBin;
                if (bin != kNoBin) {
                    uint32_t word = mine.open[bin / 32], bit = 1u << (bin % 32);
                    uint32_t number = mine.before[bin / 32] + static_cast<uint32_t>(count_bits(word & (bit - 1u)));
                    found = (word & bit) != 0 && number < allowed ? number : kNoBin;
                }
                now |= found << (16 * half);
            }
            *pair = now;
        }
    }
    if (thread() == 0) choose_next(mine.digit, opened < allowed ? opened : allowed, mine.bits, kBins);
    sync();
    return opened;
}

// most_open: bins that are refined at a time; where more are open the row is gone through again.
template <int kBlock, int kBins>
FM_KERNEL_RESIDENT(kBlock, 1024 / kBlock)
rank_rows_kernel(FM_LARGE Rows rows, float low, float step, int32_t most_open, int32_t together, uint8_t* mask) {
    static_assert(kBins / 32 <= kBlock && kBins % kBlock == 0, "bins are divided among threads");
    Ranking<kBlock, kBins>& mine = shared<Ranking<kBlock, kBins>>();
    for (int32_t i = 0; i < together; ++i) {
        int64_t number = block() * together + i;
        if (number >= rows.count) break;
        if (thread() == 0) {
            mine.stream = philox_stream(rows.seed, rows.tensor_id, rows.stream);
            mine.row = row_at(rows, number);
            mine.low = low;
            mine.step = step;
            mine.high = low + step * static_cast<float>(2 * (rows.length - 1));
            mine.stride = static_cast<int32_t>(rank_bytes(rows.length));
        }
        sync();
        for (int32_t byte = thread(); byte < mine.row.bytes; byte += kBlock) {
            states_of(mine)[byte] = static_cast<uint16_t>(own_of_byte(mine.row, byte) << 8);
        }
        for (bool again = true; again;) {
            open_row<kBlock, kBins>(mine);
            again = false;
            for (;;) {
                count_row<kBlock, kBins>(mine);
                add_up_bins<kBlock, kBins>(mine);
                if (!decide<kBlock>(mine)) break;
                uint32_t allowed = static_cast<uint32_t>(most_open);
                again = number_open<kBlock, kBins>(mine, allowed) > allowed || again;
            }
        }
        uint8_t* out = mask + number * rows.length / kEach;
        for (int32_t byte = thread(); byte < mine.row.bytes; byte += kBlock) {
            uint32_t kept = states_of(mine)[byte] & 0xffu;
            // What a row has of a byte that ends in the next one is written with that one, by this block.
            if (byte * kEach < mine.row.begin) kept |= mine.carried[number % 2];
            if ((byte + 1) * kEach > mine.row.end && number + 1 < rows.count) {
                mine.carried[(number + 1) % 2] = kept;
            } else {
                out[byte] = static_cast<uint8_t>(kept);
            }
        }
        sync();
    }
}

// Rows of up to kMiddleRow elements have smaller blocks, several on a processor.
constexpr int64_t kLittleRow = 1024, kMiddleRow = 8192;

// Shared memory of a block that ranks rows of this length.
int64_t rank_shared(int64_t length) {
    int64_t fixed = length <= kLittleRow ? sizeof(Ranking<128, 1024>) : sizeof(Ranking<1024, 4096>);
    return fixed + rank_bytes(length) * static_cast<int64_t>(4 * sizeof(uint32_t) + sizeof(uint16_t));
}

}  // namespace

int kept_masks(Place place, const Models& models, const Rule& rule, uint8_t* masks) {
    int64_t part = part_of_so_many(models.numel * models.count, processors());
    int64_t grid = (models.numel + part - 1) / part * models.count;
    Each each = {models, rule, part};
    return launch(kept_masks_kernel, grid, kThreads, sizeof(MaskShared), place.stream, each, masks);
}

namespace {

template <bool kSquares>
int exact_sums(Place place, const Models& models, const Rule& rule, int64_t* limbs) {
    int64_t part = part_of_so_many(models.numel * models.count, processors());
    int64_t grid = (models.numel + part - 1) / part * models.count;
    Each each = {models, rule, part};
    int error = launch(l1_sums_kernel<kSquares>, grid, kThreads, sizeof(MassShared), place.stream, each, limbs);
    return error != 0 ? error : launch(carry_kernel, 1, kThreads, 0, place.stream, limbs, 2 * models.count);
}

}  // namespace

int l1_sums(Place place, const Models& models, const Rule& rule, int64_t* limbs) {
    return exact_sums<false>(place, models, rule, limbs);
}

int energy_sums(Place place, const Models& models, const Rule& rule, int64_t* limbs) {
    return exact_sums<true>(place, models, rule, limbs);
}

bool ranks_rows(int64_t length) {
    return length <= kShortRow || (length <= kRankedRow && rank_shared(length) <= shared_limit());
}

int rank_rows(Place place, const Rows& rows, int32_t most_open, uint8_t* mask) {
    if (rows.length <= kShortRow) {
        int64_t grid = (rows.count * rows.length + kTile - 1) / kTile;
        size_t keys = sizeof(uint32_t) * (kTile + 2 * kShortRow);
        return launch(short_rows_kernel, grid, kThreads, keys, place.stream, rows, mask);
    }
    // A block takes as many rows as end where a byte of the mask ends.
    int32_t together = 1;
    while (together * rows.length % 8 != 0) together *= 2;
    int64_t grid = (rows.count + together - 1) / together;
    float low = static_cast<float>(rows.density - rows.epsilon);
    float step = static_cast<float>(rows.epsilon / static_cast<double>(rows.length - 1));
    size_t bytes = static_cast<size_t>(rank_shared(rows.length));
    auto go = [&](auto kernel, int threads, int32_t bins) {
        int32_t open = most_open < bins / 4 ? most_open : bins / 4;
        return launch(kernel, grid, threads, bytes, place.stream, rows, low, step, open, together, mask);
    };
    if (rows.length <= kLittleRow) return go(rank_rows_kernel<128, 1024>, 128, 1024);
    if (rows.length <= kMiddleRow) return go(rank_rows_kernel<512, 4096>, 512, 4096);
    return go(rank_rows_kernel<1024, 4096>, 1024, 4096);
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
