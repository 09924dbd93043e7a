// PCB-Merging: scores, what is counted and summed of them, and the merge that they weigh.
//
// What limits here is arithmetic, not memory: an element of eight rows takes one to two thousand instructions. So
// scores are made again for every sweep rather than kept, and the deltas of all rows of a tile are in shared memory,
// where a thread goes over the rows, or over the pairs of them, in a loop that is as good for two rows as for a
// hundred: what two rows have in common is made once for both. A thread has the same E neighbours of every row; sums
// over the rows wait in its own places of shared memory, and nobody else's.
#include "cuda/api.h"
#include "cuda/scores.h"
#include "cuda/tile.h"
#include "fastmerge/exact_sum.h"
#include "fastmerge/pcb.h"

FM_NAMESPACE_BEGIN
namespace cuda {
namespace {

constexpr int kMostThreads = 128;
// Blocks of kMostThreads on a processor, by the elements of a thread: registers for as many. Without saying so, some
// kernels keep a number in memory for the sake of one block more.
template <int E>
constexpr int kResident = E == 1 ? 10 : 7;
constexpr int kRun = 64;        // neighbours that are sampled together; must equal _RUN in Python
constexpr int kHalves = 65536;  // values of half a key

// --- counting scores

// Adds 1 to the counters of the threads that are inside. What several of a warp have in common is added at once, for
// the values of two of them: where most scores are equal, threads would otherwise queue at one counter.
FM_DEVICE void count_joined(int64_t* counters, bool inside, uint32_t place) {
    for (int round = 0; round < 2; ++round) {
        uint32_t open = ballot(inside);
        if (open == 0) return;
        int leader = lowest_bit(open);
        uint32_t shared_place = from_lane(place, leader);
        bool same = inside && place == shared_place;
        uint32_t together = ballot(same);
        if (lane() == leader) atomic_add(&counters[place], static_cast<int64_t>(count_bits(together)));
        inside = inside && !same;
    }
    if (inside) atomic_add(&counters[place], int64_t{1});
}

// The half of a key that is counted, and whether it is; wanted: -1, or the high half of the keys whose low one is.
FM_INLINE bool half_of(uint32_t key, int64_t wanted, uint32_t* half) {
    *half = wanted < 0 ? key >> 16 : key & 0xffffu;
    return wanted < 0 || static_cast<int64_t>(key >> 16) == wanted;
}

FM_INLINE uint32_t turned(int32_t key) { return static_cast<uint32_t>(key) ^ 0x80000000u; }

// What a block counts of a row before it tells the others.
struct alignas(16) Tally {
    uint32_t highest, past, at_high, at_low;
};

template <int E>
FM_DEVICE void put(float* to, int there, const Few<E>& values) {
    if (there == E && reinterpret_cast<uintptr_t>(to) % sizeof(Few<E>) == 0) {
        *reinterpret_cast<Few<E>*>(to) = values;
        return;
    }
    FM_UNROLL
    for (int e = 0; e < E; ++e) {
        if (e < there) to[e] = values.v[e];
    }
}

template <int E>
struct SweepSink {
    const PcbSweepArgs& sweep;
    Tally* tallies;
    int64_t at;  // in `out`
    int there;   // elements that are: 0 to E

    FM_METHOD void row(int32_t i, Few<E> score, const Few<E>&) {
        if (sweep.sweep == kPcbScores) {
            FM_UNROLL
            for (int e = 0; e < E; ++e) score.v[e] = canonical(score.v[e]);
            put(static_cast<float*>(sweep.out) + i * sweep.stride + at, there, score);
            return;
        }
        uint32_t key[E];
        FM_UNROLL
        for (int e = 0; e < E; ++e) key[e] = score_key(score.v[e]);
        if (sweep.sweep == kPcbSample) {
            FM_UNROLL
            for (int e = 0; e < E; ++e) score.v[e] = bit_cast<float>(key[e] ^ 0x80000000u);
            put(static_cast<float*>(sweep.out) + i * sweep.stride + at, there, score);
            return;
        }
        if (sweep.highest != nullptr) {
            uint32_t most = 0;
            FM_UNROLL
            for (int e = 0; e < E; ++e) most = e < there && key[e] > most ? key[e] : most;
            most = max_of_warp(most);
            if (lane() == 0) atomic_max(&tallies[i].highest, most);
        }
        if (sweep.sweep == kPcbHistogram) {
            int64_t wanted = sweep.low[i];
            FM_UNROLL
            for (int e = 0; e < E; ++e) {
                uint32_t half;
                bool inside = half_of(key[e], wanted, &half) && e < there;
                count_joined(sweep.counts + static_cast<int64_t>(i) * kHalves, inside, half);
            }
        } else if (sweep.sweep == kPcbWindow) {
            count_window(i, key);
        } else {
            collect(i, key);
        }
    }

    FM_METHOD void count_window(int32_t i, const uint32_t* key) {
        int64_t low = sweep.low[i];
        int64_t* counts = sweep.counts + i * (sweep.width + 1) + 1;
        uint32_t past = 0;
        FM_UNROLL
        for (int e = 0; e < E; ++e) {
            int64_t place = static_cast<int64_t>(key[e]) - low;
            past += e < there && place >= sweep.width ? 1u : 0u;
            count_joined(counts, e < there && place >= 0 && place < sweep.width, static_cast<uint32_t>(place));
        }
        past = sum_of_warp(past);
        if (lane() == 0 && past > 0) atomic_add(&tallies[i].past, past);
    }

