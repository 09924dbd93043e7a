#include "fastmerge/pcb.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <vector>

#include "cpu/api.h"
#include "cpu/pool.h"
#include "fastmerge/exact_sum.h"

namespace fastmerge {
namespace cpu {
namespace {

constexpr int64_t kOwnResults = int64_t{1} << 30;  // bytes that the threads' own results may take together
constexpr int64_t kPiece = 512;                    // elements whose scores are kept while they are counted

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

std::unique_ptr<void, Free> scratch_for(int32_t models) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, kernels().pcb_scratch(models)) != 0) throw std::bad_alloc();
    return std::unique_ptr<void, Free>(memory);
}

// Calls work(worker, begin, end, scratch) over ranges that cover the chunk, `worker` below `workers`; a worker's calls
// come one after the other.
using BlockWork = std::function<void(int64_t worker, int64_t begin, int64_t end, void* scratch)>;
void over_blocks(const Models& models, int64_t workers, const BlockWork& work) {
    int64_t blocks = (models.numel + kTieBlock - 1) / kTieBlock;
    std::atomic<int64_t> next{0};
    parallel(std::min(workers, blocks), [&](int64_t worker, int) {
        std::unique_ptr<void, Free> scratch = scratch_for(models.count);
        for (int64_t block = next.fetch_add(1); block < blocks; block = next.fetch_add(1)) {
            int64_t begin = block * kTieBlock;
            work(worker, begin, std::min(begin + kTieBlock, models.numel), scratch.get());
        }
    });
}

// One result for each worker, of which there are fewer than threads where results are large. The first is `out`.
template <class T>
class Results {
public:
    Results(T* out, size_t size) : out_(out), size_(size) {
        int64_t fit = kOwnResults / static_cast<int64_t>(size * sizeof(T));
        workers_ = std::max<int64_t>(1, std::min<int64_t>(threads(), fit));
        own_.assign(static_cast<size_t>(workers_ - 1), std::vector<T>(out, out + size));
    }

    int64_t workers() const { return workers_; }
    T* of(int64_t worker) { return worker == 0 ? out_ : own_[static_cast<size_t>(worker - 1)].data(); }

    // Calls merge(into, from, place) for every place of every worker's result but the first one's.
    template <class Merge>
    void gather(const Merge& merge) {
        for (const std::vector<T>& own : own_)
            for (size_t i = 0; i < size_; ++i) merge(out_[i], own[i], i);
    }

private:
    T* out_;
    size_t size_;
    int64_t workers_;
    std::vector<std::vector<T>> own_;
};

}  // namespace

void pcb_scores(const PcbArgs& args, float* out) {
    int64_t numel = args.models.numel;
    over_blocks(args.models, threads(), [&](int64_t, int64_t begin, int64_t end, void* scratch) {
        kernels().pcb_scores(&args, begin, end, scratch, out + begin, numel);
    });
}

void pcb_window(const PcbArgs& args, const int64_t* low, int64_t width, int64_t* counts, int64_t* highest) {
    size_t n = static_cast<size_t>(args.models.count);
    size_t workers = static_cast<size_t>(threads());
    std::vector<std::vector<int64_t>> above(workers, std::vector<int64_t>(n, 0));
    std::vector<std::vector<uint32_t>> most(workers, std::vector<uint32_t>(n, 0));
    over_blocks(args.models, threads(), [&](int64_t worker, int64_t begin, int64_t end, void* scratch) {
        size_t w = static_cast<size_t>(worker);
        PcbWindow window = {low, width, counts, above[w].data(), most[w].data()};
        kernels().pcb_window(&args, begin, end, scratch, &window);
    });
    for (size_t i = 0; i < n; ++i) {
        for (size_t w = 0; w < workers; ++w) {
            counts[static_cast<int64_t>(i) * (1 + width)] += above[w][i];
            highest[i] = std::max<int64_t>(highest[i], most[w][i]);
        }
    }
}

void pcb_histogram(const PcbArgs& args, const int64_t* prefix, int64_t* out) {
    size_t n = static_cast<size_t>(args.models.count);
    Results<int64_t> bins(out, n << 16);
    over_blocks(args.models, bins.workers(), [&](int64_t worker, int64_t begin, int64_t end, void* scratch) {
        std::vector<float> scores(n * kPiece);
        int64_t* mine = bins.of(worker);
        for (int64_t at = begin; at < end; at += kPiece) {
            int64_t stop = std::min(at + kPiece, end);
            kernels().pcb_scores(&args, at, stop, scratch, scores.data(), kPiece);
            for (size_t i = 0; i < n; ++i) {
                const float* row = scores.data() + i * kPiece;
                int64_t* counts = mine + (i << 16);
                for (int64_t t = 0; t < stop - at; ++t) {
                    uint32_t key = score_key(row[t]);
                    if (prefix[i] < 0) {
                        counts[key >> 16] += 1;
                    } else if (static_cast<int64_t>(key >> 16) == prefix[i]) {
                        counts[key & 65535u] += 1;
                    }
                }
            }
        }
    });
    bins.gather([](int64_t& into, int64_t from, size_t) { into += from; });
}

void pcb_extremes(const Models& models, float* out) {
    size_t pairs = static_cast<size_t>(pcb_pairs(models.count));
    std::vector<int32_t> ordered(2 * pairs);
    for (size_t pair = 0; pair < pairs; ++pair) {
        ordered[2 * pair] = ordered_bits(bit_cast<float>(kInfBits));
        ordered[2 * pair + 1] = ordered_bits(-bit_cast<float>(kInfBits));
    }
    Results<int32_t> extremes(ordered.data(), 2 * pairs);
    over_blocks(models, extremes.workers(), [&](int64_t worker, int64_t begin, int64_t end, void* scratch) {
        kernels().pcb_extremes(&models, begin, end, scratch, extremes.of(worker));
    });
    extremes.gather([](int32_t& into, int32_t from, size_t place) {
        into = place % 2 == 0 ? std::min(into, from) : std::max(into, from);
    });
    for (size_t i = 0; i < 2 * pairs; ++i) out[i] = from_ordered_bits(ordered[i]);
}

void pcb_sums(const PcbArgs& args, int64_t* out) {
    size_t rows = static_cast<size_t>(args.models.count + pcb_pairs(args.models.count));
    std::vector<uint64_t> limbs(rows * kLimbs, 0);
    Results<uint64_t> sums(limbs.data(), limbs.size());
    over_blocks(args.models, sums.workers(), [&](int64_t worker, int64_t begin, int64_t end, void* scratch) {
        kernels().pcb_sums(&args, begin, end, scratch, sums.of(worker));
    });
    sums.gather([](uint64_t& into, uint64_t from, size_t) { into += from; });
    for (size_t row = 0; row < rows; ++row) {
        ExactSum sum;
        std::copy_n(limbs.data() + row * kLimbs, kLimbs, sum.limb);
        exact_carry(sum);
        std::copy_n(sum.limb, kLimbs, out + row * kLimbs);
    }
}

void pcb_apply(const PcbApplyArgs& args) {
    over_blocks(args.scores.models, threads(), [&](int64_t, int64_t begin, int64_t end, void* scratch) {
        kernels().pcb_apply(&args, begin, end, scratch);
    });
}

void function(int32_t which, const float* x, int64_t count, float* out) {
    parallel((count + kTieBlock - 1) / kTieBlock, [&](int64_t block, int) {
        int64_t begin = block * kTieBlock;
        kernels().function(which, x + begin, std::min(kTieBlock, count - begin), out + begin);
    });
}

}  // namespace cpu
}  // namespace fastmerge
