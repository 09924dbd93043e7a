// Exact order statistics without sorting, histograms of keys, and masks of a range of ranks.
//
// Keys of 15 bits are counted in one pass, in a histogram of all of them that a block keeps in shared memory. Keys of
// 31 bits are counted digit by digit: 11, 10 and 10 bits. Between passes one block for each model chooses the digit in
// which a rank falls, and nothing comes back to the host. Small tensors need neither passes nor histograms in memory: a
// block takes all of one.
//
// Additions of 1 to shared memory whose result nobody reads are an instruction that takes equal addresses of a warp at
// once, so that runs of equal keys are not slower than others.
#include "cuda/api.h"
#include "cuda/tile.h"

FM_NAMESPACE_BEGIN
namespace cuda {
namespace {

constexpr int kWide = 1024;                  // threads of a block that has most of a processor's shared memory
constexpr int kSmallThreads = 512;           // of a block that takes a whole tensor
constexpr uint32_t kNoKey = 0xffffffffu;     // past the end of a tensor
constexpr uint32_t kNeverKey = 0xfffffffeu;  // of no element
constexpr int kRowBits = 11;                 // a row of counts in a descent
constexpr int64_t kUnit = kTieBlock / 4;     // elements by which blocks divide the work
constexpr int64_t kLeastPart = kUnit / 2;    // of a block that counts next to nothing in shared memory
constexpr int kPartsPerProcessor = 16;       // where there are so many parts, processors end together

// How the elements lie in memory: as the very bits that keys are made of, as other 16-bit numbers, or as any.
enum Form : int { kBits, kShort, kAny };

// --- what a launch goes through

// One tensor of it.
struct Tensor {
    const int64_t* entry;  // nothing, where it is the only one
    int64_t numel, first, first_result, index;
};

FM_DEVICE int64_t tensor_of(const Work& work, int64_t tie_block) {
    return work.table == nullptr ? 0 : work.table[tie_block];
}

FM_DEVICE Tensor tensor_at(const Work& work, int64_t number) {
    if (work.table == nullptr) return {nullptr, work.models.numel, 0, 0, 0};
    int64_t n = work.models.count;
    const int64_t* entry = work.table + work.blocks + number * (3 * n + 5);
    return {entry, entry[3 * n + 1], entry[3 * n + 2], entry[3 * n + 3], entry[3 * n + 4]};
}

FM_DEVICE int64_t number_of(const Work& work, const Tensor& tensor, int32_t slot) {
    return tensor.entry == nullptr ? work.number[slot] : tensor.entry[work.models.count + slot];
}

// Whether a model's rank cuts it anywhere.
FM_DEVICE bool to_be_found(const Work& work, const Tensor& tensor, int32_t model, int which) {
    if (work.together) return which == 0;
    int64_t rank = number_of(work, tensor, 2 * model + which);
    return rank > 0 && rank < tensor.numel;
}

FM_DEVICE int64_t blocks_of(const Tensor& tensor) {
    return tensor.numel == 0 ? 1 : (tensor.numel + kTieBlock - 1) / kTieBlock;
}

// What a block of threads takes of one model: a tie block or a part of one.
struct Part {
    Tensor tensor;
    int64_t number;      // the tensor's
    int64_t tie_block;   // of all tensors
    int64_t begin, end;  // in the tensor; the last parts of one may have nothing
    int32_t model;
};

FM_DEVICE Part part_of(const Work& work, int32_t size) {
    // Numbers of 32 bits are divided soon.
    uint32_t number = static_cast<uint32_t>(block()), n = static_cast<uint32_t>(work.models.count);
    uint32_t place = number / n, in_tie_block = static_cast<uint32_t>(kTieBlock) / static_cast<uint32_t>(size);
    Part part;
    part.model = static_cast<int32_t>(number % n);
    part.tie_block = place / in_tie_block;
    part.number = tensor_of(work, part.tie_block);
    part.tensor = tensor_at(work, part.number);
    part.begin = (part.tie_block - part.tensor.first) * kTieBlock + static_cast<int64_t>(place % in_tie_block) * size;
    part.end = smaller(part.tensor.numel, part.begin + size);
    return part;
}

// Elements of a part: fewer than a tie block has where there would not be enough parts to keep all processors busy.
int32_t size_of_part(int64_t tie_blocks, int64_t least) {
    int64_t size = kTieBlock;
    while (size > least && tie_blocks * (kTieBlock / size) < kPartsPerProcessor * processors()) size /= 2;
    return static_cast<int32_t>(size);
}

// --- keys

struct Source {
    Array base, x;
    int32_t compute, kind;
};

FM_DEVICE Source source_of(const Work& work, const Tensor& tensor, int32_t model) {
    Source source = {work.models.base, model_of(work.models, model), work.models.compute, work.kind};
    if (tensor.entry != nullptr) {
        source.x.data = reinterpret_cast<const void*>(tensor.entry[model]);
        if (source.base.data != nullptr) {
            source.base.data = reinterpret_cast<const void*>(tensor.entry[3 * work.models.count]);
        }
    }
    return source;
}

// Keys have 31 bits, or the 15 of the 16-bit dtype whose numbers all values are.
FM_INLINE uint32_t key_of(float value, int32_t kind) {
    if (kind == kFloat16) return magnitude_key16(round_float16(value), kFloat16);
    uint32_t key = magnitude_key(value);
    return kind == kBFloat16 ? key >> 16 : key;
}

FM_INLINE uint32_t wide_key(uint32_t key, int32_t kind) {
    if (kind == kFloat16) return magnitude_key(widen_float16(static_cast<uint16_t>(key)));
    return kind == kBFloat16 ? key << 16 : key;
}

// The least of all keys whose wide forms are not below `threshold`, or one above all keys; the threshold is at most one
// more than kKeyEnd.
FM_DEVICE uint32_t narrow_limit(int64_t threshold, int32_t kind) {
    uint32_t wide = static_cast<uint32_t>(threshold);
    if (kind == kBFloat16) return (wide + 0xffffu) >> 16;
    if (kind == kFloat32) return wide;
    if (wide > kNanBits) return 0x7fffu;
    uint32_t nearest = key_of(bit_cast<float>(wide), kind);
    return wide_key(nearest, kind) < wide ? nearest + 1u : nearest;
}

// The key whose wide form is `threshold`, if there is one.
FM_DEVICE uint32_t narrow_key(int64_t threshold, int32_t kind) {
    if (threshold < 0 || threshold >= kKeyEnd) return kNeverKey;
    uint32_t key = key_of(bit_cast<float>(static_cast<uint32_t>(threshold)), kind);
    return wide_key(key, kind) == static_cast<uint32_t>(threshold) ? key : kNeverKey;
}

// Eight 16-bit numbers, and the eight that lie `distance` further. Both loads are on their way before either is used.
FM_DEVICE void load_pair(const void* data, int64_t at, int64_t distance, int64_t end, uint32_t* words) {
    const char* from = static_cast<const char*>(data) + 2 * at;
    if (at + distance + kEach <= end && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
        Words4 first = load16(from), second = load16(from + 2 * distance);
        FM_UNROLL
        for (int i = 0; i < 4; ++i) {
            words[i] = first.word[i];
            words[4 + i] = second.word[i];
        }
        return;
    }
    const char* limit = static_cast<const char*>(data) + 2 * end;
    load_bytes_before(from, limit, words);
    load_bytes_before(from + 2 * distance, limit, words + 4);
}

FM_DEVICE void forget_past(int64_t at, int64_t end, uint32_t* keys) {
    if (at + kEach <= end) return;
    FM_UNROLL
    for (int t = 0; t < kEach; ++t) keys[t] = at + t < end ? keys[t] : kNoKey;
}

// Calls `use` with eight 16-bit numbers, in four words, and where they are, tile by tile, all threads of a block
// together.
template <int kBlock, class Use>
FM_DEVICE void each_words(Array x, int64_t begin, int64_t end, Use use) {
    if (begin >= end) return;
    constexpr int64_t kStride = kBlock * kEach;
    int64_t at = begin + thread() * kEach;
    uint32_t next[8];
    load_pair(x.data, at, kStride, end, next);
    for (int64_t tile = begin; tile < end; tile += 2 * kStride, at += 2 * kStride) {
        uint32_t now[8];
        FM_UNROLL
        for (int i = 0; i < 8; ++i) now[i] = next[i];
        if (tile + 2 * kStride < end) load_pair(x.data, at + 2 * kStride, kStride, end, next);
        use(at, now);
        use(at + kStride, now + 4);
    }
}

// The same with eight keys, those past the end kNoKey. While `use` has the keys of a tile, those of the next are on
// their way, of the model and the base together.
template <int kBlock, int kForm, class Use>
FM_DEVICE void each_key(const Source& source, int64_t begin, int64_t end, Use use) {
    uint32_t keys[kEach];
    if constexpr (kForm == kBits) {
        each_words<kBlock>(source.x, begin, end, [&](int64_t at, const uint32_t* words) {
            FM_UNROLL
            for (int i = 0; i < 4; ++i) {
                keys[2 * i] = magnitude_key16(static_cast<uint16_t>(words[i]), source.kind);
                keys[2 * i + 1] = magnitude_key16(static_cast<uint16_t>(words[i] >> 16), source.kind);
            }
            forget_past(at, end, keys);
            use(at, keys);
        });
    } else {
        constexpr bool kWideNumbers = kForm == kAny;
        if (begin >= end) return;
        bool subtract = source.base.data != nullptr;
        bool aligned =
            (reinterpret_cast<uintptr_t>(source.x.data) | reinterpret_cast<uintptr_t>(source.base.data)) % 16 == 0;
        Raw<kWideNumbers> x, base = {};  // 0 where there is none: nobody looks at it
        auto load = [&](int64_t at) {
            // One condition for all loads, so that no branch stands between them.
            bool simple = aligned && at + kEach <= end;
            if (simple) {
                load_raw<kWideNumbers>(source.x, at, end, true, x);
                if (subtract) load_raw<kWideNumbers>(source.base, at, end, true, base);
            } else {
                load_raw<kWideNumbers>(source.x, at, end, false, x);
                if (subtract) load_raw<kWideNumbers>(source.base, at, end, false, base);
            }
        };
        int64_t at = begin + thread() * kEach;
        load(at);
        for (int64_t tile = begin; tile < end; tile += kBlock * kEach, at += kBlock * kEach) {
            float delta[kEach];
            delta_of<kWideNumbers>(x, source.x.dtype, subtract, base, source.base.dtype, source.compute, delta);
            FM_UNROLL
            for (int t = 0; t < kEach; ++t) keys[t] = key_of(delta[t], source.kind);
            if (tile + kBlock * kEach < end) load(at + kBlock * kEach);
            forget_past(at, end, keys);
            use(at, keys);
        }
    }
}

// --- counting

// Bins from .. from + inside - 1 are in shared memory, and so is bin 0, behind them: many deltas are 0.
struct Bins {
    uint32_t* local;
    int64_t* global;
    uint32_t from, inside;
    int32_t kind, shift;  // of a 16-bit dtype: bins are its bits, and the digits in memory begin at bit `shift`
};

FM_DEVICE void add_global(const Bins& bins, uint32_t bin, uint32_t times) {
    uint32_t digit = bins.kind == kFloat32 ? bin : magnitude_key16(static_cast<uint16_t>(bin), bins.kind) >> bins.shift;
    atomic_add(&bins.global[digit], static_cast<int64_t>(times));
}

template <bool kInside>
FM_DEVICE void add(const Bins& bins, uint32_t bin, uint32_t times) {
    uint32_t place = bin - bins.from;
    if (kInside) {
        atomic_add(&bins.local[bin], times);
    } else if (place < bins.inside) {
        atomic_add(&bins.local[place], times);
    } else if (bin == 0) {
        atomic_add(&bins.local[bins.inside], times);
    } else {
        add_global(bins, bin, times);
    }
}

// Whether all 256 keys of a warp are the same.
FM_DEVICE bool same_in_warp(const uint32_t* keys) {
    uint32_t differs = keys[0] ^ from_lane(keys[0], 0);
    FM_UNROLL
    for (int t = 1; t < kEach; ++t) differs |= keys[t] ^ keys[0];
    return all_of_warp(differs == 0);
}

// Counts the digits of keys that begin with `prefix`, in bins that are all in shared memory. Other keys are counted in
// the bin `spare`, which nobody looks at: that is quicker than a branch for each. few: most warps have none to count.
FM_DEVICE void tally_inside(uint32_t* bins, uint32_t spare, Digit digit, uint32_t prefix, const uint32_t* keys,
                            bool few) {
    uint32_t least = prefix << (digit.shift + digit.width), size = 1u << digit.width;
    if (few) {
        uint32_t nearest = keys[0] - least;
        FM_UNROLL
        for (int t = 1; t < kEach; ++t) nearest = keys[t] - least < nearest ? keys[t] - least : nearest;
        if (all_of_warp(nearest >> digit.shift >= size)) return;
    }
    FM_UNROLL
    for (int t = 0; t < kEach; ++t) {
        uint32_t bin = (keys[t] - least) >> digit.shift;
        atomic_add(&bins[bin < size ? bin : spare], 1u);
    }
}

// The same, in bins of which others are elsewhere.
FM_DEVICE void tally(const Bins& bins, Digit digit, uint32_t prefix, const uint32_t* keys) {
    uint32_t least = prefix << (digit.shift + digit.width), size = 1u << digit.width;
    if (same_in_warp(keys)) {
        uint32_t bin = (keys[0] - least) >> digit.shift;
        if (lane() == 0 && bin < size) add<false>(bins, bin, 32 * kEach);
        return;
    }
    FM_UNROLL
    for (int t = 0; t < kEach; ++t) {
        uint32_t bin = (keys[t] - least) >> digit.shift;
        if (bin < size) add<false>(bins, bin, 1u);
    }
}

// Counts the bits of eight 16-bit numbers but their signs; NaNs are put together later.
template <bool kInside>
FM_DEVICE void tally_bits(const Bins& bins, const uint32_t* words, int64_t at, int64_t end) {
    uint32_t two[4];
    FM_UNROLL
    for (int i = 0; i < 4; ++i) two[i] = words[i] & 0x7fff7fffu;
    bool whole = at + kEach <= end;
    uint32_t differs = two[0] ^ from_lane(two[0], 0);
    differs |= (two[0] >> 16) ^ (two[0] & 0xffffu);
    FM_UNROLL
    for (int i = 1; i < 4; ++i) differs |= two[i] ^ two[0];
    if (all_of_warp(whole && differs == 0)) {
        if (lane() == 0) add<kInside>(bins, two[0] >> 16, 32 * kEach);
    } else if (whole) {
        FM_UNROLL
        for (int i = 0; i < 4; ++i) {
            add<kInside>(bins, two[i] & 0xffffu, 1u);
            add<kInside>(bins, two[i] >> 16, 1u);
        }
    } else {
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) {
            if (at + t < end) add<kInside>(bins, (two[t / 2] >> (16 * (t % 2))) & 0xffffu, 1u);
        }
    }
}

FM_DEVICE void clear(uint32_t* bins, int count, int threads) {
    for (int i = thread(); i < count; i += threads) bins[i] = 0;
}

// A grid of as many blocks as run at once. The blocks of one group take the same part of each model, so that the base
// is read from memory once. kBits: bins are the bits of 16-bit numbers, and become those of digits when they are added.
template <int kForm, bool kInside>
FM_KERNEL_RESIDENT(kWide, 1)
count_keys_kernel(FM_LARGE Work work, Digit digit, uint32_t from, uint32_t inside, bool ranked, int64_t groups,
                  int64_t* counts) {
    int32_t n = work.models.count, model = static_cast<int32_t>(block() % n);
    int64_t group = block() / n, units = work.blocks * (kTieBlock / kUnit);
    int64_t start = units * group / groups * kUnit, stop = units * (group + 1) / groups * kUnit;
    Bins bins = {&shared<uint32_t>(), nullptr, from, inside, kFloat32, 0};
    if (kForm == kBits) {
        bins.kind = work.kind;
        bins.shift = digit.shift;
    }
    int64_t row = -1, counted = 0;
    clear(bins.local, static_cast<int>(inside) + 1, kWide);
    sync();
    auto flush = [&] {
        sync();
        for (uint32_t i = static_cast<uint32_t>(thread()); i <= inside; i += kWide) {
            uint32_t found = bins.local[i];
            if (found == 0) continue;
            add_global(bins, i == inside ? 0 : from + i, found);
            bins.local[i] = 0;
        }
        sync();
    };
    for (int64_t at = start; at < stop;) {
        int64_t tie_block = at / kTieBlock, next = smaller(stop, (tie_block + 1) * kTieBlock);
        int64_t number = tensor_of(work, tie_block);
        Tensor tensor = tensor_at(work, number);
        int64_t begin = at - tensor.first * kTieBlock, end = smaller(tensor.numel, next - tensor.first * kTieBlock);
        at = next;
        if (ranked && !to_be_found(work, tensor, model, 0) && !to_be_found(work, tensor, model, 1)) continue;
        int64_t wanted = work.together ? 0 : number * n + model;
        // Counts in shared memory have 32 bits.
        if (wanted != row || counted > (int64_t{1} << 31)) {
            if (row >= 0) flush();
            row = wanted;
            counted = 0;
            bins.global = counts + (row << digit.width);
        }
        counted += kTieBlock;
        Source source = source_of(work, tensor, model);
        if constexpr (kForm == kBits) {
            each_words<kWide>(source.x, begin, end, [&](int64_t place, const uint32_t* words) {
                tally_bits<kInside>(bins, words, place, end);
            });
        } else {
            uint32_t prefix = ranked ? 0u : static_cast<uint32_t>(number_of(work, tensor, 2 * model));
            each_key<kWide, kForm>(source, begin, end, [&](int64_t, const uint32_t* keys) {
                if (kInside) {
                    tally_inside(bins.local, inside + 1, digit, prefix, keys, false);
                } else {
                    tally(bins, digit, prefix, keys);
                }
            });
        }
    }
    if (row >= 0) flush();
}

// kLeading: of the leading digit both ranks have the same counts.
template <bool kLeading, int kForm>
FM_KERNEL_RESIDENT(kThreads, 4)
count_digit_kernel(FM_LARGE Work work, int32_t size_of_part, int32_t shift, const int64_t* state, int64_t* counts,
                   int32_t* found, int ranks) {
    // All of it but a place is known beforehand: so few registers go on the loop.
    const Digit digit = {kLeading ? 31 - kRowBits : shift, kLeading ? kRowBits : kRowBits - 1};
    Part part = part_of(work, size_of_part);
    int32_t model = part.model;
    bool wanted[2];
    for (int which = 0; which < 2; ++which) wanted[which] = to_be_found(work, part.tensor, model, which);
    if (part.begin >= part.end || (!wanted[0] && !wanted[1])) return;
    int64_t row = work.together ? 0 : part.number * work.models.count + model;
    uint32_t size = 1u << digit.width, all = kLeading ? size : 2 * size;
    uint32_t* local = &shared<uint32_t>();
    clear(local, static_cast<int>(all), kThreads);
    uint32_t prefix[2] = {0, 0};
    for (int which = 0; which < 2; ++which) {
        if (!kLeading && wanted[which]) prefix[which] = static_cast<uint32_t>(state[4 * row + 2 * which]);
    }
    sync();
    Source source = source_of(work, part.tensor, model);
    source.compute = source.kind = kFloat32;
    each_key<kThreads, kForm>(source, part.begin, part.end, [&](int64_t, const uint32_t* keys) {
        if (kLeading) {
            tally_inside(local, all, digit, 0, keys, false);
            return;
        }
        if (wanted[0]) tally_inside(local, all, digit, prefix[0], keys, true);
        if (wanted[1]) tally_inside(local + size, all - size, digit, prefix[1], keys, true);
    });
    sync();
    for (uint32_t i = static_cast<uint32_t>(thread()); i < all; i += kThreads) {
        if (local[i] == 0) continue;
        atomic_add(&counts[(row << kRowBits) + i], static_cast<int64_t>(local[i]));
        int place = static_cast<int>(i >> digit.width) - (2 - ranks);
        if (found == nullptr || place < 0) continue;
        int64_t block = (model * ranks + place) * work.blocks + part.tie_block;
        atomic_add(&found[(block << digit.width) + (i & (size - 1u))], static_cast<int32_t>(local[i]));
    }
}

// --- choosing

// The digit in which a rank (1 is the largest key) falls, how many keys have a greater one, and how many this one.
struct Located {
    int64_t digit, above, equal;
};

struct Scratch {
    int64_t sums[32];
    Located located;
};

// Called by a whole block, of kBlock threads, about counts that no thread writes any more.
template <int kBlock, class Count>
FM_DEVICE Located locate(const Count* counts, int bins, int64_t rank, Scratch& scratch) {
    constexpr int kParts = kBlock / 32;
    int warp = thread() / 32, part = bins / kParts;
    int64_t own = 0;
    for (int i = lane(); i < part; i += 32) own += counts[warp * part + i];
    for (int mask = 16; mask > 0; mask /= 2) own += from_across(own, mask);
    sync();
    if (lane() == 0) scratch.sums[warp] = own;
    sync();
    if (warp == 0) {
        int64_t above = 0;
        int here = kParts - 1;
        for (; here > 0 && above + scratch.sums[here] < rank; --here) above += scratch.sums[here];
        int each = (part + 31) / 32;
        int low = static_cast<int>(smaller(part, lane() * each)), high = static_cast<int>(smaller(part, low + each));
        own = 0;
        for (int i = low; i < high; ++i) own += counts[here * part + i];
        int64_t upto = own;
        for (int distance = 1; distance < 32; distance *= 2) {
            int64_t before = from_before(upto, distance);
            if (lane() >= distance) upto += before;
        }
        above += from_lane(upto, 31) - upto;
        if (above < rank && rank <= above + own) {
            int i = high - 1;
            for (; i > low && above + counts[here * part + i] < rank; --i) above += counts[here * part + i];
            scratch.located = {here * part + i, above, static_cast<int64_t>(counts[here * part + i])};
        }
    }
    sync();
    return scratch.located;
}

// The bound of a rank at which there is nothing to be found.
FM_DEVICE RankBound outer_bound(int64_t rank) { return {rank <= 0 ? static_cast<int64_t>(kKeyEnd) : 0, 0}; }

// remaining: the rank among the keys that are left, of which `equal` have the last digit.
FM_DEVICE RankBound found_bound(int64_t key, int32_t kind, int64_t remaining, int64_t equal) {
    return {static_cast<int64_t>(wide_key(static_cast<uint32_t>(key), kind)), remaining < equal ? remaining : 0};
}

FM_DEVICE void store_bound(int64_t* to, const RankBound& bound) {
    to[0] = bound.threshold;
    to[1] = bound.ties;
}

FM_KERNEL_RESIDENT(kWide, 1)
choose_digit_kernel(FM_LARGE Work work, Digit digit, bool leading, int64_t* state, int64_t* counts, int64_t* bounds,
                    float* magnitude) {
    int32_t n = work.models.count, model = static_cast<int32_t>(block() % n);
    Tensor tensor = tensor_at(work, block() / n);
    Scratch& scratch = shared<Scratch>();
    int bins = 1 << digit.width;
    int64_t* mine = counts + (block() << (digit.width > kRowBits ? digit.width : kRowBits));
    for (int which = 0; which < 2; ++which) {
        int64_t rank = number_of(work, tensor, 2 * model + which), prefix = 0;
        int64_t* at = state + 4 * block() + 2 * which;
        RankBound bound = outer_bound(rank);
        if (to_be_found(work, tensor, model, which)) {
            if (!leading) {
                prefix = at[0];
                rank = at[1];
            }
            Located located = locate<kWide>(mine + (leading ? 0 : which * bins), bins, rank, scratch);
            prefix = (prefix << digit.width) | located.digit;
            rank -= located.above;
            bound = found_bound(prefix, work.kind, rank, located.equal);
            // All have read the state before it changes, for all have been in `locate`.
            if (thread() == 0 && digit.shift > 0) {
                at[0] = prefix;
                at[1] = rank;
            }
        }
        if (thread() != 0 || digit.shift > 0) continue;
        if (bounds != nullptr) store_bound(bounds + 4 * (tensor.index * n + model) + 2 * which, bound);
        if (magnitude != nullptr && which == 0) {
            *magnitude = bit_cast<float>(static_cast<uint32_t>(bound.threshold));
        }
    }
    if (digit.shift == 0) return;
    sync();
    for (int i = thread(); i < (1 << kRowBits); i += kWide) mine[i] = 0;
}

// --- ties

template <int kForm>
FM_KERNEL_RESIDENT(kThreads, 4)
count_ties_kernel(FM_LARGE Work work, int32_t size_of_part, const int64_t* bounds, int64_t* counts) {
    Part part = part_of(work, size_of_part);
    const int64_t* bound = bounds + 4 * (part.tensor.index * work.models.count + part.model);
    uint32_t wanted[2], own[2] = {0, 0};
    for (int which = 0; which < 2; ++which) {
        wanted[which] = bound[2 * which + 1] > 0 ? narrow_key(bound[2 * which], work.kind) : kNeverKey;
    }
    if (wanted[0] == kNeverKey && wanted[1] == kNeverKey) return;
    each_key<kThreads, kForm>(source_of(work, part.tensor, part.model), part.begin, part.end,
                              [&](int64_t, const uint32_t* keys) {
                                  FM_UNROLL
                                  for (int t = 0; t < kEach; ++t) {
                                      own[0] += keys[t] == wanted[0] ? 1u : 0u;
                                      own[1] += keys[t] == wanted[1] ? 1u : 0u;
                                  }
                              });
    uint32_t* totals = &shared<uint32_t>();
    if (thread() < 2) totals[thread()] = 0;
    sync();
    for (int which = 0; which < 2; ++which) {
        uint32_t of_warp = sum_of_warp(own[which]);
        if (lane() == 0 && of_warp > 0) atomic_add(&totals[which], of_warp);
    }
    sync();
    if (thread() >= 2 || totals[thread()] == 0) return;
    int64_t slot = 2 * part.model + thread();
    int64_t place = part.tensor.first_result + part.tie_block - part.tensor.first;
    atomic_add(&counts[slot * work.blocks_results + place], static_cast<int64_t>(totals[thread()]));
}

FM_KERNEL(kThreads)
sum_ties_kernel(FM_LARGE Work work, const int64_t* bounds, const int32_t* found, int ranks, int64_t* ties) {
    int32_t n = work.models.count, slot = static_cast<int32_t>(block() % (2 * n));
    Tensor tensor = tensor_at(work, block() / (2 * n));
    const int64_t* bound = bounds + 4 * (tensor.index * n + slot / 2) + 2 * (slot % 2);
    bool any = bound[1] > 0;
    int place = slot % 2 - (2 - ranks);
    // Found are the counts of the last digit, of kRowBits - 1 bits.
    const int32_t* counted =
        found == nullptr ? nullptr
                         : found + (((slot / 2 * ranks + place) * work.blocks + tensor.first) << (kRowBits - 1)) +
                               (bound[0] & ((1 << (kRowBits - 1)) - 1));
    int64_t* mine = ties + slot * work.blocks_results + tensor.first_result;
    int64_t before = 0;
    uint32_t* partial = &shared<uint32_t>();
    for (int64_t first = 0; first < blocks_of(tensor); first += kThreads) {
        int64_t at = first + thread();
        bool inside = at < blocks_of(tensor);
        uint32_t own = 0, total = 0;
        if (any && inside) own = static_cast<uint32_t>(counted == nullptr ? mine[at] : counted[at << (kRowBits - 1)]);
        uint32_t lower = sum_before(own, partial, &total);
        if (inside) mine[at] = before + lower;
        before += total;
    }
}

// --- small tensors

struct Small {
    Scratch scratch;
    uint32_t bins[(1 << kRowBits) + 1];    // and a spare one
    int64_t prefix[2], rank[2], equal[2];  // of each rank, as the digits are found
};

// A block for each model of each tensor, which has no more elements than a tie block: no ties come before it.
template <int kForm>
FM_KERNEL_RESIDENT(kSmallThreads, 2)
bounds_of_small_kernel(FM_LARGE Work work, int64_t* bounds, int64_t* ties_before) {
    int32_t n = work.models.count, model = static_cast<int32_t>(block() % n);
    Tensor tensor = tensor_at(work, block() / n);
    Small& small = shared<Small>();
    bool first = to_be_found(work, tensor, model, 0), second = to_be_found(work, tensor, model, 1);
    bool narrow = work.kind != kFloat32;
    if (thread() < 2) {
        small.prefix[thread()] = 0;
        small.rank[thread()] = number_of(work, tensor, 2 * model + thread());
    }
    FM_ROLLED
    for (int place = 0; place < (narrow ? 2 : 3) && (first || second); ++place) {
        // Of the leading digit both ranks have the same counts.
        bool leading = place == 0;
        Digit digit = narrow ? Digit{8 - 8 * place, leading ? 7 : 8} : Digit{20 - 10 * place, leading ? 11 : 10};
        uint32_t size = 1u << digit.width;
        uint32_t all = 1u << kRowBits;
        clear(small.bins, 1 << kRowBits, kSmallThreads);
        sync();
        uint32_t of[2] = {static_cast<uint32_t>(small.prefix[0]), static_cast<uint32_t>(small.prefix[1])};
        each_key<kSmallThreads, kForm>(source_of(work, tensor, model), 0, tensor.numel,
                                       [&](int64_t, const uint32_t* keys) {
                                           if (first || leading)
                                               tally_inside(small.bins, all, digit, of[0], keys, !leading);
                                           if (second && !leading)
                                               tally_inside(small.bins + size, all - size, digit, of[1], keys, true);
                                       });
        sync();
        for (int which = 0; which < 2; ++which) {
            if (!(which == 0 ? first : second)) continue;
            const uint32_t* counts = small.bins + (leading ? 0u : which * size);
            Located located = locate<kSmallThreads>(counts, static_cast<int>(size), small.rank[which], small.scratch);
            if (thread() != 0) continue;
            small.prefix[which] = (small.prefix[which] << digit.width) | located.digit;
            small.rank[which] -= located.above;
            small.equal[which] = located.equal;
        }
        sync();
    }
    sync();
    if (thread() >= 2) return;
    // Read again, rather than kept in registers all the time.
    tensor = tensor_at(work, block() / n);
    int which = thread();
    RankBound bound = (which == 0 ? first : second)
                          ? found_bound(small.prefix[which], work.kind, small.rank[which], small.equal[which])
                          : outer_bound(small.rank[which]);
    store_bound(bounds + 4 * (tensor.index * n + model) + 2 * which, bound);
    ties_before[(2 * model + which) * work.blocks_results + tensor.first_result] = 0;
}

// --- a window of keys

// Counts of a few keys in shared memory, each where its low bits say: the keys of a window are few, or many elements
// have the same. A key that finds its place taken is counted in the device's memory.
constexpr int kCached = 2048;

struct Cache {
    int32_t key[kCached];
    uint32_t count[kCached];
    uint32_t beyond;
};

template <int kForm>
FM_KERNEL_RESIDENT(kThreads, 4)
count_window_kernel(FM_LARGE Work work, int32_t size_of_part, int64_t width, int64_t* counts) {
    Part part = part_of(work, size_of_part);
    int32_t model = part.model;
    Cache& cache = shared<Cache>();
    for (int i = thread(); i < kCached; i += kThreads) {
        cache.key[i] = -1;
        cache.count[i] = 0;
    }
    if (thread() == 0) cache.beyond = 0;
    // Every key is below these ends, so that a window from there on is as empty as one further on.
    uint32_t low = static_cast<uint32_t>(smaller(number_of(work, part.tensor, 2 * model), 0x7fffffff));
    uint32_t size = static_cast<uint32_t>(smaller(width, 0x7fffffff)), beyond = 0;
    int64_t* mine = counts + model * (width + 1);
    auto count = [&](uint32_t place, uint32_t times) {
        int slot = static_cast<int>(place % kCached);
        int32_t tag = static_cast<int32_t>(place), held = peek(&cache.key[slot]);
        if (held == -1) {
            held = atomic_exchange_if(&cache.key[slot], -1, tag);
            if (held == -1) held = tag;
        }
        if (held == tag) {
            atomic_add(&cache.count[slot], times);
        } else {
            atomic_add(&mine[1 + static_cast<int64_t>(place)], static_cast<int64_t>(times));
        }
    };
    sync();
    Source source = source_of(work, part.tensor, model);
    source.kind = kFloat32;
    each_key<kThreads, kForm>(source, part.begin, part.end, [&](int64_t, const uint32_t* keys) {
        bool same = same_in_warp(keys);
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) {
            if (keys[t] == kNoKey || keys[t] < low) continue;
            uint32_t place = keys[t] - low;
            if (place >= size) {
                ++beyond;
            } else if (!same) {
                count(place, 1u);
            } else if (t == 0 && lane() == 0) {
                count(place, 32 * kEach);
            }
        }
    });
    for (int mask = 16; mask > 0; mask /= 2) beyond += from_across(beyond, mask);
    if (lane() == 0 && beyond > 0) atomic_add(&cache.beyond, beyond);
    sync();
    for (int i = thread(); i < kCached; i += kThreads) {
        if (cache.count[i] > 0) atomic_add(&mine[1 + cache.key[i]], static_cast<int64_t>(cache.count[i]));
    }
    if (thread() == 0 && cache.beyond > 0) atomic_add(&mine[0], static_cast<int64_t>(cache.beyond));
}

