// Exact order statistics without sorting.
//
// A sample of the keys brackets the wanted rank; one sweep counts what lies above the bracket and collects the few per
// cent inside it; the answer is then found among those, and the block each came from gives the tie counts for nothing.
// The counts prove the bracket right. Where the sample misled, or equal values crowd the bracket, two histogram sweeps
// (high and low half of the key) find the same answer. The result is exact either way; only the time differs.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>

#include "cpu/api.h"
#include "cpu/arena.h"
#include "cpu/counted.h"
#include "cpu/many.h"
#include "cpu/pool.h"
#include "fastmerge/keys.h"

namespace fastmerge {
namespace cpu {
namespace {

constexpr int64_t kSample = 32768;    // keys that are looked at first, at most
constexpr int64_t kSampled = 32;      // and of smaller vectors 1/32,
constexpr int64_t kLeast = 1024;      // but not fewer than this;
constexpr int64_t kSmall = 8192;      // of vectors up to this size all keys are collected
constexpr int64_t kRun = 32;          // neighbours read together: a cache line or two
constexpr int64_t kCrowded = 10;      // a bracket holding more than 1/10 of the sample is not worth collecting
constexpr int64_t kCollectLimit = 8;  // and collecting stops at 1/8 of the vector
constexpr int64_t kHistogramFlush = int64_t{1} << 30;

struct Segment {
    Models models;
    int32_t model;
    int64_t start;  // in the vector
    int64_t first_block;
};

struct Vector {
    std::vector<Segment> segments;
    int64_t total = 0;
    int64_t blocks = 0;

    void append(const Models& models, int32_t model) {
        segments.push_back({models, model, total, blocks});
        total += models.numel;
        blocks += tie_blocks_of(models.numel);
    }

    static int64_t tie_blocks_of(int64_t numel) { return (numel + kTieBlock - 1) / kTieBlock; }

    struct Block {
        const Segment* segment;
        int64_t begin, count;
    };

    Block block(int64_t index) const {
        size_t low = 0, high = segments.size();
        while (high - low > 1) {
            size_t middle = (low + high) / 2;
            (segments[middle].first_block <= index ? low : high) = middle;
        }
        const Segment& segment = segments[low];
        int64_t begin = (index - segment.first_block) * kTieBlock;
        return {&segment, begin, std::min(kTieBlock, segment.models.numel - begin)};
    }
};

struct Found {
    const uint32_t* keys = nullptr;
    int64_t count = 0;  // keys collected, or keys inside the bracket where it is a single key
    int64_t above = 0;
};

// The rank-th largest key of a vector, 1 <= rank <= total.
struct Query {
    const Vector* vector = nullptr;
    int64_t rank = 0;
    Window window = {0, 0xffffffffu};
    std::vector<Found> blocks;
    std::atomic<int64_t> inside{0};
    std::atomic<bool> failed{false};
    // the answer
    uint32_t key = 0;
    int64_t greater = 0, equal = 0;
    bool tie_counts_known = false;
    std::vector<int64_t> ties;  // per block, where they are wanted

