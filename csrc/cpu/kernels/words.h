// Random words for a tile: whole Philox blocks, several at once.
//
// Philox multiplies 32-bit words into 64-bit products. Compilers do not find the instruction for that in a loop, so the
// two wide instruction sets have their rounds spelt out, on 64-bit lanes whose upper halves are left to hold rubbish:
// the multiplication reads only the lower ones.
#pragma once

#include "cpu/kernels/tile.h"
#include "fastmerge/philox.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

FM_NAMESPACE_BEGIN
namespace {

using cpu::Stream;

#if defined(__AVX512F__)
constexpr int kBlocksAtOnce = 8;
typedef __m512i Lanes;
FM_INLINE Lanes lanes_set(uint64_t value) { return _mm512_set1_epi64(static_cast<long long>(value)); }
FM_INLINE Lanes lanes_count(uint64_t first) {
    return _mm512_add_epi64(lanes_set(first), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
}
FM_INLINE Lanes lanes_multiply(Lanes a, Lanes b) { return _mm512_mul_epu32(a, b); }
FM_INLINE Lanes lanes_high(Lanes a) { return _mm512_srli_epi64(a, 32); }
FM_INLINE Lanes lanes_xor3(Lanes a, Lanes b, Lanes c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
// Eight blocks of four words, from their first, second, third and fourth words.
FM_INLINE void lanes_store(uint32_t* out, Lanes w0, Lanes w1, Lanes w2, Lanes w3) {
    Lanes front = _mm512_mask_blend_epi32(0xaaaa, w0, _mm512_slli_epi64(w1, 32));
    Lanes back = _mm512_mask_blend_epi32(0xaaaa, w2, _mm512_slli_epi64(w3, 32));
    Lanes first = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0), second = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi64(front, first, back));
    _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi64(front, second, back));
}
#elif defined(__AVX2__)
constexpr int kBlocksAtOnce = 4;
typedef __m256i Lanes;
FM_INLINE Lanes lanes_set(uint64_t value) { return _mm256_set1_epi64x(static_cast<long long>(value)); }
FM_INLINE Lanes lanes_count(uint64_t first) {
    return _mm256_add_epi64(lanes_set(first), _mm256_set_epi64x(3, 2, 1, 0));
}
FM_INLINE Lanes lanes_multiply(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
FM_INLINE Lanes lanes_high(Lanes a) { return _mm256_srli_epi64(a, 32); }
FM_INLINE Lanes lanes_xor3(Lanes a, Lanes b, Lanes c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
FM_INLINE void lanes_store(uint32_t* out, Lanes w0, Lanes w1, Lanes w2, Lanes w3) {
    Lanes front = _mm256_blend_epi32(w0, _mm256_slli_epi64(w1, 32), 0xaa);
    Lanes back = _mm256_blend_epi32(w2, _mm256_slli_epi64(w3, 32), 0xaa);
    Lanes even = _mm256_unpacklo_epi64(front, back), odd = _mm256_unpackhi_epi64(front, back);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), _mm256_permute2x128_si256(even, odd, 0x31));
}
#else
constexpr int kBlocksAtOnce = 0;
#endif

constexpr int kChains = 4;  // independent chains hide the multiplications' latency
constexpr int kWordSlack = 4 * 8 * kChains + 8;

#if defined(__AVX512F__) || defined(__AVX2__)
// kChains * kBlocksAtOnce blocks from `counter` on.
FM_INLINE void philox_wide(const Stream& stream, uint64_t counter, uint32_t* out) {
    Lanes c0[kChains], c1[kChains], c2[kChains], c3[kChains];
    for (int i = 0; i < kChains; ++i) {
        c0[i] = lanes_count(counter + static_cast<uint64_t>(i * kBlocksAtOnce));
        c1[i] = lanes_high(c0[i]);
        c2[i] = lanes_set(stream.c2);
        c3[i] = lanes_set(stream.c3);
    }
    Lanes m0 = lanes_set(0xD2511F53u), m1 = lanes_set(0xCD9E8D57u);
    uint32_t k0 = stream.k0, k1 = stream.k1;
    for (int round = 0; round < 10; ++round) {
        Lanes key0 = lanes_set(k0), key1 = lanes_set(k1);
        for (int i = 0; i < kChains; ++i) {
            Lanes p0 = lanes_multiply(c0[i], m0), p1 = lanes_multiply(c2[i], m1);
            c0[i] = lanes_xor3(lanes_high(p1), c1[i], key0);
            c2[i] = lanes_xor3(lanes_high(p0), c3[i], key1);
            c1[i] = p1;
            c3[i] = p0;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < kChains; ++i) lanes_store(out + 4 * kBlocksAtOnce * i, c0[i], c1[i], c2[i], c3[i]);
}
#endif

// The random words of elements first .. first + count - 1, which start at the returned pointer. `buffer` has room for
// count + kWordSlack words: blocks are made whole, and several together.
inline const uint32_t* word_tile(const Stream& stream, uint64_t first, int count, uint32_t* __restrict buffer) {
    uint64_t counter = first >> 2;
    int lead = static_cast<int>(first & 3u);
    int blocks = (lead + count + 3) >> 2;
#if defined(__AVX512F__) || defined(__AVX2__)
    for (int b = 0; b < blocks; b += kChains * kBlocksAtOnce) {
        philox_wide(stream, counter + static_cast<uint64_t>(b), buffer + 4 * b);
    }
#else
    for (int b = 0; b < blocks; ++b) {
        uint64_t c = counter + static_cast<uint64_t>(b);
        PhiloxBlock words = philox4x32(static_cast<uint32_t>(c), static_cast<uint32_t>(c >> 32), stream.c2, stream.c3,
                                       stream.k0, stream.k1);
        for (int lane = 0; lane < 4; ++lane) buffer[4 * b + lane] = words.word[lane];
    }
#endif
    return buffer + lead;
}

}  // namespace
FM_NAMESPACE_END
