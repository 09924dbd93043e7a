// What launches hand to kernels, by value: the models, and the rule that says what each of them keeps.
#pragma once

#include <stdint.h>

#include "fastmerge/philox.h"
#include "fastmerge/sparsify.h"

FM_NAMESPACE_BEGIN
namespace cuda {

constexpr int64_t kTieBlock = 65536;  // elements per tie count; must equal TIE_BLOCK in Python
constexpr int kMostModels = 128;      // of one launch

struct Array {
    const void* data;
    int32_t dtype;
};

// n models of `numel` elements. With a base the values are round_C(model - base), without it round_C(model).
struct Models {
    Array base;  // data == nullptr: no subtraction
    const void* data[kMostModels];
    int8_t dtype[kMostModels];
    int32_t count;
    int32_t compute;  // dtype that intermediate results are rounded to
    int64_t numel;
};

FM_INLINE Array model_of(const Models& models, int32_t i) {
    Array x = {models.data[i], models.dtype[i]};
    return x;
}

// What each model keeps. DELLA is decided beforehand, as masks.
struct Rule {
    int32_t method;
    const int64_t* bounds;       // [n, 2, 2]
    const int64_t* ties_before;  // [n, 2, blocks]
    int64_t blocks;
    uint64_t limit[kMostModels];   // random words below it are kept
    uint32_t stream[kMostModels];  // stream id
    uint64_t seed, tensor_id;
    uint64_t offset;       // flat index of the first element in its tensor
    const uint8_t* masks;  // [n, mask_stride] what was decided before, a bit for each element, low bit first
    int64_t mask_stride;   // bytes
};

// What PCB-Merging makes scores of; fastmerge/pcb.h has the variants.
struct PcbArgs {
    Models models;
    const float* clip;      // [n, 2], the bounds of magnitudes; the released variants'
    const float* extremes;  // [pairs, 2], the bounds of products; of kPcbPaper, as the means are
    const float* means;     // [n + pairs]
    int32_t variant;
};

// What becomes of the scores. Score keys are those of fastmerge/pcb.h.
enum PcbSweep : int32_t { kPcbScores = 0, kPcbWindow = 1, kPcbHistogram = 2, kPcbSample = 3, kPcbCollect = 4 };

struct PcbSweepArgs {
    int32_t sweep;
    const int32_t* missing;  // nothing is done where it is 0; nullptr: always
    void* out;               // [n, stride], of the sweep what is kept: scores, or keys as int32 that order as they do
    int64_t stride;
    const int64_t* low;  // [n] kPcbWindow: the first key. kPcbHistogram: the high half of the keys counted, or -1: all
    int64_t* counts;     // [n, 1 + width] past and in the window; [n, 65536]; kPcbCollect: [n, 4]
    int64_t width;
    int64_t* highest;       // [n], the highest key so far; nullptr: not wanted
    const int32_t* window;  // [n, 2] kPcbCollect: two keys, as int32 that order as they do
    int64_t runs, first;    // kPcbSample: so many runs of neighbours, of which the first goes there in `out`
};

}  // namespace cuda
FM_NAMESPACE_END