// --- masks

// What a bound says of one tie block: the rank of keys below `limit` is at least the bound's, and of others it is not;
// or the block is the one in which it cuts equals.
struct BlockBound {
    uint32_t limit;
    bool walked;
    uint32_t key;
    uint32_t ties;  // where it is walked, how many of its equals come before the cut
};

FM_DEVICE BlockBound block_bound(const int64_t* bound, const int64_t* ties_before, int64_t tie_block, int64_t blocks,
                                 int32_t kind) {
    int64_t threshold = smaller(bound[0], kKeyEnd), ties = bound[1];
    uint32_t limit = narrow_limit(threshold, kind);
    if (ties == 0) return {limit, false, kNeverKey, 0};
    int64_t before = ties_before[tie_block];
    // Past the last block nothing is known.
    int64_t after = tie_block + 1 < blocks ? ties_before[tie_block + 1] : before + kTieBlock;
    if (before >= ties) return {narrow_limit(threshold + 1, kind), false, kNeverKey, 0};
    return {limit, after > ties, narrow_key(threshold, kind), static_cast<uint32_t>(ties - before)};
}

FM_DEVICE void store_mask(uint8_t* out, int64_t at, int64_t end, const uint32_t* kept) {
    if (at + kEach <= end) {
        uint64_t bytes = 0;
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) bytes |= static_cast<uint64_t>(kept[t]) << (8 * t);
        store8bytes(out + at, bytes);
        return;
    }
    FM_UNROLL
    for (int t = 0; t < kEach; ++t) {
        if (at + t < end) out[at + t] = static_cast<uint8_t>(kept[t]);
    }
}

