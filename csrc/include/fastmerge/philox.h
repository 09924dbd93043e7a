// Counter-based random words: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// Element g of a tensor reads lane g % 4 of the block whose counter is
//     c0, c1 = low and high word of g / 4;  c2 = low word of the tensor id;  c3 = stream id
// under the key
//     k0 = low word of the seed;  k1 = high word of the seed xor high word of the tensor id.
// So a mask depends on the seed, the tensor's name, the model's position and the element's place, and on nothing else.
//
// The stream id's layout, from the top: purpose (4 bits), generation (16 bits), position of the model or member (12).
#pragma once

#include "fastmerge/platform.h"

FM_NAMESPACE_BEGIN

enum StreamPurpose : uint32_t {
    kStreamBernoulli = 0,
    kStreamDella = 1,
    kStreamHashedTies = 2,
    kStreamBlendTrial = 3,
    kStreamDifferenceTrial = 4,
};

FM_INLINE uint32_t stream_id(uint32_t purpose, uint32_t generation, uint32_t position) {
    return (purpose << 28) | ((generation & 0xffffu) << 12) | (position & 0xfffu);
}

struct PhiloxStream {
    uint32_t k0, k1, c2, c3;
};

FM_INLINE PhiloxStream philox_stream(uint64_t seed, uint64_t tensor_id, uint32_t stream) {
    PhiloxStream s;
    s.k0 = static_cast<uint32_t>(seed);
    s.k1 = static_cast<uint32_t>(seed >> 32) ^ static_cast<uint32_t>(tensor_id >> 32);
    s.c2 = static_cast<uint32_t>(tensor_id);
    s.c3 = stream;
    return s;
}

struct PhiloxBlock {
    uint32_t word[4];
};

FM_INLINE PhiloxBlock philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; ++round) {
        uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
        uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
        uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
        uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c1 = static_cast<uint32_t>(p1);
        c3 = static_cast<uint32_t>(p0);
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    PhiloxBlock block = {{c0, c1, c2, c3}};
    return block;
}

FM_INLINE PhiloxBlock philox_at(const PhiloxStream& s, uint64_t counter) {
    return philox4x32(static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), s.c2, s.c3, s.k0, s.k1);
}

FM_NAMESPACE_END
