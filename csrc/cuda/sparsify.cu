#include "cuda/api.h"
#include "cuda/tile.h"

FM_NAMESPACE_BEGIN
namespace cuda {
namespace {

FM_KERNEL(kThreads) count_nonfinite_kernel(Array x, int64_t numel, int64_t* nan_and_inf) {
    int64_t end = smaller(numel, (block() + 1) * kTieBlock);
    uint32_t nans = 0, infs = 0;
    for (int64_t at = block() * kTieBlock + thread() * kEach; at < end; at += kTile) {
        float values[kEach];
        load8(x, at, end, values);
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) {
            uint32_t magnitude = bit_cast<uint32_t>(values[t]) & 0x7fffffffu;
            nans += magnitude > kInfBits ? 1u : 0u;
            infs += magnitude == kInfBits ? 1u : 0u;
        }
    }
    for (int mask = 16; mask > 0; mask /= 2) {
        nans += from_across(nans, mask);
        infs += from_across(infs, mask);
    }
    if (lane() == 0 && nans > 0) atomic_add(&nan_and_inf[0], static_cast<int64_t>(nans));
    if (lane() == 0 && infs > 0) atomic_add(&nan_and_inf[1], static_cast<int64_t>(infs));
}

FM_KERNEL(kThreads) zero_nonfinite_kernel(void* data, int32_t dtype, int64_t numel) {
    int64_t end = smaller(numel, (block() + 1) * kTieBlock);
    for (int64_t at = block() * kTieBlock + thread() * kEach; at < end; at += kTile) {
        float values[kEach];
        Array x = {data, dtype};
        load8(x, at, end, values);
        bool any = false;
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) {
            bool finite = (bit_cast<uint32_t>(values[t]) & 0x7fffffffu) < kInfBits;
            any = any || !finite;
            values[t] = finite ? values[t] : 0.0f;
        }
        if (any) store8(data, dtype, at, end, values);
    }
}

}  // namespace

int count_nonfinite(Place place, Array x, int64_t numel, int64_t* nan_and_inf) {
    return launch(count_nonfinite_kernel, tie_blocks(numel), kThreads, 0, place.stream, x, numel, nan_and_inf);
}

int zero_nonfinite(Place place, void* data, int32_t dtype, int64_t numel) {
    return launch(zero_nonfinite_kernel, tie_blocks(numel), kThreads, 0, place.stream, data, dtype, numel);
}

}  // namespace cuda
FM_NAMESPACE_END
