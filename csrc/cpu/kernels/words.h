// Random words for a tile: whole Philox blocks, several at once.
//
// Philox multiplies 32-bit words into 64-bit products. Compilers do not find the instruction for that in a loop, so the
// two wide instruction sets have their rounds spelt out, on 64-bit lanes whose upper halves are left to hold rubbish:
// the multiplication reads only the lower ones. Of a block's counter all but the low word is the same in a whole tile:
// what the first rounds make of that is worked out once.
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
FM_INLINE Lanes lanes_load(const uint64_t* from) { return _mm512_loadu_si512(from); }
FM_INLINE Lanes lanes_add(Lanes a, Lanes b) { return _mm512_add_epi64(a, b); }
FM_INLINE Lanes lanes_multiply(Lanes a, Lanes b) { return _mm512_mul_epu32(a, b); }
FM_INLINE Lanes lanes_high(Lanes a) { return _mm512_srli_epi64(a, 32); }
FM_INLINE Lanes lanes_xor(Lanes a, Lanes b) { return _mm512_xor_si512(a, b); }
FM_INLINE Lanes lanes_xor3(Lanes a, Lanes b, Lanes c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
// The lower halves of `a` in the lower halves, those of `b` in the upper ones; and the upper halves so.
FM_INLINE Lanes lanes_both_low(Lanes a, Lanes b) { return _mm512_mask_shuffle_epi32(a, 0xaaaa, b, _MM_PERM_CCAA); }
FM_INLINE Lanes lanes_both_high(Lanes a, Lanes b) { return _mm512_mask_shuffle_epi32(b, 0x5555, a, _MM_PERM_DDBB); }
FM_INLINE void lanes_store(uint32_t* out, Lanes a) { _mm512_storeu_si512(out, a); }
// Eight blocks of four words.
FM_INLINE void lanes_store_blocks(uint32_t* out, Lanes even, Lanes odd) {
    Lanes first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    Lanes second = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi32(even, first, odd));
    _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi32(even, second, odd));
}
#elif defined(__AVX2__)
constexpr int kBlocksAtOnce = 4;
typedef __m256i Lanes;
FM_INLINE Lanes lanes_set(uint64_t value) { return _mm256_set1_epi64x(static_cast<long long>(value)); }
FM_INLINE Lanes lanes_load(const uint64_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
FM_INLINE Lanes lanes_add(Lanes a, Lanes b) { return _mm256_add_epi64(a, b); }
FM_INLINE Lanes lanes_multiply(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
FM_INLINE Lanes lanes_high(Lanes a) { return _mm256_srli_epi64(a, 32); }
FM_INLINE Lanes lanes_xor(Lanes a, Lanes b) { return _mm256_xor_si256(a, b); }
FM_INLINE Lanes lanes_xor3(Lanes a, Lanes b, Lanes c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
FM_INLINE Lanes lanes_both_low(Lanes a, Lanes b) { return _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xaa); }
FM_INLINE Lanes lanes_both_high(Lanes a, Lanes b) { return _mm256_blend_epi32(_mm256_srli_epi64(a, 32), b, 0xaa); }
FM_INLINE void lanes_store(uint32_t* out, Lanes a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), a); }
FM_INLINE void lanes_store_blocks(uint32_t* out, Lanes even, Lanes odd) {
    Lanes first = _mm256_unpacklo_epi32(even, odd), second = _mm256_unpackhi_epi32(even, odd);
    lanes_store(out, _mm256_permute2x128_si256(first, second, 0x20));
    lanes_store(out + 8, _mm256_permute2x128_si256(first, second, 0x31));
}
#else
constexpr int kBlocksAtOnce = 0;
#endif

constexpr int kChains = 4;  // independent chains hide the multiplications' latency
constexpr int kWordSlack = 4 * 8 * kChains + 8;
constexpr int kPairsTogether = 2 * 8 * kChains;  // or half of that