    bool counts_only() const { return window.low == window.high; }
};

uint64_t scatter(uint64_t x) {  // splitmix64, to keep the sample from lining up with the rows of a matrix
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

std::vector<uint32_t> sample_keys(const Vector& vector) {
    std::vector<uint32_t> sample;
    int64_t runs = std::min(kSample, std::max(kLeast, vector.total / kSampled)) / kRun;
    sample.reserve(static_cast<size_t>(runs * kRun));
    uint32_t keys[kRun];
    for (int64_t r = 0; r < runs; ++r) {
        int64_t stride = vector.total / runs;
        int64_t room = std::max<int64_t>(1, stride - kRun);
        int64_t at = r * stride + static_cast<int64_t>(scatter(static_cast<uint64_t>(r)) % static_cast<uint64_t>(room));
        size_t low = 0, high = vector.segments.size();
        while (high - low > 1) {
            size_t middle = (low + high) / 2;
            (vector.segments[middle].start <= at ? low : high) = middle;
        }
        const Segment& segment = vector.segments[low];
        int64_t begin = at - segment.start;
        int64_t count = std::min(kRun, segment.models.numel - begin);
        if (count <= 0) continue;
        kernels().keys(&segment.models, segment.model, begin, count, keys);
        sample.insert(sample.end(), keys, keys + count);
    }
    return sample;
}

void choose_window(Query& query) {
    const Vector& vector = *query.vector;
    if (vector.total <= kSmall) return;
    std::vector<uint32_t> sample = sample_keys(vector);
    int64_t size = static_cast<int64_t>(sample.size());
    if (size == 0) return;
    double fraction = static_cast<double>(query.rank) / static_cast<double>(vector.total);
    double place = fraction * static_cast<double>(size);
    // Five deviations of the sampled rank: neighbours are alike, so a run of them says less than as many strangers.
    double margin = 5.0 * std::sqrt(static_cast<double>(size) * fraction * (1.0 - fraction)) + 8.0;
    Counted counted({{sample.data(), size}}, 0, kNanBits);
    auto key_at = [&](int64_t index) { return counted.largest(index + 1).key; };
    int64_t upper = static_cast<int64_t>(std::floor(place - margin));
    int64_t lower = static_cast<int64_t>(std::ceil(place + margin));
    query.window.high = upper < 0 ? 0xffffffffu : key_at(upper);
    query.window.low = lower >= size ? 0u : key_at(lower);
    Window window = query.window;
    int64_t crowd = std::count_if(sample.begin(), sample.end(),
                                  [&](uint32_t key) { return key >= window.low && key <= window.high; });
    if (crowd * kCrowded > size && crowd > 2 * static_cast<int64_t>(margin) + 64) {
        uint32_t guess = key_at(std::min(size - 1, static_cast<int64_t>(place)));
        query.window = {guess, guess};  // equal values crowd the bracket: one of them is the likely answer
    }
}

void sweep(std::vector<std::unique_ptr<Query>>& queries, int64_t blocks, Arenas& arenas) {
    parallel(blocks, [&](int64_t index, int thread) {
        Arena& arena = arenas.of(thread);
        uint32_t throwaway[kTile + 16];
        for (auto& query : queries) {
            if (index >= query->vector->blocks || query->failed.load(std::memory_order_relaxed)) continue;
            Vector::Block block = query->vector->block(index);
            Found& found = query->blocks[static_cast<size_t>(index)];
            const Models* models = &block.segment->models;
            int32_t model = block.segment->model;
            if (query->counts_only()) {
                for (int64_t done = 0; done < block.count; done += kTile) {
                    found.count += kernels().collect(models, model, block.begin + done,
                                                     std::min<int64_t>(kTile, block.count - done), query->window,
                                                     throwaway, &found.above);
                }
                continue;
            }
            uint32_t* room = arena.reserve(block.count + 64);
            found.count = kernels().collect(models, model, block.begin, block.count, query->window, room, &found.above);
            found.keys = room;
            arena.keep(found.count);
            int64_t inside = query->inside.fetch_add(found.count) + found.count;
            if (query->vector->total > kSmall && inside > query->vector->total / kCollectLimit + kTieBlock)
                query->failed.store(true);
        }
    });
}

// Finds the answer among the collected keys; false where the bracket missed it.
bool settle(Query& query, bool want_ties) {
    int64_t above = 0, inside = 0;
    for (const Found& found : query.blocks) {
        above += found.above;
        inside += found.count;
    }
    if (!(above < query.rank && query.rank <= above + inside)) return false;
    query.tie_counts_known = want_ties;
    if (want_ties) query.ties.assign(query.blocks.size(), 0);
    if (query.counts_only()) {
        query.key = query.window.low;
        query.greater = above;
        query.equal = inside;
        for (size_t b = 0; want_ties && b < query.blocks.size(); ++b) query.ties[b] = query.blocks[b].count;
        return true;
    }
    std::vector<Counted::Span> spans;
    for (const Found& found : query.blocks) spans.push_back({found.keys, found.count});
    Counted counted(std::move(spans), query.window.low, std::min(query.window.high, kNanBits));
    Counted::Place place = counted.largest(query.rank - above);
    query.key = place.key;
    query.greater = above + place.greater;
    query.equal = place.equal;
    if (want_ties && query.rank - query.greater < query.equal) {
        for (size_t b = 0; b < query.blocks.size(); ++b)
            query.ties[b] = kernels().count_key(query.blocks[b].keys, query.blocks[b].count, query.key);
    }
    return true;
}

// Adds up histograms of a vector's blocks. `count` writes one block into a set of 32-bit bins.
template <class CountBlock>
void histogram(int64_t blocks, size_t raw_bins, int64_t* out, size_t bins, const CountBlock& count) {
    int workers = threads();
    std::vector<std::vector<uint32_t>> raw(static_cast<size_t>(workers));
    std::vector<int64_t> pending(static_cast<size_t>(workers), 0);
    std::mutex mutex;
    std::fill(out, out + bins, 0);
    auto flush = [&](int thread) {
        std::vector<uint32_t>& mine = raw[static_cast<size_t>(thread)];
        std::lock_guard<std::mutex> lock(mutex);
        for (size_t i = 0; i < mine.size(); ++i) out[i % bins] += mine[i];
        std::fill(mine.begin(), mine.end(), 0u);
        pending[static_cast<size_t>(thread)] = 0;
    };
    parallel(blocks, [&](int64_t block, int thread) {
        std::vector<uint32_t>& mine = raw[static_cast<size_t>(thread)];
        if (mine.empty()) mine.assign(raw_bins, 0u);
        count(block, mine.data());
        if ((pending[static_cast<size_t>(thread)] += kTieBlock) >= kHistogramFlush) flush(thread);
    });
    for (int thread = 0; thread < workers; ++thread) flush(thread);
}

void count_high(const Vector& vector, std::vector<int64_t>& out) {
    out.assign(65536, 0);
    histogram(vector.blocks, 131072, out.data(), 65536, [&](int64_t index, uint32_t* bins) {
        Vector::Block block = vector.block(index);
        kernels().key_histogram(&block.segment->models, block.segment->model, block.begin, block.count, -1, bins);
    });
}

void count_low(const Vector& vector, int64_t prefix, std::vector<int64_t>& out) {
    out.assign(32768, 0);
    histogram(vector.blocks, 32768, out.data(), 32768, [&](int64_t index, uint32_t* bins) {
        Vector::Block block = vector.block(index);
        kernels().key_histogram(&block.segment->models, block.segment->model, block.begin, block.count, prefix, bins);
    });
}

void settle_by_histogram(Query& query) {
    std::vector<int64_t> bins;
    count_high(*query.vector, bins);
    int64_t greater = 0;
    int64_t high = 65535;
    while (greater + bins[static_cast<size_t>(high)] < query.rank) greater += bins[static_cast<size_t>(high--)];
    count_low(*query.vector, high, bins);
    int64_t low = 32767;
    while (greater + bins[static_cast<size_t>(low)] < query.rank) greater += bins[static_cast<size_t>(low--)];
    query.key = static_cast<uint32_t>((high << 15) | low);
    query.greater = greater;
    query.equal = bins[static_cast<size_t>(low)];
    query.tie_counts_known = false;
}

void answer(std::vector<std::unique_ptr<Query>>& queries, bool want_ties) {
    if (queries.empty()) return;
    Arenas arenas;
    int64_t blocks = 0;
    for (auto& query : queries) {
        query->blocks.resize(static_cast<size_t>(query->vector->blocks));
        blocks = std::max(blocks, query->vector->blocks);
    }
    int64_t count = static_cast<int64_t>(queries.size());
    parallel(count, [&](int64_t q, int) { choose_window(*queries[static_cast<size_t>(q)]); });
    sweep(queries, blocks, arenas);
    parallel(count, [&](int64_t q, int) {
        Query& query = *queries[static_cast<size_t>(q)];
        if (query.failed.load() || !settle(query, want_ties)) query.failed.store(true);
    });
    for (auto& query : queries)
        if (query->failed.load()) settle_by_histogram(*query);
}

Models one_model(const Shard& shard) {
    Models models;
    models.base = {nullptr, kFloat32};
    models.models = &shard.array;
    models.count = 1;
    models.compute = kFloat32;
    models.numel = shard.numel;
    return models;
}

}  // namespace

int64_t tie_blocks(int64_t numel) { return std::max<int64_t>(1, Vector::tie_blocks_of(numel)); }

void abs_histogram(const std::vector<Shard>& shards, int bins, int64_t* out) {
    int log2_bins = 0;
    while ((1 << log2_bins) < bins) ++log2_bins;
    struct Piece {
        Array array;
        int64_t begin, count;
    };
    std::vector<Piece> pieces;
    for (const Shard& shard : shards)
        for (int64_t begin = 0; begin < shard.numel; begin += kTieBlock)
            pieces.push_back({shard.array, begin, std::min(kTieBlock, shard.numel - begin)});
    std::vector<int64_t> wide(32768);
    histogram(static_cast<int64_t>(pieces.size()), 65536, wide.data(), 32768, [&](int64_t index, uint32_t* raw) {
        const Piece& piece = pieces[static_cast<size_t>(index)];
        int shift = (piece.array.dtype == kFloat32 ? 31 : 15) - log2_bins;
        kernels().raw_histogram(piece.array, piece.begin, piece.count, shift, raw);
    });
    std::copy(wide.begin(), wide.begin() + bins, out);
}

uint32_t kth_key(const std::vector<Shard>& shards, int64_t k) {
    Vector vector;
    for (const Shard& shard : shards)
        if (shard.numel > 0) vector.append(one_model(shard), 0);
    std::vector<std::unique_ptr<Query>> queries;
    queries.emplace_back(new Query);
    queries.back()->vector = &vector;
    queries.back()->rank = k;
    answer(queries, false);
    return queries.back()->key;
}

void magnitude_bounds(const Models& models, const int64_t* first, const int64_t* last, int64_t* bounds,
                      int64_t* ties_before) {
    int64_t blocks = tie_blocks(models.numel);
    std::vector<Vector> vectors(static_cast<size_t>(models.count));
    std::vector<std::unique_ptr<Query>> queries;
    std::vector<int> slots;
    std::memset(ties_before, 0, sizeof(int64_t) * static_cast<size_t>(2 * models.count * blocks));
    for (int32_t m = 0; m < models.count; ++m) {
        vectors[static_cast<size_t>(m)].append(models, m);
        for (int b = 0; b < 2; ++b) {
            int64_t rank = b == 0 ? first[m] : last[m];
            int64_t* bound = bounds + 4 * m + 2 * b;
            bound[0] = rank <= 0 ? static_cast<int64_t>(kKeyEnd) : 0;
            bound[1] = 0;
            if (rank <= 0 || rank >= models.numel) continue;
            queries.emplace_back(new Query);
            queries.back()->vector = &vectors[static_cast<size_t>(m)];
            queries.back()->rank = rank;
            slots.push_back(2 * m + b);
        }
    }
    answer(queries, true);
    std::vector<int64_t> missing(static_cast<size_t>(4 * models.count), 0);
    bool recount = false;
    for (size_t q = 0; q < queries.size(); ++q) {
        Query& query = *queries[q];
        int64_t ties = query.rank - query.greater;
        int64_t* bound = bounds + 2 * slots[q];
        bound[0] = query.key;
        bound[1] = ties == query.equal ? 0 : ties;
        if (bound[1] == 0) continue;
        if (!query.tie_counts_known) {
            recount = true;
            missing[static_cast<size_t>(2 * slots[q])] = bound[0];
            missing[static_cast<size_t>(2 * slots[q] + 1)] = bound[1];
            continue;
        }
        std::copy(query.ties.begin(), query.ties.end(), ties_before + slots[q] * blocks);
    }
    if (recount) {
        std::vector<int64_t> counts(static_cast<size_t>(2 * models.count * blocks), 0);
        tie_counts(models, missing.data(), counts.data());
        for (size_t i = 0; i < counts.size(); ++i) ties_before[i] += counts[i];
    }
    for (int64_t row = 0; row < 2 * models.count; ++row) {
        int64_t before = 0;
        for (int64_t b = 0; b < blocks; ++b) {
            int64_t here = ties_before[row * blocks + b];
            ties_before[row * blocks + b] = before;
            before += here;
        }
    }
}

void magnitude_bounds_many(const Many& many, const int64_t* ranks, int64_t* bounds, int64_t* ties_before) {
    std::vector<int64_t> begins = first_blocks(many);
    over_tensors(many, [&](int64_t t) {
        Each each(many, t);
        int64_t begin = begins[static_cast<size_t>(t)], blocks = begins[static_cast<size_t>(t) + 1] - begin;
        std::vector<int64_t> first, last, ties(static_cast<size_t>(2 * many.models * blocks));
        for (int32_t m = 0; m < many.models; ++m) {
            first.push_back(ranks[2 * (t * many.models + m)]);
            last.push_back(ranks[2 * (t * many.models + m) + 1]);
        }
        magnitude_bounds(each.models, first.data(), last.data(), bounds + t * 4 * many.models, ties.data());
        for (int32_t row = 0; row < 2 * many.models; ++row) {
            const int64_t* mine = ties.data() + row * blocks;
            std::copy(mine, mine + blocks, ties_before + row * begins.back() + begin);
        }
    });
}

void key_histogram(const Models& models, const int64_t* prefix, int64_t* out) {
    for (int32_t m = 0; m < models.count; ++m) {
        Vector vector;
        vector.append(models, m);
        std::vector<int64_t> bins;
        if (prefix[m] < 0) {
            count_high(vector, bins);
        } else {
            count_low(vector, prefix[m], bins);
        }
        std::copy(bins.begin(), bins.end(), out + static_cast<int64_t>(bins.size()) * m);
    }
}

// Adds 1 to the counter of each key. Deltas of half-precision models have few values, and a window can lie upon one of
// them: what comes again and again is added up on the side, so that threads seldom meet at a counter.
static void count_together(const uint32_t* keys, int64_t count, uint32_t low, int64_t* counters) {
    constexpr uint32_t kSides = 64;
    uint32_t key[kSides];
    int64_t seen[kSides] = {};
    auto add = [&](uint32_t side) { __atomic_fetch_add(counters + (key[side] - low), seen[side], __ATOMIC_RELAXED); };
    for (int64_t i = 0; i < count; ++i) {
        uint32_t side = (keys[i] * 0x9E3779B9u) >> 26;
        if (seen[side] != 0 && key[side] != keys[i]) {
            add(side);
            seen[side] = 0;
        }
        key[side] = keys[i];
        ++seen[side];
    }
    for (uint32_t side = 0; side < kSides; ++side)
        if (seen[side] != 0) add(side);
}

void key_window(const Models& models, const int64_t* low, int64_t width, int64_t* counts) {
    std::vector<std::vector<uint32_t>> inside(static_cast<size_t>(threads()));
    parallel(Vector::tie_blocks_of(models.numel), [&](int64_t block, int thread) {
        std::vector<uint32_t>& keys = inside[static_cast<size_t>(thread)];
        keys.resize(static_cast<size_t>(kTieBlock) + 64);
        int64_t begin = block * kTieBlock;
        int64_t count = std::min(kTieBlock, models.numel - begin);
        for (int32_t m = 0; m < models.count; ++m) {
            int64_t high = std::min<int64_t>(low[m] + width - 1, 0xffffffff);
            Window window = {static_cast<uint32_t>(low[m]), static_cast<uint32_t>(high)};
            int64_t above = 0;
            int64_t found = kernels().collect(&models, m, begin, count, window, keys.data(), &above);
            // Few keys fall into the window, so that the threads seldom meet at a counter.
            int64_t* row = counts + m * (width + 1);
            __atomic_fetch_add(row, above, __ATOMIC_RELAXED);
            count_together(keys.data(), found, window.low, row + 1);
        }
    });
}

void tie_counts(const Models& models, const int64_t* bounds, int64_t* out) {
    int64_t blocks = tie_blocks(models.numel);
    parallel(Vector::tie_blocks_of(models.numel), [&](int64_t block, int) {
        int64_t begin = block * kTieBlock;
        int64_t count = std::min(kTieBlock, models.numel - begin);
        for (int32_t m = 0; m < models.count; ++m) {
            const int64_t* bound = bounds + 4 * m;
            if (bound[1] == 0 && bound[3] == 0) continue;
            uint32_t thresholds[2] = {static_cast<uint32_t>(bound[0]), static_cast<uint32_t>(bound[2])};
            int64_t found[2] = {0, 0};
            kernels().count_ties(&models, m, begin, count, thresholds, found);
            for (int b = 0; b < 2; ++b)
                if (bound[2 * b + 1] > 0) out[(2 * m + b) * blocks + block] = found[b];
        }
    });
}

void topk_mask(const Models& models, const Rule& rule, uint8_t* out) {
    parallel(Vector::tie_blocks_of(models.numel), [&](int64_t block, int) {
        int64_t begin = block * kTieBlock;
        kernels().mask(&models, &rule, begin, std::min(kTieBlock, models.numel - begin), out);
    });
}

void count_nonfinite(Array x, int64_t numel, int64_t* nan_and_inf) {
    constexpr int64_t kPiece = int64_t{1} << 22;
    std::atomic<int64_t> nan{0}, inf{0};
    parallel((numel + kPiece - 1) / kPiece, [&](int64_t piece, int) {
        int64_t found[2] = {0, 0};
        kernels().nonfinite(x, piece * kPiece, std::min(kPiece, numel - piece * kPiece), found);
        nan += found[0];
        inf += found[1];
    });
    nan_and_inf[0] = nan;
    nan_and_inf[1] = inf;
}

void zero_nonfinite(void* data, int32_t dtype, int64_t numel) {
    char* bytes = static_cast<char*>(data);
    for (int64_t i = 0; i < numel; ++i) {
        if (dtype == kFloat32) {
            uint32_t bits;
            std::memcpy(&bits, bytes + 4 * i, 4);
            if ((bits & 0x7fffffffu) >= kInfBits) std::memset(bytes + 4 * i, 0, 4);
        } else {
            uint16_t bits;
            std::memcpy(&bits, bytes + 2 * i, 2);
            uint16_t limit = dtype == kBFloat16 ? 0x7f80u : 0x7c00u;
            if ((bits & 0x7fffu) >= limit) std::memset(bytes + 2 * i, 0, 2);
        }
    }
}

void random_words(Stream stream, uint64_t first, int64_t count, uint32_t* out) {
    constexpr int64_t kPiece = int64_t{1} << 20;
    parallel((count + kPiece - 1) / kPiece, [&](int64_t piece, int) {
        int64_t begin = piece * kPiece;
        kernels().words(stream, first + static_cast<uint64_t>(begin), std::min(kPiece, count - begin), out + begin);
    });
}

void discarded_words(Stream stream, uint64_t first, int64_t count) {
    constexpr int64_t kPiece = 8192;
    parallel((count + kTieBlock - 1) / kTieBlock, [&](int64_t block, int) {
        uint32_t buffer[kPiece];
        int64_t end = std::min(kTieBlock * (block + 1), count);
        for (int64_t at = kTieBlock * block; at < end; at += kPiece) {
            kernels().words(stream, first + static_cast<uint64_t>(at), std::min(kPiece, end - at), buffer);
        }
    });
}

}  // namespace cpu
}  // namespace fastmerge
