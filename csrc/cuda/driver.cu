// What does not belong to a family: the device, its limits, what its errors mean, and numbers for its memory.
#include "cuda/api.h"
#include "cuda/device.h"

#include <atomic>
#include <mutex>
#include <set>
#include <utility>

FM_NAMESPACE_BEGIN
namespace cuda {

static std::atomic<int64_t> launched{0};

void count_launch() { ++launched; }

int64_t launches() { return launched; }

#if defined(__CUDACC__)

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int refused(int error) {
    cudaGetLastError();
    return error;
}

namespace {

// The driver's functions that say which context is the thread's, and make one so. The runtime that is linked here is
// not PyTorch's: what device it takes for the thread's need not be the other's, but the driver's context is one for
// both. And to give a device back by its number would take memory there for a context, if it has none yet.
struct Driver {
    int (*get)(void** context) = nullptr;
    int (*set)(void* context) = nullptr;
    cudaError_t error;

    Driver() : error(find("cuCtxGetCurrent", &get)) {
        if (error == cudaSuccess) error = find("cuCtxSetCurrent", &set);
    }

    template <class Function>
    static cudaError_t find(const char* name, Function* function) {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
        cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
#else
        cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
        if (error == cudaSuccess && found == nullptr) error = cudaErrorSymbolNotFound;
        *function = reinterpret_cast<Function>(found);
        return error;
    }
};

const Driver& driver() {
    static const Driver found;
    return found;
}

}  // namespace

int enter_device(int device, void** before) {
    if (driver().error != cudaSuccess) return refused(driver().error);
    // Where the driver has not been begun with, there is no context to come back to.
    if (driver().get(before) != 0) *before = nullptr;
    cudaError_t error = cudaSetDevice(device);
    return error == cudaSuccess ? error : refused(error);
}

void leave_device(void* before) { driver().set(before); }

static int attribute(cudaDeviceAttr which, int otherwise) {
    int device = 0, value = 0;
    if (cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&value, which, device) == cudaSuccess) {
        return value;
    }
    refused(0);
    return otherwise;
}

int64_t shared_limit() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, 48 << 10); }

int64_t processors() { return attribute(cudaDevAttrMultiProcessorCount, 1); }

int allow_shared(const void* kernel) {
    static std::mutex mutex;
    static std::set<std::pair<int, const void*>> allowed;
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return refused(error);
    std::lock_guard<std::mutex> lock(mutex);
    if (allowed.count({device, kernel}) != 0) return 0;
    int most = static_cast<int>(shared_limit());
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) return refused(error);
    allowed.insert({device, kernel});
    return 0;
}

#else

const char* error_text(int) { return "the emulator refused a launch"; }

int enter_device(int device, void** before) {
    *before = nullptr;
    emulated::enter_device(device);
    return 0;
}

void leave_device(void*) { emulated::leave_device(); }

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

#if defined(__CUDACC__)

std::string check_usable() {
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaSuccess && count == 0) return "no GPU that this CUDA can use";
    std::string why = "no GPU that this CUDA can use: ";
    if (error == cudaSuccess) {
        // It fails where there is no code of any kernel for this GPU: all are compiled for the same ones.
        cudaFuncAttributes attributes;
        error = cudaFuncGetAttributes(&attributes, write_numbers_kernel);
        why = "its kernels cannot run on this GPU: ";
    }
    return error == cudaSuccess ? "" : why + cudaGetErrorString(static_cast<cudaError_t>(refused(error)));
}

#else

std::string check_usable() { return ""; }

#endif

int write_numbers(Place place, const int64_t* values, int32_t count, int64_t* out) {
    Numbers numbers;
    for (int32_t i = 0; i < kMostNumbers; ++i) numbers.value[i] = i < count ? values[i] : 0;
    return launch(write_numbers_kernel, 1, kWriters, 0, place.stream, numbers, count, out);
}

}  // namespace cuda
FM_NAMESPACE_END
