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
int64_t launches();      // how many kernels were launched so far
int64_t processors();    // of the current device

// sparsify
int count_nonfinite(Place place, Array x, int64_t numel, int64_t* nan_and_inf);  // adds to two numbers
int zero_nonfinite(Place place, void* data, int32_t dtype, int64_t numel);

}  // namespace cuda
FM_NAMESPACE_END
