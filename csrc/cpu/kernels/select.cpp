// Kernels of the select family: keys, counting against a window, histograms.
#include "cpu/kernels/select.h"
#include "cpu/kernels/words.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

FM_NAMESPACE_BEGIN
namespace {

void keys(const Models* models, int32_t model, int64_t begin, int64_t count, uint32_t* out) {
    float base[kTile], delta[kTile];
    for (int64_t done = 0; done < count; done += kTile) {
        int tile = static_cast<int>(smaller(kTile, count - done));
        base_tile(*models, begin + done, tile, base);
        delta_tile(*models, model, begin + done, tile, base, delta);
        key_tile(tile, delta, out + done);
    }
}

// Appends the keys within the window to `out` and counts those above it. `out` has room for the whole tile: full
// vectors are stored, and the next store overwrites what lies past the ones that counted.
inline int64_t compress(const uint32_t* keys, int count, uint32_t low, uint32_t high, uint32_t* out, int64_t* above) {
    uint32_t width = high - low;
    int64_t kept = 0, over = 0;
    int t = 0;
#if defined(__AVX512F__)
    __m512i lows = _mm512_set1_epi32(static_cast<int>(low)), highs = _mm512_set1_epi32(static_cast<int>(high));
    for (; t + 16 <= count; t += 16) {
        __m512i k = _mm512_loadu_si512(keys + t);
        __mmask16 up = _mm512_cmpgt_epu32_mask(k, highs);
        __mmask16 in = static_cast<__mmask16>(_mm512_cmpge_epu32_mask(k, lows) & static_cast<__mmask16>(~up));
        // Compressing in a register and storing it whole: the store form of the instruction is slow on some processors.
        _mm512_storeu_si512(out + kept, _mm512_maskz_compress_epi32(in, k));
        kept += __builtin_popcount(in);
        over += __builtin_popcount(up);
    }
#endif
    for (; t < count; ++t) {
        uint32_t k = keys[t];
        out[kept] = k;
        kept += (k - low) <= width;
        over += k > high;
    }
    *above += over;
    return kept;
}

int64_t collect(const Models* models, int32_t model, int64_t begin, int64_t count, cpu::Window window, uint32_t* out,
                int64_t* above) {
    float base[kTile], delta[kTile];
    uint32_t key[kTile];
    int64_t kept = 0;
    for (int64_t done = 0; done < count; done += kTile) {
        int tile = static_cast<int>(smaller(kTile, count - done));
        base_tile(*models, begin + done, tile, base);
        delta_tile(*models, model, begin + done, tile, base, delta);
        key_tile(tile, delta, key);
        kept += compress(key, tile, window.low, window.high, out + kept, above);
    }
    return kept;
}

int64_t count_key(const uint32_t* keys, int64_t count, uint32_t key) {
    int64_t total = 0;
    for (int64_t done = 0; done < count; done += 1 << 20) {
        int64_t stop = smaller(count, done + (1 << 20));
        uint32_t found = 0;
        for (int64_t i = done; i < stop; ++i) found += keys[i] == key;
        total += found;
    }
    return total;
}

void count_ties(const Models* models, int32_t model, int64_t begin, int64_t count, const uint32_t* thresholds,
                int64_t* out) {
    float base[kTile], delta[kTile];
    uint32_t key[kTile];
    for (int64_t done = 0; done < count; done += kTile) {
        int tile = static_cast<int>(smaller(kTile, count - done));
        base_tile(*models, begin + done, tile, base);
        delta_tile(*models, model, begin + done, tile, base, delta);
        key_tile(tile, delta, key);
        out[0] += count_key(key, tile, thresholds[0]);
        out[1] += count_key(key, tile, thresholds[1]);
    }
}

// Two interleaved sets of bins, so that a run of equal values does not wait for one counter.
inline void histogram_tile(int count, const uint32_t* bin, uint32_t* bins, int64_t stride) {
    int t = 0;
    for (; t + 2 <= count; t += 2) {
        bins[bin[t]] += 1;
        bins[stride + bin[t + 1]] += 1;
    }
    if (t < count) bins[bin[t]] += 1;
}

// Without a prefix, bins[0..65535] and bins[65536..131071] together hold the counts of the keys' high halves.
void key_histogram(const Models* models, int32_t model, int64_t begin, int64_t count, int64_t prefix, uint32_t* bins) {
    float base[kTile], delta[kTile];
    uint32_t key[kTile];
    for (int64_t done = 0; done < count; done += kTile) {
        int tile = static_cast<int>(smaller(kTile, count - done));
        base_tile(*models, begin + done, tile, base);
        delta_tile(*models, model, begin + done, tile, base, delta);
        key_tile(tile, delta, key);
        if (prefix < 0) {
            for (int t = 0; t < tile; ++t) key[t] >>= 15;
            histogram_tile(tile, key, bins, 65536);
        } else {
            for (int t = 0; t < tile; ++t) {
                if (static_cast<int64_t>(key[t] >> 15) == prefix) bins[key[t] & 32767u] += 1;
            }
        }
    }
}

// bins[0..] and bins[32768..] together hold the counts.
void raw_histogram(Array x, int64_t begin, int64_t count, int32_t shift, uint32_t* bins) {
    uint32_t bin[kTile];
    for (int64_t done = 0; done < count; done += kTile) {
        int tile = static_cast<int>(smaller(kTile, count - done));
        int64_t at = begin + done;
        if (x.dtype == kFloat32) {
            for (int t = 0; t < tile; ++t) bin[t] = magnitude_key(read_float(x.data, at + t)) >> shift;
        } else if (x.dtype == kBFloat16) {
            for (int t = 0; t < tile; ++t) bin[t] = magnitude_key16(read_half(x.data, at + t), kBFloat16) >> shift;
        } else {
            for (int t = 0; t < tile; ++t) bin[t] = magnitude_key16(read_half(x.data, at + t), kFloat16) >> shift;
        }
        histogram_tile(tile, bin, bins, 32768);
    }
}

void mask(const Models* models, const Rule* rule, int64_t begin, int64_t count, uint8_t* out) {
    float base[kTile], delta[kTile];
    uint32_t keep[kTile];
    BandCursor cursor;
    for (int64_t done = 0; done < count; done += kTile) {
        int tile = static_cast<int>(smaller(kTile, count - done));
        int64_t at = begin + done;
        if (done == 0 || at % kTieBlock == 0) band_open(*rule, 0, at, cursor);
        base_tile(*models, at, tile, base);
        delta_tile(*models, 0, at, tile, base, delta);
        band_keep(cursor, tile, delta, keep);
        for (int t = 0; t < tile; ++t) out[at + t] = static_cast<uint8_t>(keep[t] & 1u);
    }
}

void nonfinite(Array x, int64_t begin, int64_t count, int64_t* nan_and_inf) {
    for (int64_t done = 0; done < count; done += 1 << 20) {
        int64_t at = begin + done, stop = begin + smaller(count, done + (1 << 20));
        uint32_t nan = 0, inf = 0;
        if (x.dtype == kFloat32) {
            for (int64_t i = at; i < stop; ++i) {
                uint32_t key = bit_cast<uint32_t>(read_float(x.data, i)) & 0x7fffffffu;
                nan += key > kInfBits;
                inf += key == kInfBits;
            }
        } else {
            uint16_t limit = x.dtype == kBFloat16 ? 0x7f80u : 0x7c00u;
            for (int64_t i = at; i < stop; ++i) {
                uint16_t key = static_cast<uint16_t>(read_half(x.data, i) & 0x7fffu);
                nan += key > limit;
                inf += key == limit;
            }
        }
        nan_and_inf[0] += nan;
        nan_and_inf[1] += inf;
    }
}

void words(Stream stream, uint64_t first, int64_t count, uint32_t* out) {
    uint32_t buffer[kTile + kWordSlack];
    Words words(stream, first);
    for (int64_t done = 0; done < count; done += kTile) {
        int tile = static_cast<int>(smaller(kTile, count - done));
        uint64_t at = first + static_cast<uint64_t>(done);
        if (at % 4 == 0 && tile == kTile) {
            words.tile(at, tile, out + done);  // blocks and vectors end where the tile does
        } else {
            const uint32_t* word = words.tile(at, tile, buffer);
            for (int t = 0; t < tile; ++t) out[done + t] = word[t];
        }
    }
}

}  // namespace

void fill_select(cpu::Kernels& table) {
    table.keys = keys;
    table.collect = collect;
    table.count_key = count_key;
    table.count_ties = count_ties;
    table.key_histogram = key_histogram;
    table.raw_histogram = raw_histogram;
    table.mask = mask;
    table.nonfinite = nonfinite;
    table.words = words;
}

FM_NAMESPACE_END