    FM_METHOD void collect(int32_t i, const uint32_t* key) {
        uint32_t low = turned(sweep.window[2 * i]), high = turned(sweep.window[2 * i + 1]);
        uint32_t three = 0, inside[E], total = 0;  // three numbers of 8 bits, of which each is at most 4 * 32
        FM_UNROLL
        for (int e = 0; e < E; ++e) {
            bool counts = e < there;
            three += counts && key[e] > high ? 1u : 0u;
            three += counts && key[e] == high ? 1u << 8 : 0u;
            three += counts && key[e] == low && low < high ? 1u << 16 : 0u;
            inside[e] = ballot(counts && key[e] > low && key[e] < high);
            total += static_cast<uint32_t>(count_bits(inside[e]));
        }
        three = sum_of_warp(three);
        if (lane() == 0 && three > 0) {
            atomic_add(&tallies[i].past, three & 0xffu);
            atomic_add(&tallies[i].at_high, (three >> 8) & 0xffu);
            atomic_add(&tallies[i].at_low, three >> 16);
        }
        if (total == 0) return;
        int64_t slot = 0;
        if (lane() == 0) slot = atomic_add(&sweep.counts[4 * i + 3], static_cast<int64_t>(total));
        slot = from_lane(slot, 0);
        uint32_t before = (1u << lane()) - 1u;
        uint32_t* out = static_cast<uint32_t*>(sweep.out) + i * sweep.stride;
        FM_UNROLL
        for (int e = 0; e < E; ++e) {
            int64_t mine = slot + count_bits(inside[e] & before);
            if (((inside[e] >> lane()) & 1u) != 0 && mine < sweep.stride) out[mine] = key[e];
            slot += count_bits(inside[e]);
        }
    }
};

template <int V, int E>
FM_KERNEL_RESIDENT(kMostThreads, kResident<E>)
pcb_sweep_kernel(FM_LARGE PcbArgs args, FM_LARGE PcbSweepArgs sweep, int threads) {
    if (sweep.missing != nullptr && *sweep.missing == 0) return;
    int32_t n = args.models.count;
    int tile = threads * E;
    Edge* edges = reinterpret_cast<Edge*>(&shared<unsigned char>());
    Tally* tallies = reinterpret_cast<Tally*>(edges + n);
    float* memory = reinterpret_cast<float*>(tallies + n);
    make_edges(args, threads, edges);
    for (int32_t i = thread(); i < n; i += threads) tallies[i] = {0, 0, 0, 0};

    bool sample = sweep.sweep == kPcbSample;
    int64_t numel = args.models.numel;
    int64_t slots = sample ? sweep.runs * kRun : numel;
    int64_t part = sample ? numel / sweep.runs : 0;
    Columns<E> columns = {memory + thread() * E, n, tile};
    for (int64_t first = block() * tile; first < slots; first += blocks() * tile) {
        int64_t slot = first + kEach * (thread() % (tile / kEach));
        int64_t place = slot < slots ? slot : numel;
        if (sample && slot < slots) {
            // Somewhere in its part of the chunk, in another place in each of them.
            int64_t run = slot / kRun;
            int64_t jitter = ((run * 0x9e3779b1) & 0x7fffffff) * (part - kRun + 1) >> 31;
            place = run * part + jitter + slot % kRun;
        }
        sync();
        stage<E>(args.models, threads, place, numel, memory);
        sync();
        int64_t at = first + thread() * E;
        int there = static_cast<int>(at >= slots ? 0 : smaller(slots - at, E));
        SweepSink<E> sink = {sweep, tallies, sample ? sweep.first * kRun + at : at, there};
        scored<V, E>(args, edges, columns, sink);
    }

    sync();
    for (int32_t i = thread(); i < n; i += threads) {
        Tally tally = tallies[i];
        if (sweep.highest != nullptr) atomic_max(&sweep.highest[i], static_cast<int64_t>(tally.highest));
        int64_t* counts = sweep.counts + i * (sweep.sweep == kPcbWindow ? sweep.width + 1 : 4);
        if (tally.past > 0) atomic_add(&counts[0], static_cast<int64_t>(tally.past));
        if (tally.at_high > 0) atomic_add(&counts[1], static_cast<int64_t>(tally.at_high));
        if (tally.at_low > 0) atomic_add(&counts[2], static_cast<int64_t>(tally.at_low));
    }
}

// --- the merge

struct ApplyArgs {
    const float* thresholds;  // [n, 2]
    float weight[kMostModels];
    void* out;
    int32_t out_dtype;
    float* scale;  // [n, numel]; nullptr: not wanted
};

// S of a row, from its scores.
template <int V>
FM_INLINE float share_of(float score, float start, float most) {
    if (V == kPcbPaper) return score >= start ? score : 0.0f;
    return most > start ? quotient(between(score, start, most) - start, most - start) : 0.0f;
}

template <int V, int E>
struct ApplySink {
    const ApplyArgs& apply;
    int64_t at, numel;
    int there;
    Few<E> mixed, divisor;

