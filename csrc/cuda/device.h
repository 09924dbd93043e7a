// What kernels may use of a GPU, under one set of names: by nvcc it is CUDA, by any other compiler an emulator on the
// CPU (emulated.h), in which the tests run the same kernels where there is no GPU.
//
// A kernel is launched in blocks of threads along one dimension. It has one piece of shared memory, whose type it
// names. Warps are whole: the operations of a warp are called by all of its 32 threads together, those of a block by
// all threads of it. What is added to memory that other threads add to is integers: their sums have no order.
#pragma once

#include "fastmerge/platform.h"

FM_NAMESPACE_BEGIN
namespace cuda {

// For tests, which want to know that it was a kernel that made a result.
void count_launch();

}  // namespace cuda
FM_NAMESPACE_END

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define FM_DEVICE __device__ __forceinline__
#define FM_METHOD __device__ __forceinline__
#define FM_KERNEL(threads) static __global__ void __launch_bounds__(threads)
// So many blocks shall find room on a processor together.
#define FM_KERNEL_RESIDENT(threads, blocks) static __global__ void __launch_bounds__(threads, blocks)
// A parameter that is large: it stays where the launch put it.
#define FM_LARGE const __grid_constant__
#define FM_UNROLL _Pragma("unroll")
#define FM_ROLLED _Pragma("unroll 1")

FM_NAMESPACE_BEGIN
namespace cuda {

FM_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
FM_DEVICE int lane() { return static_cast<int>(threadIdx.x) & 31; }
FM_DEVICE int64_t block() { return blockIdx.x; }
FM_DEVICE int64_t blocks() { return gridDim.x; }

FM_DEVICE void sync() { __syncthreads(); }
// Whether any thread of the block says so; a barrier, too.
FM_DEVICE bool any_of_block(bool value) { return __syncthreads_or(value) != 0; }
FM_DEVICE bool all_of_warp(bool value) { return __all_sync(0xffffffffu, value) != 0; }
// Bit i: what the warp's thread i says.
FM_DEVICE uint32_t ballot(bool value) { return __ballot_sync(0xffffffffu, value); }
template <class T>
FM_DEVICE T from_lane(T value, int source) {
    return __shfl_sync(0xffffffffu, value, source);
}
// From the thread `distance` lanes before; a thread that has none keeps its own.
template <class T>
FM_DEVICE T from_before(T value, int distance) {
    return __shfl_up_sync(0xffffffffu, value, static_cast<unsigned>(distance));
}
template <class T>
FM_DEVICE T from_across(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
FM_DEVICE uint32_t sum_of_warp(uint32_t value) { return __reduce_add_sync(0xffffffffu, value); }
FM_DEVICE uint32_t max_of_warp(uint32_t value) { return __reduce_max_sync(0xffffffffu, value); }
FM_DEVICE int32_t max_of_warp(int32_t value) { return __reduce_max_sync(0xffffffffu, value); }
FM_DEVICE int32_t min_of_warp(int32_t value) { return __reduce_min_sync(0xffffffffu, value); }

// Each returns what was there before.
FM_DEVICE uint32_t atomic_add(uint32_t* to, uint32_t value) { return atomicAdd(to, value); }
FM_DEVICE int32_t atomic_add(int32_t* to, int32_t value) { return atomicAdd(to, value); }
FM_DEVICE int64_t atomic_add(int64_t* to, int64_t value) {
    return static_cast<int64_t>(
        atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value)));
}
FM_DEVICE uint32_t atomic_or(uint32_t* to, uint32_t value) { return atomicOr(to, value); }
// A number that other threads may be changing by the operations above and below: what it is, or was.
FM_DEVICE int32_t peek(const int32_t* from) { return *static_cast<const volatile int32_t*>(from); }
// Writes `value` where `expected` was.
FM_DEVICE int32_t atomic_exchange_if(int32_t* to, int32_t expected, int32_t value) {
    return atomicCAS(to, expected, value);
}
FM_DEVICE int32_t atomic_min(int32_t* to, int32_t value) { return atomicMin(to, value); }
FM_DEVICE int32_t atomic_max(int32_t* to, int32_t value) { return atomicMax(to, value); }
FM_DEVICE uint32_t atomic_max(uint32_t* to, uint32_t value) { return atomicMax(to, value); }
FM_DEVICE int64_t atomic_max(int64_t* to, int64_t value) {
    return atomicMax(reinterpret_cast<long long*>(to), static_cast<long long>(value));
}

