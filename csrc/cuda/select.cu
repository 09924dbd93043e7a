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

// The same with eight keys, those past the end kNoKey. kRaw: they are the bits of 16-bit numbers.
template <int kBlock, bool kRaw, class Use>
FM_DEVICE void each_key(const Source& source, int64_t begin, int64_t end, Use use) {
    if (kRaw) {
        each_words<kBlock>(source.x, begin, end, [&](int64_t at, const uint32_t* words) {
            uint32_t keys[kEach];
            FM_UNROLL
            for (int i = 0; i < 4; ++i) {
                keys[2 * i] = magnitude_key16(static_cast<uint16_t>(words[i]), source.kind);
                keys[2 * i + 1] = magnitude_key16(static_cast<uint16_t>(words[i] >> 16), source.kind);
            }
            forget_past(at, end, keys);
            use(at, keys);
        });
        return;
    }
    uint32_t keys[kEach];
    bool subtract = source.base.data != nullptr;
    for (int64_t tile = begin; tile < end; tile += kBlock * kEach) {
        int64_t at = tile + thread() * kEach;
        float base[kEach], delta[kEach];
        if (subtract) load_rounded(source.base, source.compute, at, end, base);
        delta8(source.x, subtract, source.compute, at, end, base, delta);
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) keys[t] = key_of(delta[t], source.kind);
        forget_past(at, end, keys);
        use(at, keys);
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

// All of them are in shared memory.
FM_INLINE Bins all_inside(uint32_t* local) {
    Bins bins = {local, nullptr, 0, 0, kFloat32, 0};
    return bins;
}

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

// Counts the digits of keys that begin with `prefix`. every: these eight do, and the digit is the leading one.
template <bool kInside>
FM_DEVICE void tally(const Bins& bins, Digit digit, uint32_t prefix, const uint32_t* keys, bool same, bool every) {
    uint32_t mask = (1u << digit.width) - 1u;
    int above = digit.shift + digit.width;
    if (same) {
        if (lane() == 0 && keys[0] >> above == prefix) {
            add<kInside>(bins, (keys[0] >> digit.shift) & mask, 32 * kEach);
        }
    } else if (every) {
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) add<kInside>(bins, keys[t] >> digit.shift, 1u);
    } else {
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) {
            bool counted = keys[t] >> above == prefix;
            uint32_t bin = (keys[t] >> digit.shift) & mask;
            if (kInside) {
                count_if(&bins.local[bin], counted);
            } else if (counted) {
                add<kInside>(bins, bin, 1u);
            }
        }
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
// is read from memory once. kRaw: bins are the bits of 16-bit numbers, and become those of digits when they are added.
template <bool kRaw, bool kInside>
FM_KERNEL_RESIDENT(kWide, 1)
count_keys_kernel(FM_LARGE Work work, Digit digit, uint32_t from, uint32_t inside, bool ranked, int64_t groups,
                  int64_t* counts) {
    int32_t n = work.models.count, model = static_cast<int32_t>(block() % n);
    int64_t group = block() / n, units = work.blocks * (kTieBlock / kUnit);
    int64_t start = units * group / groups * kUnit, stop = units * (group + 1) / groups * kUnit;
    Bins bins = {&shared<uint32_t>(),   nullptr, from, inside, kRaw ? work.kind : static_cast<int32_t>(kFloat32),
                 kRaw ? digit.shift : 0};
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
        if (kRaw) {
            each_words<kWide>(source.x, begin, end, [&](int64_t place, const uint32_t* words) {
                tally_bits<kInside>(bins, words, place, end);
            });
        } else {
            uint32_t prefix = ranked ? 0u : static_cast<uint32_t>(number_of(work, tensor, 2 * model));
            bool every = prefix == 0 && digit.shift + digit.width == (work.kind == kFloat32 ? 31 : 15);
            each_key<kWide, false>(source, begin, end, [&](int64_t place, const uint32_t* keys) {
                tally<kInside>(bins, digit, prefix, keys, same_in_warp(keys), every && place + kEach <= end);
            });
        }
    }
    if (row >= 0) flush();
}

