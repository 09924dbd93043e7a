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
int use_device(int device);
int64_t shared_limit();  // bytes of shared memory that a block may have
int64_t processors();    // of the current device

// select. counts, bounds, ties: int64. Where counts are added to, they begin as 0.
// Counts digits: row by row, 2^width bins each. ranked: the leading digit of all keys, of models that have a rank to
// find or of the one vector; otherwise of keys that begin with their model's number.
int count_keys(Place place, const Work& work, Digit digit, bool ranked, int64_t* counts);
// The same of at most 11 bits, of keys that begin with the state's prefix for each of two ranks: [rows, 2, 2^width],
// or, of the leading digit, [rows, 2^width], in rows of 2^11 numbers. found: int32 [n, ranks, blocks, 2^width], or
// nothing; of both ranks, or of the second.
int count_digit(Place place, const Work& work, Digit digit, const int64_t* state, int64_t* counts, int32_t* found,
                int ranks);
// Chooses each rank's digit and clears its counts. bounds, magnitude: with the last digit, one of them.
int choose_digit(Place place, const Work& work, Digit digit, int64_t* state, int64_t* counts, int64_t* bounds,
                 float* magnitude);
// Of each tie block, how many keys equal each bound that cuts equals: [n, 2, blocks_results].
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

}  // namespace cuda
FM_NAMESPACE_END
