// What every other header stands on: the marks for host and device functions, and the namespace of the target.
//
// These headers hold the rules that all compiled backends share. They know neither Torch nor Python, and no
// standard-library template: a translation unit compiled for AVX-512 that instantiated one would hand its copy to the
// whole program, and the program would then die of an illegal instruction on an older machine. For the same reason
// everything here lives in a namespace named after the target that the unit is compiled for.
#pragma once

#include <stdint.h>
#include <string.h>

#ifndef FASTMERGE_TARGET
#define FASTMERGE_TARGET portable
#endif

#if defined(__CUDACC__)
#define FM_INLINE __host__ __device__ __forceinline__
#else
#define FM_INLINE static inline __attribute__((always_inline))
#endif

#define FM_NAMESPACE_BEGIN \
    namespace fastmerge {  \
    inline namespace FASTMERGE_TARGET {
#define FM_NAMESPACE_END \
    }                    \
    }

FM_NAMESPACE_BEGIN

template <class To, class From>
FM_INLINE To bit_cast(From value) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
    To result;
    memcpy(&result, &value, sizeof(result));
    return result;
}

FM_NAMESPACE_END
