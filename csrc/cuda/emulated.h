// A GPU's blocks, warps and threads on one thread of the CPU: what device.h names, for any C++ compiler.
//
// Every thread of a block is a fiber. It runs until it waits for its warp or its block, and goes on when all the others
// wait for the same; if some wait for something else, or have ended, the kernel would hang or be undefined on a GPU,
// and the emulator says so and aborts. Blocks run one after the other. Shared memory begins as rubbish in every block.
// FASTMERGE_EMULATED_ORDER=reverse runs blocks and threads from the last to the first: a race shows as another result.
#pragma once

#include <math.h>
#include <stddef.h>

#include <functional>
#include <type_traits>

#include "fastmerge/scalar.h"

#define FM_DEVICE static inline
#define FM_METHOD inline
#define FM_KERNEL(threads) static void
#define FM_KERNEL_RESIDENT(threads, blocks) static void
#define FM_LARGE const
#define FM_UNROLL
#define FM_ROLLED

namespace fastmerge {
namespace emulated {

enum class Wait : int { kNothing, kWarp, kBlock, kEnded };

struct Context {
    int thread;
    int64_t block, blocks;
    unsigned char* shared;
};

extern Context context;  // of the fiber that runs

// Deposits a value, waits for the warp or the block, and returns all deposits of it, 32 or as many as threads.
const uint64_t* meet(Wait wait, uint64_t value);
// The host's thread has device 0 while no launch is made, and is given it back.
void enter_device(int device);
void leave_device();
// FASTMERGE_EMULATED_SHARED, or 227 KiB, what a block may have on sm_90.
int64_t shared_limit();
// Refuses what would stop a kernel on a GPU, "misaligned address", or what compute-sanitizer would find: a byte of what
// FASTMERGE_EMULATED_FORBIDDEN names, "begin-end" once or more with commas between them.
void touch(const void* address, size_t bytes);
void run(int64_t grid, int threads, size_t shared, const std::function<void()>& body);

}  // namespace emulated
}  // namespace fastmerge