    FM_METHOD void row(int32_t i, const Few<E>& score, const Few<E>& value) {
        float start = apply.thresholds[2 * i], most = apply.thresholds[2 * i + 1];
        Few<E> share;
        FM_UNROLL
        for (int e = 0; e < E; ++e) {
            share.v[e] = share_of<V>(score.v[e], start, most);
            mixed.v[e] = mixed.v[e] + (value.v[e] * share.v[e]) * apply.weight[i];
            divisor.v[e] = divisor.v[e] + share.v[e];
        }
        if (apply.scale == nullptr) return;
        FM_UNROLL
        for (int e = 0; e < E; ++e) share.v[e] = canonical(share.v[e]);
        put(apply.scale + i * numel + at, there, share);
    }
};

template <int V, int E>
FM_KERNEL_RESIDENT(kMostThreads, E == 1 ? 8 : 6)
pcb_apply_kernel(FM_LARGE PcbArgs args, FM_LARGE ApplyArgs apply, int threads) {
    int32_t n = args.models.count;
    int tile = threads * E;
    int64_t numel = args.models.numel;
    Edge* edges = reinterpret_cast<Edge*>(&shared<unsigned char>());
    float* memory = reinterpret_cast<float*>(edges + n);
    make_edges(args, threads, edges);
    Columns<E> columns = {memory + thread() * E, n, tile};
    for (int64_t first = block() * tile; first < numel; first += blocks() * tile) {
        int64_t group = first + kEach * (thread() % (tile / kEach));
        sync();
        stage<E>(args.models, threads, group, numel, memory);
        sync();
        int64_t at = first + thread() * E;
        int there = static_cast<int>(at >= numel ? 0 : smaller(numel - at, E));
        ApplySink<V, E> sink = {apply, at, numel, there, all<E>(-0.0f), all<E>(-0.0f)};
        scored<V, E>(args, edges, columns, sink);
        Few<E> merged;
        FM_UNROLL
        for (int e = 0; e < E; ++e) {
            float divisor = sink.divisor.v[e];
            if (V == kPcbPaper) {
                merged.v[e] = divisor == 0.0f ? 0.0f : quotient(sink.mixed.v[e], divisor == 0.0f ? 1.0f : divisor);
            } else {
                merged.v[e] = quotient(sink.mixed.v[e], divisor < kSmallestDivisor ? kSmallestDivisor : divisor);
            }
        }
        // Its own deltas of the first row are not needed any more: there the eights come together that are stored.
        columns.at(0, 0) = merged;
        sync();
        if (thread() >= tile / kEach || group >= numel) continue;
        float values[kEach];
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) values[t] = memory[kEach * thread() + t];
        if (args.models.base.data != nullptr) {
            float base[kEach];
            load8(args.models.base, group, numel, base);
            FM_UNROLL
            for (int t = 0; t < kEach; ++t) values[t] = base[t] + values[t];
        }
        store8(apply.out, apply.out_dtype, group, numel, values);
    }
}

// --- extremes and sums of the paper's formula

constexpr int kFour = 4;  // elements of a thread in these

// `edges` int32[pairs, 2]: ordered bits of the least and the greatest product, in shared memory where they fit.
FM_KERNEL_RESIDENT(kMostThreads, kResident<kFour>)
pcb_extremes_kernel(FM_LARGE Models models, int32_t* out, int threads, bool in_shared) {
    int32_t n = models.count;
    int tile = threads * kFour;
    int pairs = static_cast<int>(pcb_pairs(n));
    float* memory = &shared<float>();
    int32_t* edges = in_shared ? reinterpret_cast<int32_t*>(memory + n * tile) : out;
    for (int k = thread(); in_shared && k < 2 * pairs; k += threads) {
        edges[k] = ordered_bits(bit_cast<float>(kInfBits | (k % 2 == 0 ? 0u : 0x80000000u)));
    }
    Columns<kFour> columns = {memory + thread() * kFour, n, tile};
    for (int64_t first = block() * tile; first < models.numel; first += blocks() * tile) {
        sync();
        stage<kFour>(models, threads, first + kEach * (thread() % (tile / kEach)), models.numel, memory);
        sync();
        int64_t at = first + thread() * kFour;
        int32_t* edge = edges;
        FM_ROLLED
        for (int32_t i = 0; i < n; ++i) {
            Few<kFour> delta = columns.at(0, i);
            FM_UNROLL
            for (int e = 0; e < kFour; ++e) delta.v[e] = at + e < models.numel ? delta.v[e] : bit_cast<float>(kNanBits);
            FM_ROLLED
            for (int32_t j = i; j < n; ++j, edge += 2) {
                Few<kFour> other = columns.at(0, j);
                // These leave NaN out, and all else that is done to a product keeps the order, so it is done at the
                // end.
                float least = delta.v[0] * other.v[0], most = least;
                FM_UNROLL
                for (int e = 1; e < kFour; ++e) {
                    float product = delta.v[e] * other.v[e];
                    least = fminf(least, product);
                    most = fmaxf(most, product);
                }
                // Soon there is hardly ever anything nearer the edges. What is read of them may be old, but then it was
                // nearer: nothing is missed.
                bool wider = fminf(least, kLargestProduct) < from_ordered_bits(peek(&edge[0])) ||
                             fmaxf(most, -kLargestProduct) > from_ordered_bits(peek(&edge[1]));
                if (ballot(wider) == 0) continue;
                bool none = least != least;
                int32_t low = ordered_bits(between(least, -kLargestProduct, kLargestProduct) + 0.0f);
                int32_t high = ordered_bits(between(most, -kLargestProduct, kLargestProduct) + 0.0f);
                low = min_of_warp(none ? static_cast<int32_t>(kInfBits) : low);
                high = max_of_warp(none ? -1 - static_cast<int32_t>(kInfBits) : high);
                if (lane() == 0 && low < peek(&edge[0])) atomic_min(&edge[0], low);
                if (lane() == 0 && high > peek(&edge[1])) atomic_max(&edge[1], high);
            }
        }
    }
    if (!in_shared) return;
    sync();
    for (int k = thread(); k < 2 * pairs; k += threads) {
        if (k % 2 == 0 && edges[k] < peek(&out[k])) atomic_min(&out[k], edges[k]);
        if (k % 2 == 1 && edges[k] > peek(&out[k])) atomic_max(&out[k], edges[k]);
    }
}

// Sums are taken in units of 2^(place - 149) of a place near the least that is usual. Within 26 binades from there on,
// mantissas fit 50 bits, and their sums over a warp two numbers of 32 bits, of 26 bits and of all above.
constexpr int kBinades = 26;
constexpr uint32_t kLowPart = (1u << kBinades) - 1u;

FM_DEVICE void add_to_limbs(int64_t* limb, uint64_t value, int place) {
    ExactSum sum;
    exact_clear(sum);
    exact_add(sum, value, place & 31);
    FM_UNROLL
    for (int k = 0; k < 3; ++k) {
        if (sum.limb[k] != 0) atomic_add(&limb[(place >> 5) + k], static_cast<int64_t>(sum.limb[k]));
    }
}

struct alignas(16) TwoParts {
    uint64_t low, high;
};

// What is in the range from `unit` on is taken out of key[], and its sum over the warp returned in two parts.
FM_DEVICE TwoParts sum_of_range(int unit, uint32_t* key) {
    uint64_t sum = 0;
    FM_UNROLL
    for (int e = 0; e < kFour; ++e) {
        int above = magnitude_place(key[e]) - unit;
        bool now = above >= 0 && above <= kBinades;
        sum += static_cast<uint64_t>(now ? magnitude_mantissa(key[e]) : 0u) << (now ? above : 0);
        key[e] = now ? 0u : key[e];
    }
    TwoParts parts;
    parts.low = sum_of_warp(static_cast<uint32_t>(sum) & kLowPart);
    parts.high = sum_of_warp(static_cast<uint32_t>(sum >> kBinades));
    return parts;
}

// What the warp adds to its own sum, or to the limbs of all.
FM_DEVICE void add_parts(const TwoParts& parts, int unit, TwoParts* own, int64_t* limbs) {
    if (lane() != 0) return;
    if (own != nullptr) {
        TwoParts sum = *own;
        sum.low += parts.low;
        sum.high += parts.high;
        *own = sum;
    } else {
        add_to_limbs(limbs, parts.low + (parts.high << kBinades), unit);
    }
}

// The sum of the warp's values in units of 2^-23, if all of them are in [1, 4): a number of 32 bits.
FM_DEVICE bool sum_of_ordinary(const Few<kFour>& values, int there, uint32_t* sum) {
    bool ordinary = there == kFour;
    uint32_t own = 0;
    FM_UNROLL
    for (int e = 0; e < kFour; ++e) {
        uint32_t bits = bit_cast<uint32_t>(values.v[e]);
        uint32_t above = (bits >> 23) - 127u;
        ordinary = ordinary && above < 2u;
        own += ((bits & 0x7fffffu) | 0x800000u) << (above & 1u);
    }
    if (!all_of_warp(ordinary)) return false;
    *sum = sum_of_warp(own);
    return true;
}

// Adds the warp's values, exactly; what is not finite is left out. own: the warp's own sum, or nullptr.
FM_DEVICE void add_values(const Few<kFour>& values, int there, int unit, TwoParts* own, int64_t* limbs) {
    uint32_t key[kFour];
    FM_UNROLL
    for (int e = 0; e < kFour; ++e) {
        key[e] = bit_cast<uint32_t>(values.v[e]) & 0x7fffffffu;
        key[e] = e < there && key[e] < kInfBits ? key[e] : 0u;
    }
    TwoParts parts = sum_of_range(unit, key);
    add_parts(parts, unit, own, limbs);
    FM_ROLLED
    while (true) {
        uint32_t top = 0;
        FM_UNROLL
        for (int e = 0; e < kFour; ++e) top = key[e] > top ? key[e] : top;
        top = max_of_warp(top);
        if (top == 0) break;
        int place = magnitude_place(top);
        place = place > kBinades ? place - kBinades : 0;
        parts = sum_of_range(place, key);
        if (lane() == 0) add_to_limbs(limbs, parts.low + (parts.high << kBinades), place);
    }
}

FM_KERNEL(kMostThreads) pcb_sums_kernel(FM_LARGE PcbArgs args, int64_t* limbs, int threads, bool in_shared) {
    int32_t n = args.models.count;
    int64_t numel = args.models.numel;
    int tile = threads * kFour;
    int sums = n + static_cast<int>(pcb_pairs(n));
    float models = static_cast<float>(n), shift = pcb_shift(n);
    // exp of a number of [0, 1], and of one from -shift on.
    int pair_unit = magnitude_place(0x3f800000u);
    int own_unit = magnitude_place(bit_cast<uint32_t>(exp_of(-shift))) - 1;
    float* memory = &shared<float>();
    TwoParts* parts = reinterpret_cast<TwoParts*>(memory + n * tile);
    int warps = threads / 32;
    for (int k = thread(); in_shared && k < sums * warps; k += threads) parts[k] = {0, 0};
    TwoParts* own = parts + (thread() / 32) * sums;
    Columns<kFour> columns = {memory + thread() * kFour, n, tile};
    for (int64_t first = block() * tile; first < numel; first += blocks() * tile) {
        sync();
        stage<kFour>(args.models, threads, first + kEach * (thread() % (tile / kEach)), numel, memory);
        sync();
        int64_t at = first + thread() * kFour;
        int there = static_cast<int>(at >= numel ? 0 : smaller(numel - at, kFour));
        int pair = 0;
        FM_ROLLED
        for (int32_t i = 0; i < n; ++i) {
            Few<kFour> delta = columns.at(0, i);
            FM_ROLLED
            for (int32_t j = i; j < n; ++j, ++pair) {
                Norm norm = norm_of(args.extremes[2 * pair], args.extremes[2 * pair + 1]);
                Few<kFour> other = columns.at(0, j), spread;
                FM_UNROLL
                for (int e = 0; e < kFour; ++e) spread.v[e] = pair_norm(delta.v[e], other.v[e], norm);
                // Of a row with itself there are two, which share their code.
                FM_ROLLED
                for (int twice = i == j ? 0 : 1; twice < 2; ++twice) {
                    int sum = twice == 0 ? i : n + pair;
                    Few<kFour> values;
                    FM_UNROLL
                    for (int e = 0; e < kFour; ++e) {
                        values.v[e] = exp_of(twice == 0 ? spread.v[e] * models - shift : spread.v[e]);
                    }
                    TwoParts added = {0, 0}, *own_sum = in_shared ? own + sum : nullptr;
                    int64_t* limb = limbs + static_cast<int64_t>(sum) * kLimbs;
                    uint32_t ordinary;
                    if (twice == 1 && sum_of_ordinary(values, there, &ordinary)) {
                        added.low = ordinary;
                        add_parts(added, pair_unit, own_sum, limb);
                    } else {
                        add_values(values, there, twice == 0 ? own_unit : pair_unit, own_sum, limb);
                    }
                }
            }
        }
    }
    if (!in_shared) return;
    sync();
    for (int k = thread(); k < sums; k += threads) {
        TwoParts total = {0, 0};
        for (int warp = 0; warp < warps; ++warp) {
            total.low += parts[warp * sums + k].low;
            total.high += parts[warp * sums + k].high;
        }
        int unit = k < n ? own_unit : pair_unit;
        add_to_limbs(limbs + static_cast<int64_t>(k) * kLimbs, total.low, unit);
        add_to_limbs(limbs + static_cast<int64_t>(k) * kLimbs, total.high, unit + kBinades);
    }
}

FM_KERNEL(kMostThreads) pcb_carry_kernel(int64_t* limbs, int64_t sums) {
    int64_t k = block() * kMostThreads + thread();
    if (k >= sums) return;
    ExactSum sum;
    FM_UNROLL
    for (int i = 0; i < kLimbs; ++i) sum.limb[i] = static_cast<uint64_t>(limbs[k * kLimbs + i]);
    exact_carry(sum);
    FM_UNROLL
    for (int i = 0; i < kLimbs; ++i) limbs[k * kLimbs + i] = static_cast<int64_t>(sum.limb[i]);
}

// --- the k-th highest key

// So many blocks have a row's keys together.
FM_KERNEL(kThreads)
pcb_collected_halves_kernel(const uint32_t* keys, int64_t capacity, const int64_t* collected, const int64_t* prefix,
                            int64_t* counts, int64_t blocks_of_row) {
    int64_t row = block() / blocks_of_row;
    int64_t there = smaller(collected[4 * row + 3], capacity), wanted = prefix[row];
    for (int64_t start = block() % blocks_of_row * kThreads; start < there; start += blocks_of_row * kThreads) {
        int64_t place = start + thread();
        uint32_t half = 0;
        bool inside = place < there && half_of(keys[row * capacity + place], wanted, &half);
        count_joined(counts + row * kHalves, inside, half);
    }
}

struct PickShared {
    int64_t sum[kHalves / 256];
};

FM_DEVICE int64_t sum_of_lanes_upto(int64_t own) {
    for (int distance = 1; distance < 32; distance *= 2) {
        int64_t before = from_before(own, distance);
        if (lane() >= distance) own += before;
    }
    return own;
}

// A block per row: adds to the prefix (-1: none yet) the half of a key in which the rank lies, rank 1 the highest, and
// takes from the rank what lies above. Where the rank is that of no key, whatever half.
FM_KERNEL(kThreads) pcb_pick_kernel(const int64_t* counts, int64_t* prefix, int64_t* rank) {
    constexpr int kChunks = kHalves / 256;
    PickShared& memory = shared<PickShared>();
    const int64_t* bins = counts + block() * kHalves;
    for (int chunk = thread() / 32; chunk < kChunks; chunk += kWarps) {
        int64_t sum = 0;
        FM_UNROLL
        for (int k = 0; k < 8; ++k) sum += bins[chunk * 256 + 32 * k + lane()];
        sum = from_lane(sum_of_lanes_upto(sum), 31);
        if (lane() == 0) memory.sum[chunk] = sum;
    }
    sync();
    if (thread() >= 32) return;
    int64_t left = rank[block()];
    int bin = 0;
    // First among the chunks, then among the bins of one, from the highest on: each thread has eight of them.
    for (int level = 0; level < 2; ++level) {
        const int64_t* from = level == 0 ? memory.sum : bins + bin;
        int top = 255 - 8 * lane();
        int64_t own = 0;
        for (int k = 0; k < 8; ++k) own += from[top - k];
        int64_t before = sum_of_lanes_upto(own) - own;
        uint32_t here = ballot(before < left && left <= before + own);
        int lane_of = here == 0 ? 31 : lowest_bit(here);
        int found = top - 7;
        for (int k = 0; k < 7; ++k) {
            int64_t count = from[top - k];
            if (left <= before + count) {
                found = top - k;
                break;
            }
            before += count;
        }
        left -= from_lane(before, lane_of);
        found = from_lane(found, lane_of);
        bin = level == 0 ? found * 256 : bin + found;
    }
    if (lane() == 0) {
        int64_t above = prefix[block()];
        prefix[block()] = above < 0 ? bin : (above << 16) | bin;
        rank[block()] = left;
    }
}

// The window of a row in which a rank must lie by its sample: six standard errors to either side, judged by how much
// runs of neighbours differ. First the key at the rank's place is found, by three digits from the top; then runs are
// compared with it; then the keys at the window's two ends are found, of which the first digit is counted already.
// These are steps of a launch each, with many blocks for a row: every block of a step chooses by what all of the step
// before counted, and counts a part.
constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kKeysAtOnce = 4;  // times four, of a thread
constexpr int64_t kKeysOfBlock = 1 << 13;
enum WindowStep : int { kFirstDigit, kSecondDigit, kThirdDigit, kRuns, kSecondOfEnds, kThirdOfEnds, kEnds, kSteps };

// Found of a key, and the place that is wanted among those that begin with it.
struct Found {
    uint32_t prefix, left;
};

// What steps tell each other of a row, in the device's memory; of zeros at first.
struct alignas(16) WindowRow {
    uint32_t bins[7][kDigits];  // of the key the three digits; of the ends the second of both, and the third
    Found found[kSteps][2];     // by each step, of the key or of the ends
    uint32_t sum, squares;      // of how many of a run are not below the key
};
static_assert(sizeof(WindowRow) == 4 * kWindowNumbers, "there is room for it");

struct WindowShared {
    uint32_t bins[2][kDigits];
    Found found[2];
    uint32_t partial[kWarps + 1];
};

FM_INLINE int digit_of_step(int step) { return step < kSecondOfEnds ? step : step - kRuns; }
FM_INLINE int bits_of_digit(int digit) { return digit == 2 ? 32 - 2 * kDigitBits : kDigitBits; }

// Calls work(key) for all keys of a block, which takes its turn among those of its row. The number of keys is a
// multiple of kRun.
template <class Work>
FM_DEVICE void over_sample(const int32_t* keys, int64_t size, int64_t turn, int64_t turns, const Work& work) {
    constexpr int64_t kTurn = int64_t{4} * kThreads * kKeysAtOnce;
    for (int64_t start = turn * kTurn + 4 * thread(); start < size; start += turns * kTurn) {
        Words4 read[kKeysAtOnce];
        FM_UNROLL
        for (int k = 0; k < kKeysAtOnce; ++k) {
            int64_t at = start + int64_t{4} * kThreads * k;
            if (at < size) read[k] = load16(keys + at);
        }
        FM_UNROLL
        for (int k = 0; k < kKeysAtOnce; ++k) {
            if (start + int64_t{4} * kThreads * k >= size) break;
            FM_UNROLL
            for (int t = 0; t < 4; ++t) work(read[k].word[t] ^ 0x80000000u);
        }
    }
}

// Adds to what is found the digit in which the place lies; by the whole block. `to` is shared.
FM_DEVICE void choose(const uint32_t* bins, int bits, Found from, uint32_t* partial, Found* to) {
    constexpr int kOwn = kDigits / kThreads;
    const uint32_t* mine = bins + kOwn * thread();
    uint32_t own = 0, total;
    FM_UNROLL
    for (int k = 0; k < kOwn; k += 4) {
        Words4 four = load16(mine + k);
        own += four.word[0] + four.word[1] + four.word[2] + four.word[3];
    }
    uint32_t before = sum_before(own, partial, &total);
    if (before <= from.left && from.left < before + own) {
        int k = 0;
        for (; from.left >= before + mine[k]; ++k) before += mine[k];
        *to = {(from.prefix << bits) | static_cast<uint32_t>(kOwn * thread() + k), from.left - before};
    }
}

// How many of each run of a row are not below `key`: their sum, and that of their squares; a warp takes a run.
FM_DEVICE void over_runs(const int32_t* keys, int64_t runs, int64_t turn, int64_t turns, int32_t key, WindowRow& row) {
    constexpr int kAtOnce = 4;
    constexpr int kParts = kRun / 32;
    uint32_t sum = 0, squares = 0;
    for (int64_t run = (turn * kWarps + thread() / 32) * kAtOnce; run < runs; run += turns * kWarps * kAtOnce) {
        int32_t read[kAtOnce][kParts];
        FM_UNROLL
        for (int k = 0; k < kAtOnce; ++k) {
            FM_UNROLL
            for (int part = 0; part < kParts; ++part) {
                int64_t at = smaller(run + k, runs - 1) * kRun + 32 * part + lane();
                read[k][part] = keys[at];
            }
        }
        FM_UNROLL
        for (int k = 0; k < kAtOnce; ++k) {
            uint32_t not_below = 0;
            FM_UNROLL
            for (int part = 0; part < kParts; ++part) {
                not_below += static_cast<uint32_t>(count_bits(ballot(read[k][part] >= key)));
            }
            if (run + k >= runs) break;
            sum += not_below;
            squares += not_below * not_below;
        }
    }
    if (lane() == 0 && sum > 0) {
        atomic_add(&row.sum, sum);
        atomic_add(&row.squares, squares);
    }
}

// place: [n], that of the rank in the sample, counted from the lowest. most: how far from it the ends may be. window:
// two keys of each row, as int32 that order as keys do.
FM_KERNEL(kThreads)
pcb_likely_window_kernel(int step, const int32_t* sample, int64_t size, const int64_t* place, int64_t most,
                         WindowRow* known, int32_t* window, int64_t blocks_of_row) {
    WindowShared& memory = shared<WindowShared>();
    int64_t number = block() / blocks_of_row, turn = block() % blocks_of_row, runs = size / kRun;
    WindowRow& row = known[number];
    const int32_t* keys = sample + number * size;
    int64_t centre = place[number], low = centre, high = centre;
    bool ends = step >= kSecondOfEnds;
    if (ends) {
        // The variance of a run's count times the number of runs is that of all of them together.
        int64_t spread =
            runs * static_cast<int64_t>(row.squares) - static_cast<int64_t>(row.sum) * static_cast<int64_t>(row.sum);
        float error = runs > 1 ? sqrtf(static_cast<float>(spread) / static_cast<float>(runs - 1)) : 0.0f;
        int64_t reach = runs > 1 ? smaller(static_cast<int64_t>(6.0f * error) + 8, most) : most;
        low = centre - reach;
        high = centre + reach;
    }
    int counted = digit_of_step(step) - 1;  // by the step before
    for (int end = 0; end < (ends ? 2 : 1) && step > 0; ++end) {
        Found from = row.found[step - 1][end];
        int64_t begin = end == 0 ? low : high;
        if (counted == 0) from = {0, static_cast<uint32_t>(begin < 0 ? 0 : smaller(begin, size - 1))};
        const uint32_t* bins = row.bins[ends && counted > 0 ? 2 * counted + 1 + end : counted];
        choose(bins, bits_of_digit(counted), from, memory.partial, &memory.found[end]);
    }
    sync();
    if (step > 0 && turn == 0 && thread() < (ends ? 2 : 1)) row.found[step][thread()] = memory.found[thread()];
    if (step == kEnds) {
        if (thread() != 0) return;
        const int32_t least = -0x7fffffff - 1, greatest = 0x7fffffff;  // below and above every key
        window[2 * number] = low < 0 ? least : static_cast<int32_t>(memory.found[0].prefix ^ 0x80000000u);
        window[2 * number + 1] = high >= size ? greatest : static_cast<int32_t>(memory.found[1].prefix ^ 0x80000000u);
        return;
    }
    if (step == kRuns) {
        over_runs(keys, runs, turn, blocks_of_row, static_cast<int32_t>(memory.found[0].prefix ^ 0x80000000u), row);
        return;
    }
    int digit = counted + 1, bits = bits_of_digit(digit),
        shift = digit == 0   ? 32 - bits
                : digit == 1 ? 32 - 2 * bits
                             : 0;
    for (int k = thread(); k < 2 * kDigits; k += kThreads) memory.bins[k / kDigits][k % kDigits] = 0;
    sync();
    uint32_t first = memory.found[0].prefix, second = memory.found[1].prefix;
    over_sample(keys, size, turn, blocks_of_row, [&](uint32_t key) {
        // In two shifts, for by 32 there is none.
        uint32_t begins = (key >> shift) >> bits, own = (key >> shift) & ((1u << bits) - 1u);
        if (digit == 0 || begins == first) atomic_add(&memory.bins[0][own], 1u);
        if (ends && begins == second) atomic_add(&memory.bins[1][own], 1u);
    });
    sync();
    for (int k = thread(); k < (ends ? 2 : 1) * kDigits; k += kThreads) {
        int end = k / kDigits;
        uint32_t count = memory.bins[end][k % kDigits];
        if (count > 0) atomic_add(&row.bins[ends ? 2 * digit + 1 + end : digit][k % kDigits], count);
    }
}

// A thread per row: the key of its rank-th highest score, or -1 and one more is missing.
FM_KERNEL(kMostThreads)
pcb_settle_kernel(int32_t rows, const int64_t* rank, const int32_t* window, const int64_t* collected, int64_t capacity,
                  const int64_t* prefix, int64_t* found, int32_t* missing) {
    int i = thread();
    if (i >= rows) return;
    const int64_t* counts = collected + 4 * i;
    int64_t wanted = rank[i], above = counts[0], at_high = above + counts[1];
    int64_t inside = at_high + counts[3], at_low = inside + counts[2];
    int64_t key = -1;
    if (wanted <= above) {
        key = -1;
    } else if (wanted <= at_high) {
        key = turned(window[2 * i + 1]);
    } else if (wanted <= inside) {
        key = counts[3] <= capacity ? prefix[i] : -1;
    } else if (wanted <= at_low) {
        key = turned(window[2 * i]);
    }
    found[i] = key;
    if (key < 0) atomic_add(missing, 1);
}

// --- launches

struct Shape {
    int each, threads;
    size_t bytes;
};

// Elements and threads of a block whose rows of numbers, `columns` for each model, fit shared memory so often that
// blocks enough are on each processor. `more`: bytes besides.
Shape shape_of(int32_t models, int columns, size_t more, bool may_be_one) {
    size_t limit = static_cast<size_t>(shared_limit());
    auto bytes = [&](int each, int threads) {
        return static_cast<size_t>(models) * static_cast<size_t>(4 * columns * each * threads) + more;
    };
    if (!may_be_one || bytes(kFour, kMostThreads) <= limit / 3) {
        for (int threads = kMostThreads; threads > 32; threads /= 2) {
            if (bytes(kFour, threads) <= limit / 3) return {kFour, threads, bytes(kFour, threads)};
        }
        return {kFour, 32, bytes(kFour, 32)};
    }
    for (int threads = kMostThreads; threads > 32; threads /= 2) {
        if (bytes(1, threads) <= limit / 3) return {1, threads, bytes(1, threads)};
    }
    return {1, 32, bytes(1, 32)};
}

// Blocks that have all tiles together: many times what fits the processors at a time, so that the last do not wait for
// each other; few enough that what each of them tells the others in the end does not count.
int64_t grid_of(int64_t numel, const Shape& shape) {
    int64_t tile = int64_t{shape.threads} * shape.each;
    return smaller((numel + tile - 1) / tile, processors() * 64 * (kMostThreads / shape.threads));
}

template <int V>
int sweep_variant(Place place, const PcbArgs& args, const PcbSweepArgs& sweep) {
    size_t tables = (sizeof(Edge) + sizeof(Tally)) * static_cast<size_t>(args.models.count);
    Shape shape = shape_of(args.models.count, kColumns<V>, tables, true);
    int64_t grid = grid_of(sweep.sweep == kPcbSample ? sweep.runs * kRun : args.models.numel, shape);
    auto kernel = shape.each == 1 ? pcb_sweep_kernel<V, 1> : pcb_sweep_kernel<V, kFour>;
    return launch(kernel, grid, shape.threads, shape.bytes, place.stream, args, sweep, shape.threads);
}

template <int V>
int apply_variant(Place place, const PcbArgs& args, const ApplyArgs& apply) {
    Shape shape = shape_of(args.models.count, kColumns<V>, sizeof(Edge) * static_cast<size_t>(args.models.count), true);
    auto kernel = shape.each == 1 ? pcb_apply_kernel<V, 1> : pcb_apply_kernel<V, kFour>;
    return launch(kernel, grid_of(args.models.numel, shape), shape.threads, shape.bytes, place.stream, args, apply,
                  shape.threads);
}

// Calls with(variant) as a constant.
template <int V>
struct Variant {
    static constexpr int value = V;
};
template <class With>
int with_variant(int32_t variant, const With& with) {
    if (variant == kPcbScript) return with(Variant<kPcbScript>());
    if (variant == kPcbVision) return with(Variant<kPcbVision>());
    if (variant == kPcbVisionEs) return with(Variant<kPcbVisionEs>());
    return with(Variant<kPcbPaper>());
}

}  // namespace