struct alignas(16) Words4 {
    uint32_t word[4];
};

// Memory that is read once: it does not stay in the first-level cache. The address is a multiple of 16.
FM_DEVICE Words4 load16(const void* from) {
    uint4 read = __ldcs(static_cast<const uint4*>(from));
    return {{read.x, read.y, read.z, read.w}};
}
FM_DEVICE void store16(void* to, const Words4& value) {
    __stcs(static_cast<uint4*>(to), make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]));
}

struct alignas(8) Words2 {
    uint32_t word[2];
};

// Memory that is read again soon, maybe by another kernel. The address is a multiple of 16, or of 8.
FM_DEVICE Words4 load16again(const void* from) {
    uint4 read = *static_cast<const uint4*>(from);
    return {{read.x, read.y, read.z, read.w}};
}
FM_DEVICE Words2 load8bytes(const void* from) {
    uint2 read = *static_cast<const uint2*>(from);
    return {{read.x, read.y}};
}

FM_DEVICE uint32_t load_byte(const void* from) { return *static_cast<const unsigned char*>(from); }

// The address is a multiple of so many bytes.
FM_DEVICE uint32_t load2bytes(const void* from) { return *static_cast<const unsigned short*>(from); }
FM_DEVICE uint32_t load4bytes(const void* from) { return *static_cast<const unsigned int*>(from); }
FM_DEVICE void store2bytes(void* to, uint32_t low_half) {
    *static_cast<unsigned short*>(to) = static_cast<unsigned short>(low_half);
}
FM_DEVICE void store4bytes(void* to, uint32_t value) { *static_cast<unsigned int*>(to) = value; }
FM_DEVICE void store8bytes(void* to, uint64_t value) {
    __stcs(static_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}

// The low 32 bits of two words, of which `high` comes after `low`, from bit `bits` (0 to 31) on.
FM_DEVICE uint32_t from_bit(uint32_t low, uint32_t high, uint32_t bits) { return __funnelshift_r(low, high, bits); }
FM_DEVICE int count_bits(uint32_t value) { return __popc(value); }
FM_DEVICE int lowest_bit(uint32_t value) { return __ffs(static_cast<int>(value)) - 1; }  // of one that is not 0
// Two floats, no NaN, rounded to nearest even, the first in the low half.
FM_DEVICE uint32_t two_bfloat16(float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
FM_DEVICE uint32_t two_float16(float low, float high) {
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
// a * b + c, rounded once. The family highpass alone may use it: its results are within a tolerance.
FM_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FM_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

template <class T>
FM_DEVICE T& shared() {
    extern __shared__ __align__(16) unsigned char fm_shared[];
    return *reinterpret_cast<T*>(fm_shared);
}

// The same number, which the next launch is not told again.
int refused(int error);
// Lets a kernel have as much shared memory as a block may have, once for all: what is captured now is made into a graph
// later, when the same kernel may have been launched with less.
int allow_shared(const void* kernel);

// 0, or CUDA's number of what went wrong. shared: bytes of shared memory.
template <class... P, class... A>
int launch(void (*kernel)(P...), int64_t grid, int threads, size_t shared, void* stream, A&&... arguments) {
    if (grid == 0) return 0;
    count_launch();
    if (shared > (48u << 10)) {
        int error = allow_shared(reinterpret_cast<const void*>(kernel));
        if (error != 0) return error;
    }
    kernel<<<static_cast<unsigned>(grid), threads, shared, static_cast<cudaStream_t>(stream)>>>(
        static_cast<P>(arguments)...);
    return cudaGetLastError();
}

}  // namespace cuda
FM_NAMESPACE_END

#else

#include "cuda/emulated.h"

#endif