// kLeading: of the leading digit both ranks have the same counts.
template <bool kLeading>
FM_KERNEL_RESIDENT(kThreads, 4)
count_digit_kernel(FM_LARGE Work work, int32_t shift, const int64_t* state, int64_t* counts, int32_t* found,
                   int ranks) {
    // All of it but a place is known beforehand: so few registers go on the loop.
    const Digit digit = {kLeading ? 31 - kRowBits : shift, kLeading ? kRowBits : kRowBits - 1};
    int32_t n = work.models.count, model = static_cast<int32_t>(block() % n);
    int64_t tie_block = block() / n, number = tensor_of(work, tie_block);
    Tensor tensor = tensor_at(work, number);
    bool first = to_be_found(work, tensor, model, 0), second = to_be_found(work, tensor, model, 1);
    if (!first && !second) return;
    int64_t row = work.together ? 0 : number * n + model;
    uint32_t size = 1u << digit.width, all = kLeading ? size : 2 * size;
    uint32_t* local = &shared<uint32_t>();
    clear(local, static_cast<int>(all), kThreads);
    // No key begins with kNeverKey.
    uint32_t of_first = kNeverKey, of_second = kNeverKey;
    if (!kLeading && first) of_first = static_cast<uint32_t>(state[4 * row]);
    if (!kLeading && second) of_second = static_cast<uint32_t>(state[4 * row + 2]);
    sync();
    int64_t begin = (tie_block - tensor.first) * kTieBlock;
    Source source = source_of(work, tensor, model);
    int64_t end = smaller(tensor.numel, begin + kTieBlock);
    each_key<kThreads, false>(source, begin, end, [&](int64_t at, const uint32_t* keys) {
        bool same = same_in_warp(keys);
        tally<true>(all_inside(local), digit, kLeading ? 0u : of_first, keys, same, kLeading && at + kEach <= end);
        if (kLeading || of_second == kNeverKey) return;
        tally<true>(all_inside(local + size), digit, of_second, keys, same, false);
    });
    sync();
    for (uint32_t i = static_cast<uint32_t>(thread()); i < all; i += kThreads) {
        if (local[i] != 0) atomic_add(&counts[(row << kRowBits) + i], static_cast<int64_t>(local[i]));
        if (found == nullptr) continue;
        int place = static_cast<int>(i >> digit.width) - (2 - ranks);
        if (place < 0) continue;
        found[(((model * ranks + place) * work.blocks + tie_block) << digit.width) + (i & (size - 1u))] =
            static_cast<int32_t>(local[i]);
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

// How many keys of a part of a tensor equal each of two; in all threads of the block. `totals` is shared.
template <int kBlock, bool kRaw>
FM_DEVICE void count_equal(const Source& source, int64_t begin, int64_t end, const uint32_t* wanted, uint32_t* totals) {
    uint32_t own[2] = {0, 0};
    each_key<kBlock, kRaw>(source, begin, end, [&](int64_t, const uint32_t* keys) {
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) {
            own[0] += keys[t] == wanted[0] ? 1u : 0u;
            own[1] += keys[t] == wanted[1] ? 1u : 0u;
        }
    });
    for (int mask = 16; mask > 0; mask /= 2) {
        own[0] += from_across(own[0], mask);
        own[1] += from_across(own[1], mask);
    }
    sync();
    if (thread() < 2) totals[thread()] = 0;
    sync();
    if (lane() < 2) atomic_add(&totals[lane()], lane() == 0 ? own[0] : own[1]);
    sync();
}

template <bool kRaw>
FM_KERNEL_RESIDENT(kThreads, 4)
count_ties_kernel(FM_LARGE Work work, const int64_t* bounds, int64_t* counts) {
    int32_t n = work.models.count, model = static_cast<int32_t>(block() % n);
    int64_t tie_block = block() / n;
    Tensor tensor = tensor_at(work, tensor_of(work, tie_block));
    const int64_t* bound = bounds + 4 * (tensor.index * n + model);
    uint32_t wanted[2];
    for (int which = 0; which < 2; ++which) {
        wanted[which] = bound[2 * which + 1] > 0 ? narrow_key(bound[2 * which], work.kind) : kNeverKey;
    }
    uint32_t* totals = &shared<uint32_t>();
    int64_t begin = (tie_block - tensor.first) * kTieBlock;
    bool any = wanted[0] != kNeverKey || wanted[1] != kNeverKey;
    if (any) {
        count_equal<kThreads, kRaw>(source_of(work, tensor, model), begin, smaller(tensor.numel, begin + kTieBlock),
                                    wanted, totals);
    }
    if (thread() < 2) {
        int64_t slot = 2 * model + thread();
        counts[slot * work.blocks_results + tensor.first_result + tie_block - tensor.first] =
            any ? totals[thread()] : 0;
    }
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
    uint32_t bins[1 << kRowBits];
    int64_t prefix[2], rank[2], equal[2];  // of each rank, as the digits are found
};

// A block for each model of each tensor, which has no more elements than a tie block: no ties come before it.
template <bool kRaw>
FM_KERNEL_RESIDENT(kSmallThreads, 1)
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
    for (int place = 0; place < (narrow ? 2 : 3) && (first || second); ++place) {
        // Of the leading digit both ranks have the same counts.
        bool leading = place == 0;
        Digit digit = narrow ? Digit{8 - 8 * place, leading ? 7 : 8} : Digit{20 - 10 * place, leading ? 11 : 10};
        uint32_t size = 1u << digit.width;
        Bins of_first = all_inside(small.bins), of_second = all_inside(small.bins + size);
        clear(small.bins, 1 << kRowBits, kSmallThreads);
        sync();
        uint32_t of[2] = {static_cast<uint32_t>(small.prefix[0]), static_cast<uint32_t>(small.prefix[1])};
        each_key<kSmallThreads, kRaw>(source_of(work, tensor, model), 0, tensor.numel,
                                      [&](int64_t, const uint32_t* keys) {
                                          bool same = same_in_warp(keys);
                                          if (first || leading) tally<true>(of_first, digit, of[0], keys, same, false);
                                          if (second && !leading)
                                              tally<true>(of_second, digit, of[1], keys, same, false);
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

FM_KERNEL_RESIDENT(kThreads, 4) count_window_kernel(FM_LARGE Work work, int64_t width, int64_t* counts) {
    int32_t n = work.models.count, model = static_cast<int32_t>(block() % n);
    int64_t tie_block = block() / n, begin = tie_block * kTieBlock;
    Tensor tensor = tensor_at(work, 0);
    Cache& cache = shared<Cache>();
    for (int i = thread(); i < kCached; i += kThreads) {
        cache.key[i] = -1;
        cache.count[i] = 0;
    }
    if (thread() == 0) cache.beyond = 0;
    // Every key is below these ends, so that a window from there on is as empty as one further on.
    uint32_t low = static_cast<uint32_t>(smaller(number_of(work, tensor, 2 * model), 0x7fffffff));
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
    Source source = source_of(work, tensor, model);
    each_key<kThreads, false>(source, begin, smaller(tensor.numel, begin + kTieBlock),
                              [&](int64_t, const uint32_t* keys) {
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

template <bool kRaw>
FM_KERNEL_RESIDENT(kThreads, 4)
mask_band_kernel(Array x, int64_t numel, const int64_t* bounds, const int64_t* ties_before, uint8_t* out) {
    Source source = {{nullptr, 0}, x, kFloat32, kRaw ? x.dtype : static_cast<int32_t>(kFloat32)};
    BlockBound first = block_bound(bounds, ties_before, block(), blocks(), source.kind);
    BlockBound last = block_bound(bounds + 2, ties_before + blocks(), block(), blocks(), source.kind);
    int64_t begin = block() * kTieBlock, end = smaller(numel, begin + kTieBlock);
    if (!first.walked && !last.walked) {
        each_key<kThreads, kRaw>(source, begin, end, [&](int64_t at, const uint32_t* keys) {
            uint32_t kept[kEach];
            FM_UNROLL
            for (int t = 0; t < kEach; ++t) kept[t] = keys[t] < first.limit && keys[t] >= last.limit ? 1u : 0u;
            store_mask(out, at, end, kept);
        });
        return;
    }
    uint32_t* partial = &shared<uint32_t>();
    uint32_t of_first = 0, of_last = 0;  // equals of each bound before this tile
    each_key<kThreads, kRaw>(source, begin, end, [&](int64_t at, const uint32_t* keys) {
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
        store_mask(out, at, end, kept);
        of_first += total & 0xffffu;
        of_last += total >> 16;
    });
}

int key_bits(const Work& work) { return work.kind == kFloat32 ? 31 : 15; }

bool is_raw(const Work& work) {
    if (work.kind == kFloat32 || work.models.base.data != nullptr) return false;
    for (int32_t i = 0; i < work.models.count; ++i) {
        if (work.models.dtype[i] != work.kind) return false;
    }
    return true;
}

}  // namespace

int count_keys(Place place, const Work& work, Digit digit, bool ranked, int64_t* counts) {
    bool raw = ranked && is_raw(work);
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
    bool all = inside == bins;
    auto of_bits = all ? count_keys_kernel<true, true> : count_keys_kernel<true, false>;
    auto other = all ? count_keys_kernel<false, true> : count_keys_kernel<false, false>;
    return launch(raw ? of_bits : other, groups * n, kWide, static_cast<size_t>(4 * (inside + 1)), place.stream, work,
                  digit, static_cast<uint32_t>(from), static_cast<uint32_t>(inside), ranked, groups, counts);
}

int count_digit(Place place, const Work& work, Digit digit, const int64_t* state, int64_t* counts, int32_t* found,
                int ranks) {
    bool leading = digit.shift + digit.width == key_bits(work);
    return launch(leading ? count_digit_kernel<true> : count_digit_kernel<false>, work.blocks * work.models.count,
                  kThreads, 4 << kRowBits, place.stream, work, digit.shift, state, counts, found, ranks);
}

int choose_digit(Place place, const Work& work, Digit digit, int64_t* state, int64_t* counts, int64_t* bounds,
                 float* magnitude) {
    bool leading = digit.shift + digit.width == key_bits(work);
    int64_t rows = work.together ? 1 : work.tensors * work.models.count;
    return launch(choose_digit_kernel, rows, kWide, sizeof(Scratch), place.stream, work, digit, leading, state, counts,
                  bounds, magnitude);
}

int count_ties(Place place, const Work& work, const int64_t* bounds, int64_t* counts) {
    return launch(is_raw(work) ? count_ties_kernel<true> : count_ties_kernel<false>, work.blocks * work.models.count,
                  kThreads, 2 * sizeof(uint32_t), place.stream, work, bounds, counts);
}

int sum_ties(Place place, const Work& work, const int64_t* bounds, const int32_t* found, int ranks, int64_t* ties) {
    return launch(sum_ties_kernel, work.tensors * 2 * work.models.count, kThreads, (kWarps + 1) * sizeof(uint32_t),
                  place.stream, work, bounds, found, ranks, ties);
}

int bounds_of_small(Place place, const Work& work, int64_t* bounds, int64_t* ties_before) {
    return launch(is_raw(work) ? bounds_of_small_kernel<true> : bounds_of_small_kernel<false>,
                  work.tensors * work.models.count, kSmallThreads, sizeof(Small), place.stream, work, bounds,
                  ties_before);
}

int count_window(Place place, const Work& work, int64_t width, int64_t* counts) {
    return launch(count_window_kernel, work.blocks * work.models.count, kThreads, sizeof(Cache), place.stream, work,
                  width, counts);
}

int mask_band(Place place, Array x, int64_t numel, const int64_t* bounds, const int64_t* ties_before, uint8_t* out) {
    return launch(x.dtype == kFloat32 ? mask_band_kernel<false> : mask_band_kernel<true>, tie_blocks(numel), kThreads,
                  (kWarps + 1) * sizeof(uint32_t), place.stream, x, numel, bounds, ties_before, out);
}

}  // namespace cuda
FM_NAMESPACE_END