#if defined(__AVX512F__) || defined(__AVX2__)
constexpr int kBlocksTogether = kChains * kBlocksAtOnce;
constexpr uint64_t kPhilox0 = 0xD2511F53u, kPhilox1 = 0xCD9E8D57u;

// The first factor times 0, 1, 2 ...
struct Steps {
    uint64_t product[kBlocksTogether];
    constexpr Steps() : product() {
        for (int b = 0; b < kBlocksTogether; ++b) product[b] = kPhilox0 * static_cast<uint64_t>(b);
    }
};
constexpr Steps kSteps;

// What blocks are xored with in each round, if the high word of their counter is this one: the keys, and in the first
// three rounds what does not depend on the low word.
struct WideKeys {
    uint64_t first[10], second[10];

    WideKeys(const Stream& stream, uint32_t high) {
        uint32_t k0 = stream.k0, k1 = stream.k1;
        for (int round = 0; round < 10; ++round) {
            first[round] = k0;
            second[round] = k1;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        uint64_t product = kPhilox1 * stream.c2;
        uint64_t next = kPhilox0 * static_cast<uint32_t>((product >> 32) ^ high ^ first[0]);
        second[0] ^= stream.c3;
        first[1] ^= product & 0xffffffffu;
        second[1] ^= next >> 32;
        second[2] ^= next & 0xffffffffu;
        // The last round is made in both halves of a lane at once.
        first[9] |= second[9] << 32;
    }
};

// kBlocksTogether blocks from a counter on whose low word is `low`, and does not overflow. even[i] gets the first and
// third words of kBlocksAtOnce blocks, odd[i] the second and fourth.
FM_INLINE void philox_wide(const WideKeys& keys, uint32_t low, Lanes* even, Lanes* odd) {
    Lanes c0[kChains], c1[kChains], c2[kChains], c3[kChains];
    Lanes m0 = lanes_set(kPhilox0), m1 = lanes_set(kPhilox1), start = lanes_set(kPhilox0 * low);
    for (int i = 0; i < kChains; ++i) {
        // Rounds 1 and 2: of the first, c0 and c1 are the same everywhere.
        Lanes p0 = lanes_add(start, lanes_load(kSteps.product + kBlocksAtOnce * i));
        Lanes p1 = lanes_multiply(lanes_xor(lanes_high(p0), lanes_set(keys.second[0])), m1);
        c0[i] = lanes_xor(lanes_high(p1), lanes_set(keys.first[1]));
        c1[i] = p1;
        c2[i] = lanes_xor(p0, lanes_set(keys.second[1]));
    }
    for (int i = 0; i < kChains; ++i) {
        // Round 3: of the second, c3 is.
        Lanes p0 = lanes_multiply(c0[i], m0), p1 = lanes_multiply(c2[i], m1);
        c0[i] = lanes_xor3(lanes_high(p1), c1[i], lanes_set(keys.first[2]));
        c2[i] = lanes_xor(lanes_high(p0), lanes_set(keys.second[2]));
        c1[i] = p1;
        c3[i] = p0;
    }
    for (int round = 3; round < 9; ++round) {
        Lanes key0 = lanes_set(keys.first[round]), key1 = lanes_set(keys.second[round]);
        for (int i = 0; i < kChains; ++i) {
            Lanes p0 = lanes_multiply(c0[i], m0), p1 = lanes_multiply(c2[i], m1);
            c0[i] = lanes_xor3(lanes_high(p1), c1[i], key0);
            c2[i] = lanes_xor3(lanes_high(p0), c3[i], key1);
            c1[i] = p1;
            c3[i] = p0;
        }
    }
    for (int i = 0; i < kChains; ++i) {
        Lanes p0 = lanes_multiply(c0[i], m0), p1 = lanes_multiply(c2[i], m1);
        even[i] = lanes_xor3(lanes_both_high(p1, p0), lanes_both_low(c1[i], c3[i]), lanes_set(keys.first[9]));
        odd[i] = lanes_both_low(p1, p0);
    }
}
#endif

// Random words of a stream, tile by tile.
class Words {
public:
#if defined(__AVX512F__) || defined(__AVX2__)
    // Words of elements anywhere; those near `first` need the fewest keys.
    Words(const Stream& stream, uint64_t first)
        : stream_(stream), high_(first >> 34), keys_(stream, static_cast<uint32_t>(first >> 34)) {}
#else
    Words(const Stream& stream, uint64_t) : stream_(stream) {}
#endif