template <int kForm>
FM_KERNEL_RESIDENT(kThreads, 4)
mask_band_kernel(Array x, int64_t numel, int32_t size_of_part, const int64_t* bounds, const int64_t* ties_before,
                 uint8_t* out) {
    Source source = {{nullptr, 0}, x, kFloat32, kForm == kBits ? x.dtype : static_cast<int32_t>(kFloat32)};
    int64_t begin = block() * size_of_part, end = smaller(numel, begin + size_of_part);
    int64_t tie_block = begin / kTieBlock, tie_blocks = (numel + kTieBlock - 1) / kTieBlock;
    BlockBound first = block_bound(bounds, ties_before, tie_block, tie_blocks, source.kind);
    BlockBound last = block_bound(bounds + 2, ties_before + tie_blocks, tie_block, tie_blocks, source.kind);
    if (!first.walked && !last.walked) {
        each_key<kThreads, kForm>(source, begin, end, [&](int64_t at, const uint32_t* keys) {
            uint32_t kept[kEach];
            FM_UNROLL
            for (int t = 0; t < kEach; ++t) kept[t] = keys[t] < first.limit && keys[t] >= last.limit ? 1u : 0u;
            store_mask(out, at, end, kept);
        });
        return;
    }
    uint32_t* partial = &shared<uint32_t>();
    uint32_t of_first = 0, of_last = 0;  // equals of each bound before this tile
    // Those of the tie block's other parts before this one are counted here again: there are two such tie blocks.
    each_key<kThreads, kForm>(source, tie_block * kTieBlock, end, [&](int64_t at, const uint32_t* keys) {
        // Both are counted in halves of one number: a tile has 2048 elements.
        uint32_t own = 0, total = 0;
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) own += (keys[t] == first.key ? 1u : 0u) + (keys[t] == last.key ? 0x10000u : 0u);
        uint32_t lower = sum_before(own, partial, &total);
        uint32_t nth_first = of_first + (lower & 0xffffu), nth_last = of_last + (lower >> 16);
        uint32_t kept[kEach];
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) {
            bool is_first = keys[t] == first.key, is_last = keys[t] == last.key;
            bool in = keys[t] < first.limit || (is_first && nth_first >= first.ties);
            bool past = keys[t] < last.limit || (is_last && nth_last >= last.ties);
            nth_first += is_first ? 1u : 0u;
            nth_last += is_last ? 1u : 0u;
            kept[t] = in && !past ? 1u : 0u;
        }
        if (at >= begin) store_mask(out, at, end, kept);
        of_first += total & 0xffffu;
        of_last += total >> 16;
    });
}