int pcb_sweep(Place place, const PcbArgs& args, const PcbSweepArgs& sweep) {
    return with_variant(args.variant, [&](auto v) { return sweep_variant<v.value>(place, args, sweep); });
}

int pcb_apply(Place place, const PcbArgs& args, const float* thresholds, const float* weights, void* out,
              int32_t out_dtype, float* scale) {
    ApplyArgs apply = {thresholds, {}, out, out_dtype, scale};
    for (int32_t i = 0; i < args.models.count; ++i) apply.weight[i] = weights[i];
    return with_variant(args.variant, [&](auto v) { return apply_variant<v.value>(place, args, apply); });
}

int pcb_extremes(Place place, const Models& models, int32_t* ordered) {
    Shape shape = shape_of(models.count, 1, 0, false);
    size_t edges = 8 * static_cast<size_t>(pcb_pairs(models.count));
    bool in_shared = shape.bytes + edges <= static_cast<size_t>(shared_limit()) / 3;
    return launch(pcb_extremes_kernel, grid_of(models.numel, shape), shape.threads,
                  shape.bytes + (in_shared ? edges : 0), place.stream, models, ordered, shape.threads, in_shared);
}

int pcb_sums(Place place, const PcbArgs& args, int64_t* limbs) {
    Shape shape = shape_of(args.models.count, 1, 0, false);
    size_t sums = static_cast<size_t>(args.models.count + pcb_pairs(args.models.count));
    size_t parts = sizeof(TwoParts) * sums * static_cast<size_t>(shape.threads / 32);
    bool in_shared = shape.bytes + parts <= static_cast<size_t>(shared_limit()) / 3;
    int error = launch(pcb_sums_kernel, grid_of(args.models.numel, shape), shape.threads,
                       shape.bytes + (in_shared ? parts : 0), place.stream, args, limbs, shape.threads, in_shared);
    if (error != 0) return error;
    int64_t blocks = (static_cast<int64_t>(sums) + kMostThreads - 1) / kMostThreads;
    return launch(pcb_carry_kernel, blocks, kMostThreads, 0, place.stream, limbs, static_cast<int64_t>(sums));
}

