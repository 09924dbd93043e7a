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

// sparsify
int count_nonfinite(Place place, Array x, int64_t numel, int64_t* nan_and_inf);  // adds to two numbers
int zero_nonfinite(Place place, void* data, int32_t dtype, int64_t numel);

// pcb
int pcb_sweep(Place place, const PcbArgs& args, const PcbSweepArgs& sweep);
int pcb_apply(Place place, const PcbArgs& args, const float* thresholds, const float* weights, void* out,
              int32_t out_dtype, float* scale);  // weights: n numbers of the host. scale: [n, numel] or nullptr
int pcb_extremes(Place place, const Models& models, int32_t* ordered);  // [pairs, 2] ordered bits, widened
int pcb_sums(Place place, const PcbArgs& args, int64_t* limbs);         // adds to [n + pairs, 12]
int pcb_collected_halves(Place place, int32_t rows, const uint32_t* keys, int64_t capacity, const int64_t* collected,
                         const int64_t* prefix, int64_t* counts);  // as kPcbHistogram, of collected keys
int pcb_pick(Place place, int32_t rows, const int64_t* counts, int64_t* prefix, int64_t* rank);
int pcb_likely_window(Place place, int32_t rows, const int32_t* sample, int64_t size, const int64_t* places,
                      int64_t most, int32_t* window);
int pcb_settle(Place place, int32_t rows, const int64_t* rank, const int32_t* window, const int64_t* collected,
               int64_t capacity, const int64_t* prefix, int64_t* found, int32_t* missing);

}  // namespace cuda
FM_NAMESPACE_END
