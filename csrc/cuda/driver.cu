// What does not belong to a family: the device, its limits, what its errors mean, and numbers for its memory.
#include "cuda/api.h"
#include "cuda/device.h"

#include <atomic>

FM_NAMESPACE_BEGIN
namespace cuda {

static std::atomic<int64_t> launched{0};

void count_launch() { ++launched; }

int64_t launches() { return launched; }

#if defined(__CUDACC__)

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

std::string check_usable() {
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) return std::string("no GPU that this CUDA can use: ") + cudaGetErrorString(error);
    return count == 0 ? "no GPU that this CUDA can use" : "";
}

int use_device(int device) {
    int current = -1;
    cudaError_t error = cudaGetDevice(&current);
    if (error != cudaSuccess) return error;
    return current == device ? cudaSuccess : cudaSetDevice(device);
}

static int attribute(cudaDeviceAttr which, int otherwise) {
    int device = 0, value = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return otherwise;
    return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : otherwise;
}

int64_t shared_limit() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, 48 << 10); }

int64_t processors() { return attribute(cudaDevAttrMultiProcessorCount, 1); }

#else

const char* error_text(int) { return "the emulator refused a launch"; }

std::string check_usable() { return ""; }

int use_device(int) { return 0; }

int64_t shared_limit() { return emulated::shared_limit(); }

// Few, so that each has several parts of the work.
int64_t processors() { return 3; }

#endif

namespace {

constexpr int kWriters = 128;

struct Numbers {
    int64_t value[kMostNumbers];
};

FM_KERNEL(kWriters) write_numbers_kernel(FM_LARGE Numbers numbers, int32_t count, int64_t* out) {
    for (int i = thread(); i < count; i += kWriters) out[i] = numbers.value[i];
}

}  // namespace

int write_numbers(Place place, const int64_t* values, int32_t count, int64_t* out) {
    Numbers numbers;
    for (int32_t i = 0; i < kMostNumbers; ++i) numbers.value[i] = i < count ? values[i] : 0;
    return launch(write_numbers_kernel, 1, kWriters, 0, place.stream, numbers, count, out);
}

}  // namespace cuda
FM_NAMESPACE_END