int pcb_collected_halves(Place place, int32_t rows, const uint32_t* keys, int64_t capacity, const int64_t* collected,
                         const int64_t* prefix, int64_t* counts) {
    int64_t blocks = smaller((capacity + 8 * kThreads - 1) / (8 * kThreads), 4 * processors());
    return launch(pcb_collected_halves_kernel, rows * blocks, kThreads, 0, place.stream, keys, capacity, collected,
                  prefix, counts, blocks);
}

int pcb_pick(Place place, int32_t rows, const int64_t* counts, int64_t* prefix, int64_t* rank) {
    return launch(pcb_pick_kernel, rows, kThreads, sizeof(PickShared), place.stream, counts, prefix, rank);
}

int pcb_likely_window(Place place, int32_t rows, const int32_t* sample, int64_t size, const int64_t* places,
                      int64_t most, int32_t* memory, int32_t* window) {
    int64_t blocks = (size + kKeysOfBlock - 1) / kKeysOfBlock;
    int error = 0;
    for (int step = 0; step < kSteps && error == 0; ++step) {
        int64_t of_row = step == kEnds ? 1 : blocks;
        error = launch(pcb_likely_window_kernel, rows * of_row, kThreads, sizeof(WindowShared), place.stream, step,
                       sample, size, places, most, reinterpret_cast<WindowRow*>(memory), window, of_row);
    }
    return error;
}

int pcb_settle(Place place, int32_t rows, const int64_t* rank, const int32_t* window, const int64_t* collected,
               int64_t capacity, const int64_t* prefix, int64_t* found, int32_t* missing) {
    return launch(pcb_settle_kernel, 1, kMostThreads, 0, place.stream, rows, rank, window, collected, capacity, prefix,
                  found, missing);
}

}  // namespace cuda
FM_NAMESPACE_END
