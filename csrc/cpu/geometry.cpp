#include "fastmerge/geometry.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cpu/api.h"
#include "cpu/pool.h"

namespace fastmerge {
namespace cpu {
namespace {

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

}  // namespace

void gram(const Models& models, int64_t row_length, double* out) {
    int64_t in_row = gram_blocks(row_length);
    int64_t blocks = models.numel / row_length * in_row;
    std::vector<std::unique_ptr<void, Free>> scratch;
    for (int thread = 0; thread < threads(); ++thread) {
        void* memory = nullptr;
        if (posix_memalign(&memory, 64, kernels().gram_scratch(models.count)) != 0) throw std::bad_alloc();
        scratch.emplace_back(memory);
    }
    // Rows may be short: enough blocks at a time that handing them out costs nothing beside.
    int64_t together = std::max<int64_t>(1, kTieBlock / std::min<int64_t>(row_length, kGramBlock));
    parallel((blocks + together - 1) / together, [&](int64_t item, int thread) {
        int64_t stop = std::min((item + 1) * together, blocks);
        for (int64_t block = item * together; block < stop; ++block) {
            int64_t row = block / in_row;
            int64_t begin = row * row_length + (block - row * in_row) * kGramBlock;
            int64_t end = std::min(begin + kGramBlock, (row + 1) * row_length);
            kernels().gram(&models, begin, end, scratch[static_cast<size_t>(thread)].get(), out + block, blocks);
        }
    });
}

}  // namespace cpu
}  // namespace fastmerge