    // Those of elements first .. first + count - 1, which start at the returned pointer. `buffer` has room for
    // count + kWordSlack words: blocks are made whole, and several together.
    const uint32_t* tile(uint64_t first, int count, uint32_t* __restrict buffer) {
        uint64_t counter = first >> 2;
        int lead = static_cast<int>(first & 3u);
        int blocks = (lead + count + 3) >> 2, b = 0;
#if defined(__AVX512F__) || defined(__AVX2__)
        for (; is_wide(counter, b, blocks); b += kBlocksTogether) {
            Lanes even[kChains], odd[kChains];
            philox_wide(keys_, static_cast<uint32_t>(counter) + static_cast<uint32_t>(b), even, odd);
            for (int i = 0; i < kChains; ++i) {
                lanes_store_blocks(buffer + 4 * (b + kBlocksAtOnce * i), even[i], odd[i]);
            }
        }
#endif
        for (; b < blocks; ++b) {
            PhiloxBlock words = block(counter + static_cast<uint64_t>(b));
            for (int lane = 0; lane < 4; ++lane) buffer[4 * b + lane] = words.word[lane];
        }
        return buffer + lead;
    }

    // Those of elements first, first + 2, ... and those of elements first + 1, first + 3, ..., `pairs` of both; `first`
    // is a multiple of 4 and `pairs` of kPairsTogether. This is how vectors hold them.
    void tile_of_pairs(uint64_t first, int pairs, uint32_t* __restrict evens, uint32_t* __restrict odds) {
        uint64_t counter = first >> 2;
        int blocks = pairs >> 1, b = 0;
#if defined(__AVX512F__) || defined(__AVX2__)
        for (; is_wide(counter, b, blocks); b += kBlocksTogether) {
            Lanes even[kChains], odd[kChains];
            philox_wide(keys_, static_cast<uint32_t>(counter) + static_cast<uint32_t>(b), even, odd);
            for (int i = 0; i < kChains; ++i) {
                lanes_store(evens + 2 * (b + kBlocksAtOnce * i), even[i]);
                lanes_store(odds + 2 * (b + kBlocksAtOnce * i), odd[i]);
            }
        }
#endif
        for (; b < blocks; ++b) {
            PhiloxBlock words = block(counter + static_cast<uint64_t>(b));
            for (int lane = 0; lane < 2; ++lane) {
                evens[2 * b + lane] = words.word[2 * lane];
                odds[2 * b + lane] = words.word[2 * lane + 1];
            }
        }
    }

private:
    PhiloxBlock block(uint64_t counter) const {
        return philox4x32(static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), stream_.c2, stream_.c3,
                          stream_.k0, stream_.k1);
    }

    Stream stream_;
#if defined(__AVX512F__) || defined(__AVX2__)
    // Whether blocks are wanted from b on, and the low word of their counter does not overflow. Has the keys for them.
    bool is_wide(uint64_t counter, int b, int blocks) {
        uint64_t high = counter >> 32, low = counter & 0xffffffffu;
        if (b >= blocks || low + static_cast<uint64_t>(b + kBlocksTogether) > 0x100000000u) return false;
        if (high != high_) {
            keys_ = WideKeys(stream_, static_cast<uint32_t>(high));
            high_ = high;
        }
        return true;
    }

    uint64_t high_;  // the counter's high word that the keys are for
    WideKeys keys_;
#endif
};

inline const uint32_t* word_tile(const Stream& stream, uint64_t first, int count, uint32_t* __restrict buffer) {
    return Words(stream, first).tile(first, count, buffer);
}

}  // namespace
FM_NAMESPACE_END