int key_bits(const Work& work) { return work.kind == kFloat32 ? 31 : 15; }

Form form_of(const Work& work) {
    const Models& models = work.models;
    bool bits = work.kind != kFloat32 && models.base.data == nullptr;
    bool wide = models.base.data != nullptr && models.base.dtype == kFloat32;
    for (int32_t i = 0; i < models.count; ++i) {
        bits = bits && models.dtype[i] == work.kind;
        wide = wide || models.dtype[i] == kFloat32;
    }
    return bits ? kBits : wide ? kAny : kShort;
}

// Calls with(form) as a constant.
template <int F>
struct Constant {
    static constexpr int value = F;
};
template <class With>
int with_form(Form form, const With& with) {
    if (form == kBits) return with(Constant<kBits>());
    return form == kShort ? with(Constant<kShort>()) : with(Constant<kAny>());
}

}  // namespace

int count_keys(Place place, const Work& work, Digit digit, bool ranked, int64_t* counts) {
    Form form = form_of(work);
    if (form == kBits && !ranked) form = kShort;
    bool raw = form == kBits;
    int64_t bins = int64_t{1} << (raw ? 15 : digit.width), limit = shared_limit() / 4 - 4;
    int64_t inside = smaller(bins, limit), from = 0;
    if (inside < bins && digit.shift + digit.width == key_bits(work)) {
        // Where not all fit, those around the magnitude 1: weights lie below it, and few far below.
        int64_t one = key_of(1.0f, work.kind) >> (raw ? 0 : digit.shift);
        from = smaller(bins - inside, one - inside * 2 / 3);
        if (from < 0) from = 0;
    }
    int64_t at_once = processors() * (inside <= limit / 2 ? 2 : 1);
    int64_t n = work.models.count, groups = smaller(at_once / n, work.blocks * (kTieBlock / kUnit));
    if (groups < 1) groups = 1;
    return with_form(form, [&](auto f) {
        auto kernel = inside == bins ? count_keys_kernel<f.value, true> : count_keys_kernel<f.value, false>;
        return launch(kernel, groups * n, kWide, static_cast<size_t>(4 * (inside + 2)), place.stream, work, digit,
                      static_cast<uint32_t>(from), static_cast<uint32_t>(inside), ranked, groups, counts);
    });
}