FM_NAMESPACE_BEGIN
namespace cuda {

using emulated::context;
using emulated::meet;
using emulated::Wait;

FM_DEVICE int thread() { return context.thread; }
FM_DEVICE int lane() { return context.thread & 31; }
FM_DEVICE int64_t block() { return context.block; }
FM_DEVICE int64_t blocks() { return context.blocks; }

FM_DEVICE void sync() { meet(Wait::kBlock, 0); }
FM_DEVICE bool any_of_block(bool value) { return meet(Wait::kBlock, value)[-1] != 0; }
FM_DEVICE uint32_t ballot(bool value) {
    const uint64_t* said = meet(Wait::kWarp, value);
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(said[i] != 0) << i;
    return bits;
}
FM_DEVICE bool all_of_warp(bool value) { return ballot(value) == 0xffffffffu; }

template <class T>
FM_DEVICE T from_lane(T value, int source) {
    static_assert(sizeof(T) <= 8, "a register, or two");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    uint64_t found = meet(Wait::kWarp, bits)[source & 31];
    memcpy(&value, &found, sizeof(T));
    return value;
}
template <class T>
FM_DEVICE T from_before(T value, int distance) {
    return from_lane(value, lane() >= distance ? lane() - distance : lane());
}
template <class T>
FM_DEVICE T from_across(T value, int mask) {
    return from_lane(value, lane() ^ mask);
}
FM_DEVICE uint32_t sum_of_warp(uint32_t value) {
    const uint64_t* said = meet(Wait::kWarp, value);
    uint32_t sum = 0;
    for (int i = 0; i < 32; ++i) sum += static_cast<uint32_t>(said[i]);
    return sum;
}
template <class T>
FM_DEVICE T max_of_warp(T value) {
    const uint64_t* said = meet(Wait::kWarp, static_cast<uint64_t>(value));
    T most = static_cast<T>(said[0]);
    for (int i = 1; i < 32; ++i) most = static_cast<T>(said[i]) > most ? static_cast<T>(said[i]) : most;
    return most;
}
template <class T>
FM_DEVICE T min_of_warp(T value) {
    const uint64_t* said = meet(Wait::kWarp, static_cast<uint64_t>(value));
    T least = static_cast<T>(said[0]);
    for (int i = 1; i < 32; ++i) least = static_cast<T>(said[i]) < least ? static_cast<T>(said[i]) : least;
    return least;
}

template <class T>
FM_DEVICE T atomic_add(T* to, typename std::common_type<T>::type value) {
    T before = *to;
    *to = static_cast<T>(before + value);
    return before;
}
FM_DEVICE uint32_t atomic_or(uint32_t* to, uint32_t value) {
    uint32_t before = *to;
    *to = before | value;
    return before;
}
FM_DEVICE int32_t peek(const int32_t* from) { return *from; }
FM_DEVICE int32_t atomic_exchange_if(int32_t* to, int32_t expected, int32_t value) {
    int32_t before = *to;
    if (before == expected) *to = value;
    return before;
}
template <class T>
FM_DEVICE T atomic_min(T* to, typename std::common_type<T>::type value) {
    T before = *to;
    *to = value < before ? value : before;
    return before;
}
template <class T>
FM_DEVICE T atomic_max(T* to, typename std::common_type<T>::type value) {
    T before = *to;
    *to = value > before ? value : before;
    return before;
}

struct alignas(16) Words4 {
    uint32_t word[4];
};

FM_DEVICE Words4 load16(const void* from) {
    emulated::touch(from, 16);
    Words4 value;
    memcpy(&value, from, 16);
    return value;
}
FM_DEVICE void store16(void* to, const Words4& value) {
    emulated::touch(to, 16);
    memcpy(to, &value, 16);
}

struct alignas(8) Words2 {
    uint32_t word[2];
};

FM_DEVICE Words4 load16again(const void* from) { return load16(from); }
FM_DEVICE Words2 load8bytes(const void* from) {
    emulated::touch(from, 8);
    Words2 value;
    memcpy(&value, from, 8);
    return value;
}

FM_DEVICE uint32_t load_byte(const void* from) {
    emulated::touch(from, 1);
    return *static_cast<const unsigned char*>(from);
}

FM_DEVICE uint32_t load2bytes(const void* from) {
    emulated::touch(from, 2);
    uint16_t value;
    memcpy(&value, from, 2);
    return value;
}
FM_DEVICE uint32_t load4bytes(const void* from) {
    emulated::touch(from, 4);
    uint32_t value;
    memcpy(&value, from, 4);
    return value;
}
FM_DEVICE void store2bytes(void* to, uint32_t low_half) {
    emulated::touch(to, 2);
    memcpy(to, &low_half, 2);
}
FM_DEVICE void store4bytes(void* to, uint32_t value) {
    emulated::touch(to, 4);
    memcpy(to, &value, 4);
}
FM_DEVICE void store8bytes(void* to, uint64_t value) {
    emulated::touch(to, 8);
    memcpy(to, &value, 8);
}

FM_DEVICE uint32_t from_bit(uint32_t low, uint32_t high, uint32_t bits) {
    return static_cast<uint32_t>(((static_cast<uint64_t>(high) << 32) | low) >> (bits & 31u));
}
FM_DEVICE int count_bits(uint32_t value) { return __builtin_popcount(value); }
FM_DEVICE int lowest_bit(uint32_t value) { return __builtin_ctz(value); }
FM_DEVICE uint32_t two_bfloat16(float low, float high) {
    return round_bfloat16(low) | (static_cast<uint32_t>(round_bfloat16(high)) << 16);
}
FM_DEVICE uint32_t two_float16(float low, float high) {
    return round_float16(low) | (static_cast<uint32_t>(round_float16(high)) << 16);
}
// Of a number and a NaN the number, though the NaN be a signalling one, for which the C library's returns a NaN.
FM_DEVICE float fmaxf(float a, float b) {
    if (a == b) return signbit(a) ? b : a;
    return a > b || b != b ? a : b;
}
FM_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
FM_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
    return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

template <class T>
FM_DEVICE T& shared() {
    return *reinterpret_cast<T*>(context.shared);
}

template <class... P, class... A>
int launch(void (*kernel)(P...), int64_t grid, int threads, size_t shared, void* stream, A&&... arguments) {
    (void)stream;
    if (grid == 0) return 0;
    count_launch();
    emulated::run(grid, threads, shared, [&] { kernel(static_cast<P>(arguments)...); });
    return 0;
}

}  // namespace cuda
FM_NAMESPACE_END
