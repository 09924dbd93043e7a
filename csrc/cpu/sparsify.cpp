#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#include "cpu/rows.h"
#include "fastmerge/exact_sum.h"

namespace fastmerge {
namespace cpu {
namespace {

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

// A row too long for a kernel's scratch is ranked against a sorted copy of its keys, one row at a time.
void over_long_rows(const Models& models, Rule rule, const RangeWork& work,
                    std::vector<std::unique_ptr<void, Free>>& scratch) {
    size_t length = static_cast<size_t>(rule.row_length);
    std::vector<std::vector<uint32_t>> sorted(static_cast<size_t>(models.count));
    std::vector<const uint32_t*> pointers(static_cast<size_t>(models.count), nullptr);
    for (int64_t row = 0; row < models.numel / rule.row_length; ++row) {
        int64_t start = row * rule.row_length;
        parallel(models.count, [&](int64_t m, int) {
            if (rule.density[m] >= 1.0 || !(rule.density[m] > 0.0)) return;
            std::vector<uint32_t>& keys = sorted[static_cast<size_t>(m)];
            keys.resize(length);
            kernels().keys(&models, static_cast<int32_t>(m), start, rule.row_length, keys.data());
            std::sort(keys.begin(), keys.end());
            pointers[static_cast<size_t>(m)] = keys.data();
        });
        rule.sorted_row = pointers.data();
        int64_t blocks = (rule.row_length + kTieBlock - 1) / kTieBlock;
        parallel(blocks, [&](int64_t block, int thread) {
            // Cut at multiples of 8: no two threads write into one byte of a mask.
            auto cut = [&](int64_t b) { return b == 0 ? start : (start + b * kTieBlock) / 8 * 8; };
            int64_t begin = cut(block);
            int64_t end = block + 1 == blocks ? start + rule.row_length : cut(block + 1);
            work(rule, begin, end, scratch[static_cast<size_t>(thread)].get(), thread);
        });
    }
}

}  // namespace

void over_ranges(const Models& models, const Rule& rule, const RangeWork& work) {
    if (models.numel == 0) return;
    bool rows = rule.method == kDella;
    size_t bytes = kernels().scratch_bytes(models.count, rule.method, rows ? rule.row_length : 1);
    std::vector<std::unique_ptr<void, Free>> scratch;
    for (int thread = 0; thread < threads(); ++thread) {
        void* memory = nullptr;
        if (posix_memalign(&memory, 64, bytes) != 0) throw std::bad_alloc();
        scratch.emplace_back(memory);
    }
    if (rows && rule.row_length > kLongRow) {
        over_long_rows(models, rule, work, scratch);
        return;
    }
    // Eight rows end where a byte of a mask ends.
    int64_t together = rows && rule.row_length % 8 != 0 ? 8 : 1;
    int64_t some = rows ? (kTieBlock / rule.row_length + together - 1) / together * together : 0;
    int64_t step = rows ? std::max(some, together) * rule.row_length : kTieBlock;
    parallel((models.numel + step - 1) / step, [&](int64_t item, int thread) {
        int64_t begin = item * step;
        work(rule, begin, std::min(begin + step, models.numel), scratch[static_cast<size_t>(thread)].get(), thread);
    });
}

void l1_sums(const Models& models, Rule rule, int64_t* out) {
    size_t count = static_cast<size_t>(models.count);
    std::vector<ExactSum> all(count), kept(count);
    for (size_t m = 0; m < count; ++m) {
        exact_clear(all[m]);
        exact_clear(kept[m]);
    }
    std::mutex mutex;
    over_ranges(models, rule, [&](const Rule& part, int64_t begin, int64_t end, void* scratch, int) {
        std::vector<MassSums> sums(count);
        kernels().mass(&models, &part, begin, end, scratch, sums.data());
        std::lock_guard<std::mutex> lock(mutex);
        for (size_t m = 0; m < count; ++m) {
            ExactSum part_all, part_kept;
            std::memcpy(part_all.limb, sums[m].all, sizeof(part_all.limb));
            std::memcpy(part_kept.limb, sums[m].kept, sizeof(part_kept.limb));
            exact_merge(all[m], part_all);
            exact_merge(kept[m], part_kept);
        }
    });
    for (size_t m = 0; m < count; ++m) {
        for (int i = 0; i < kLimbs; ++i) {
            out[(2 * m) * kLimbs + static_cast<size_t>(i)] = static_cast<int64_t>(all[m].limb[i]);
            out[(2 * m + 1) * kLimbs + static_cast<size_t>(i)] = static_cast<int64_t>(kept[m].limb[i]);
        }
    }
}

void kept_masks(const Models& models, Rule rule, uint8_t* masks) {
    over_ranges(models, rule, [&](const Rule& part, int64_t begin, int64_t end, void* scratch, int) {
        kernels().decide(&models, &part, begin, end, scratch, masks);
    });
}

}  // namespace cpu
}  // namespace fastmerge