int count_digit(Place place, const Work& work, Digit digit, const int64_t* state, int64_t* counts, int32_t* found,
                int ranks) {
    bool leading = digit.shift + digit.width == key_bits(work), wide = form_of(work) == kAny;
    auto of_leading = wide ? count_digit_kernel<true, kAny> : count_digit_kernel<true, kShort>;
    auto of_other = wide ? count_digit_kernel<false, kAny> : count_digit_kernel<false, kShort>;
    int64_t tie_blocks = work.blocks * work.models.count;
    int32_t size = size_of_part(tie_blocks, kUnit);
    return launch(leading ? of_leading : of_other, tie_blocks * (kTieBlock / size), kThreads, (4 << kRowBits) + 4,
                  place.stream, work, size, digit.shift, state, counts, found, ranks);
}

int choose_digit(Place place, const Work& work, Digit digit, int64_t* state, int64_t* counts, int64_t* bounds,
                 float* magnitude) {
    bool leading = digit.shift + digit.width == key_bits(work);
    int64_t rows = work.together ? 1 : work.tensors * work.models.count;
    return launch(choose_digit_kernel, rows, kWide, sizeof(Scratch), place.stream, work, digit, leading, state, counts,
                  bounds, magnitude);
}

int count_ties(Place place, const Work& work, const int64_t* bounds, int64_t* counts) {
    int64_t tie_blocks = work.blocks * work.models.count;
    int32_t size = size_of_part(tie_blocks, kLeastPart);
    return with_form(form_of(work), [&](auto f) {
        return launch(count_ties_kernel<f.value>, tie_blocks * (kTieBlock / size), kThreads, 2 * sizeof(uint32_t),
                      place.stream, work, size, bounds, counts);
    });
}

