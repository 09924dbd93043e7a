#include <algorithm>
#include <mutex>

#include "cpu/api.h"
#include "cpu/pool.h"
#include "fastmerge/exact_sum.h"

namespace fastmerge {
namespace cpu {
namespace {

// Calls work(begin, end) over ranges that cover the chunk and begin at multiples of a tie block.
template <class Work>
void over_blocks(const Models& models, const Work& work) {
    parallel((models.numel + kTieBlock - 1) / kTieBlock, [&](int64_t block, int) {
        int64_t begin = block * kTieBlock;
        work(begin, std::min(begin + kTieBlock, models.numel));
    });
}

}  // namespace

void nearswap(const Models& models, float t, void* out, int32_t dtype) {
    over_blocks(models, [&](int64_t begin, int64_t end) { kernels().nearswap(&models, t, begin, end, out, dtype); });
}

void ram_counts(const Models& models, float epsilon, int64_t* counts) {
    size_t size = 2 * static_cast<size_t>(models.count);
    std::fill_n(counts, size, 0);
    std::mutex mutex;
    over_blocks(models, [&](int64_t begin, int64_t end) {
        std::vector<int64_t> own(size, 0);
        kernels().ram_counts(&models, epsilon, begin, end, own.data());
        std::lock_guard<std::mutex> lock(mutex);
        for (size_t i = 0; i < size; ++i) counts[i] += own[i];
    });
}

void ram_apply(const Models& models, const float* factors, float epsilon, void* out, int32_t dtype) {
    over_blocks(models, [&](int64_t begin, int64_t end) {
        kernels().ram_apply(&models, factors, epsilon, begin, end, out, dtype);
    });
}

void model_variance(const Models& models, float* out) {
    over_blocks(models, [&](int64_t begin, int64_t end) { kernels().model_variance(&models, begin, end, out); });
}

void energy_sums(const Models& models, const uint8_t* mask, int64_t* limbs) {
    size_t size = static_cast<size_t>(models.count) * kLimbs;
    std::vector<uint64_t> total(size, 0);
    std::mutex mutex;
    over_blocks(models, [&](int64_t begin, int64_t end) {
        std::vector<uint64_t> own(size, 0);
        kernels().energy(&models, mask, begin, end, own.data());
        std::lock_guard<std::mutex> lock(mutex);
        for (size_t i = 0; i < size; ++i) total[i] += own[i];
    });
    for (int32_t m = 0; m < models.count; ++m) {
        ExactSum sum;
        std::copy_n(total.data() + m * kLimbs, kLimbs, sum.limb);
        exact_carry(sum);
        std::copy_n(sum.limb, kLimbs, limbs + m * kLimbs);
    }
}

void divergences(const Models& models, int64_t width, float* out) {
    int64_t rows = models.numel / width;
    int64_t together = std::max<int64_t>(1, kTieBlock / width);
    std::vector<std::vector<float>> scratch(static_cast<size_t>(threads()));
    parallel((rows + together - 1) / together, [&](int64_t item, int thread) {
        std::vector<float>& own = scratch[static_cast<size_t>(thread)];
        own.resize(3 * static_cast<size_t>(width));
        int64_t first = item * together;
        kernels().divergence(&models, width, first, std::min(first + together, rows), own.data(), out);
    });
}

void importance(const Models& models, const float* divergence, int64_t width, float* out) {
    over_blocks(models,
                [&](int64_t begin, int64_t end) { kernels().importance(&models, divergence, width, begin, end, out); });
}

}  // namespace cpu
}  // namespace fastmerge
