// What the CUDA backend offers to the bindings: whole operations on raw pointers of a GPU's memory, enqueued on a
// stream. Nothing waits for the GPU and nothing allocates. Each returns 0, or CUDA's number of what went wrong.
#pragma once

#include <string>

#include "cuda/kernels.h"

FM_NAMESPACE_BEGIN
namespace cuda {

struct Place {
    void* stream;
};

FM_INLINE int64_t tie_blocks(int64_t numel) { return (numel + kTieBlock - 1) / kTieBlock; }

// the device
const char* error_text(int error);
std::string check_usable();  // why kernels cannot run here, or nothing
// Makes a device that of this thread, and says what it had before; and gives it that back.
int enter_device(int device, void** before);
void leave_device(void* before);
int64_t shared_limit();  // bytes of shared memory that a block may have
int64_t launches();      // how many kernels were launched so far
// A few numbers of the host, into the device's memory: by value, so that graphs can capture it and nothing is copied.
constexpr int32_t kMostNumbers = 480;
int write_numbers(Place place, const int64_t* values, int32_t count, int64_t* out);
int64_t processors();  // of the current device

// select. counts, bounds, ties: int64. Where counts are added to, they begin as 0.
// Counts digits: row by row, 2^width bins each. ranked: the leading digit of all keys, of models that have a rank to
// find or of the one vector; otherwise of keys that begin with their model's number.
int count_keys(Place place, const Work& work, Digit digit, bool ranked, int64_t* counts);
// The same of at most 11 bits, of keys that begin with the state's prefix for each of two ranks: [rows, 2, 2^width],
// or, of the leading digit, [rows, 2^width], in rows of 2^11 numbers; keys are wide, and values are not rounded. found:
// int32 [n, ranks, blocks, 2^width], or nothing; added to, of both ranks, or of the second.
int count_digit(Place place, const Work& work, Digit digit, const int64_t* state, int64_t* counts, int32_t* found,
                int ranks);
// Chooses each rank's digit and clears its counts. bounds, magnitude: with the last digit, one of them.
int choose_digit(Place place, const Work& work, Digit digit, int64_t* state, int64_t* counts, int64_t* bounds,
                 float* magnitude);
// Of each tie block, how many keys equal each bound that cuts equals: [n, 2, blocks_results], added to.
int count_ties(Place place, const Work& work, const int64_t* bounds, int64_t* counts);
// What comes before each block, from those counts in place, or from `found`.
int sum_ties(Place place, const Work& work, const int64_t* bounds, const int32_t* found, int ranks, int64_t* ties);
// Bounds, and ties before each block, of small tensors: a thread block for each model.
int bounds_of_small(Place place, const Work& work, int64_t* bounds, int64_t* ties_before);
int count_window(Place place, const Work& work, int64_t width, int64_t* counts);  // [n, 1 + width], added to
// out: a byte for each element, aligned to 8.
int mask_band(Place place, Array x, int64_t numel, const int64_t* bounds, const int64_t* ties_before, uint8_t* out);

// sparsify
int count_nonfinite(Place place, Array x, int64_t numel, int64_t* nan_and_inf);  // adds to two numbers
int zero_nonfinite(Place place, void* data, int32_t dtype, int64_t numel);

// What a rule (not DELLA's) keeps of each model, as bits, in rows of ceil(numel / 8) bytes.
int kept_masks(Place place, const Models& models, const Rule& rule, uint8_t* masks);
int l1_sums(Place place, const Models& models, const Rule& rule, int64_t* limbs);  // int64[n, 2, kLimbs], of zeros
// DELLA's step for some rows of one model, which have more than one element.
struct Rows {
    Array base, x;  // from the rows' first element on; base.data == nullptr: no subtraction
    int32_t compute;
    int64_t count, length;
    double density, epsilon;
    uint64_t seed, tensor_id, offset;  // offset: of the rows' first element in its tensor
    uint32_t stream;
};
bool ranks_rows(int64_t length);  // whether a block has room for rows of this length
// Those rows' mask: ceil(count * length / 8) bytes. most_open: bins of a row that are refined at a time, at least 1.
int rank_rows(Place place, const Rows& rows, int32_t most_open, uint8_t* mask);
// Others': by their keys, and by these sorted.
int row_keys(Place place, const Rows& rows, int32_t* keys);  // [count, length]
int row_masks(Place place, const Rows& rows, const int32_t* sorted, uint8_t* mask);

// consensus
// Elements in a part, of which a block takes one, where there are so many in all: a divisor of a tie block.
int64_t part_of(int64_t numel);
// base: nullptr where there is none; it is subtracted from the models if these have it, and added if `add`.
int consensus_apply(Place place, const Models& models, const Rule& rule, const Formula& formula, Array add, void* out,
                    int32_t out_dtype);
// Many tensors, whose dtypes are those of `models`, `add` and out; `parts` parts of `part` elements, or less at an end.
int consensus_apply_many(Place place, const Models& models, const Rule& rule, const Formula& formula, Array add,
                         int32_t out_dtype, const Tensors& tensors, int64_t parts, int64_t part);
// pcb
int pcb_sweep(Place place, const PcbArgs& args, const PcbSweepArgs& sweep);
int pcb_apply(Place place, const PcbArgs& args, const float* thresholds, const float* weights, void* out,
              int32_t out_dtype, float* scale);  // weights: n numbers of the host. scale: [n, numel] or nullptr
int pcb_extremes(Place place, const Models& models, int32_t* ordered);  // [pairs, 2] ordered bits, widened
int pcb_sums(Place place, const PcbArgs& args, int64_t* limbs);         // adds to [n + pairs, 12]
int pcb_collected_halves(Place place, int32_t rows, const uint32_t* keys, int64_t capacity, const int64_t* collected,
                         const int64_t* prefix, int64_t* counts);  // as kPcbHistogram, of collected keys
int pcb_pick(Place place, int32_t rows, const int64_t* counts, int64_t* prefix, int64_t* rank);
// memory: kWindowNumbers zeros for each row.
constexpr int64_t kWindowNumbers = 7 * 2048 + 32;
int pcb_likely_window(Place place, int32_t rows, const int32_t* sample, int64_t size, const int64_t* places,
                      int64_t most, int32_t* memory, int32_t* window);
int pcb_settle(Place place, int32_t rows, const int64_t* rank, const int32_t* window, const int64_t* collected,
               int64_t capacity, const int64_t* prefix, int64_t* found, int32_t* missing);

// expert. parts: a table in the device's memory; none is empty, and of kEntries entries each has as many blocks as that
// makes.
int expert_apply(Place place, const ExpertPart* parts, int32_t count, int64_t blocks);
// changed: tensors + 1 zeros, to which are added how many places of each tensor, and of all, do not hold what was put.
int expert_revert(Place place, const ExpertPart* parts, int32_t count, int64_t blocks, int64_t* changed,
                  int32_t tensors);

// evolve. tiles: of all tensors of a table.
constexpr int64_t kTrialTile = 2048;
int trial(Place place, const Trial& trial, int64_t tiles);

// geometry. Every address is a multiple of its elements' size. out: [pairs, rows, blocks of a row]
int gram(Place place, const Models& models, int64_t row_length, double* out);

// importance. Every model is a delta from the base; nearswap and importance take one.
int nearswap(Place place, const Models& models, float t, void* out, int32_t out_dtype);
int ram_apply(Place place, const Models& models, const float* factors, float epsilon, void* out, int32_t out_dtype);
int ram_counts(Place place, const Models& models, float epsilon, int64_t* counts);  // [n, 2], added to
int model_variance(Place place, const Models& models, float* out);
int energy_sums(Place place, const Models& models, const Rule& rule, int64_t* limbs);  // as l1_sums, of squares
int importance(Place place, const Models& models, const float* divergence, int64_t width, float* out);
// How many numbers of the device's memory each row takes; none where a block's shared memory has room.
int64_t row_memory(int64_t width);
// Of `count` rows from row `first` on; addresses are multiples of their elements' size. memory: for these rows, or
// nullptr. out: of the row 0.
int divergences(Place place, Array base, Array x, int64_t width, int64_t first, int64_t count, float* memory,
                float* out);

// highpass, where multiplications and additions are fused. Matrices have fewer than 2^31 - 128 columns.
int64_t highpass_splits(const Filtered& x, int64_t most);  // into how many sums the rows are taken, 1 to `most`
// out: [splits, n, r, W], to be added up in order
int highpass_project(Place place, const Filtered& x, int64_t splits, float* out);
int highpass_subtract(Place place, const Filtered& x, const float* coefficients, void* out);  // out: of x's dtype
// Multiplies [matrices, count, across] complex numbers, of lines from `first` on.
int highpass_mask(Place place, float* lines, const MaskLimits& limits, int64_t matrices, int64_t first, int64_t count,
                  float scale);

}  // namespace cuda
FM_NAMESPACE_END