int sum_ties(Place place, const Work& work, const int64_t* bounds, const int32_t* found, int ranks, int64_t* ties) {
    return launch(sum_ties_kernel, work.tensors * 2 * work.models.count, kThreads, (kWarps + 1) * sizeof(uint32_t),
                  place.stream, work, bounds, found, ranks, ties);
}

int bounds_of_small(Place place, const Work& work, int64_t* bounds, int64_t* ties_before) {
    return with_form(form_of(work), [&](auto f) {
        return launch(bounds_of_small_kernel<f.value>, work.tensors * work.models.count, kSmallThreads, sizeof(Small),
                      place.stream, work, bounds, ties_before);
    });
}

int count_window(Place place, const Work& work, int64_t width, int64_t* counts) {
    int64_t tie_blocks = work.blocks * work.models.count;
    int32_t size = size_of_part(tie_blocks, kUnit);
    return launch(form_of(work) == kAny ? count_window_kernel<kAny> : count_window_kernel<kShort>,
                  tie_blocks * (kTieBlock / size), kThreads, sizeof(Cache), place.stream, work, size, width, counts);
}

int mask_band(Place place, Array x, int64_t numel, const int64_t* bounds, const int64_t* ties_before, uint8_t* out) {
    int32_t size = size_of_part(tie_blocks(numel), kLeastPart);
    return launch(x.dtype == kFloat32 ? mask_band_kernel<kAny> : mask_band_kernel<kBits>, (numel + size - 1) / size,
                  kThreads, (kWarps + 1) * sizeof(uint32_t), place.stream, x, numel, size, bounds, ties_before, out);
}

}  // namespace cuda
FM_NAMESPACE_END
