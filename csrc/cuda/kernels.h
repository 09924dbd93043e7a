// What launches hand to kernels, by value: the models, and the rule that says what each of them keeps.
#pragma once

#include <stdint.h>

#include "fastmerge/evolve.h"
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

// What the select family goes through: T tensors of n models. One tensor is described here; several are by a table in
// the device's memory:
//
//   for each tie block    its tensor
//   for each tensor       n addresses of the models, 2 n numbers, the address of the base, the number of elements, the
//                         first of its tie blocks here, the first of them in results, and its place in results
//
// A result has a row for each tensor and model. The numbers are each model's two ranks, or one, and nothing.
struct Work {
    Models models;  // with a table: how many, their dtypes, and whether there is a base
    int64_t number[2 * kMostModels];
    const int64_t* table;
    int64_t tensors;
    int64_t blocks;          // tie blocks of all tensors together; one without elements has one
    int64_t blocks_results;  // of results
    int32_t kind;            // the dtype whose bits the keys are
    int32_t together;        // all tensors are parts of one vector, and share row 0
};

// A digit of a key: `width` bits from bit `shift` on.
struct Digit {
    int32_t shift, width;
};

// A merge, but for what it merges; the numbers are rounded already.
struct Formula {
    float weight[kMostModels], scale[kMostModels];
    int32_t election, divisor;
    float zero_sign;
    float divisor_value;  // 1 where nothing is divided
    float lambda;
    // Zeros stay what they are when they are divided: all divisors are positive and finite.
    int32_t zeros_stay;
};

// Where the merge of many tensors finds them, in the device's memory. Each is taken in parts.
struct Tensors {
    // For each tensor: length, base, out, tensor id, number of its first part, of its first tie block, then its models.
    const int64_t* table;      // nullptr: one tensor, by value
    const int32_t* tensor_of;  // each part's
};

constexpr int kTensorRow = 6;  // numbers of a tensor before its models

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

// A part of an expert that belongs to one tensor, as the table of a call has it in the device's memory; parts are in
// the order of their tensors. All numbers have 64 bits, so that the host's table is a row of them for each.
struct ExpertPart {
    void* data;           // the tensor
    const void* columns;  // [rows, kept], rising in each row
    const void* values;   // [rows, kept]
    const void* base;     // the base's values there; nullptr: the expert is added
    void* saved;          // the tensor's own bits there
    int64_t dtype, values_dtype, base_dtype;
    int64_t columns_wide;  // whether columns have 32 bits instead of 16
    int64_t scale;         // the bits of a float
    int64_t kept, entries, width;
    int64_t first, end;   // the parts of the same tensor
    int64_t tensor;       // the tensor's number
    int64_t first_block;  // of those that work for this part
};

// A trial, whose distinct tensors are `x`, the first, and others; one, by value, or many, by a table in the device's
// memory, which has for each tensor
//
//   elements, the result's address, its number, the element that always crosses over or -1, its first tile, and `count`
//   addresses
struct Trial {
    Array tensors[kMostParents];  // with a table: their dtypes
    int32_t count;
    int32_t kind;
    int32_t places[kMostParents - 1];  // of the reference; of a and of both sides of each difference
    int32_t differences;               // how many
    float factors[kMostDifferences];   // 1 - F and F; of each difference
    uint64_t limit;                    // words below it cross over
    uint64_t seed, tensor_id, offset;
    uint32_t stream;
    int64_t forced, numel;
    void* out;
    int32_t out_dtype;
    const int64_t* table;      // nullptr: one tensor
    const int32_t* tensor_of;  // each tile's
};

constexpr int kTrialRow = 5;  // numbers of a tensor before its addresses

constexpr int kExpertNumbers = 17;     // of a part in the table
constexpr int32_t kEntries = 1 << 11;  // of a part that a block takes
static_assert(sizeof(ExpertPart) == 8 * kExpertNumbers, "a row of the table");

// Matrices that are filtered, [n, H, W], and the bases that span what is taken from them; every address is a multiple
// of its elements' size.
struct Filtered {
    Array x;
    int64_t matrices, height, width;
    const float* basis[2];  // [H, rank] of the one class, or [H / 2, rank] of each of two
    int32_t rank[2];        // 0 where there is no second class
    int32_t classes;
};

// The symmetrised mask of lines of a spectrum in integers; `Limits` of fastmerge/backends/filters.py.
struct MaskLimits {
    int64_t size, across;  // lines of the whole spectrum, and places of each
    int64_t least, most, ring;
    int32_t wrapped;
    int32_t mirrored;  // whether a squared distance and the mirrored one can differ
};

}  // namespace cuda
FM_NAMESPACE_END
