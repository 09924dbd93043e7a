// Kernels of the evolve family: random words of a tile, then what would be put in x's place, and a choice between the
// two.
#include "fastmerge/evolve.h"

#include "cpu/kernels/select.h"
#include "cpu/kernels/words.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

FM_NAMESPACE_BEGIN
namespace {

using cpu::TrialArgs;

// Words below the limit cross over; where all elements do or none does, words are made up.
inline bool is_drawn(const TrialArgs& args) { return args.limit != 0 && (args.limit >> 32) == 0; }
inline uint32_t made_up(const TrialArgs& args) { return args.limit == 0 ? 1u : 0u; }
inline uint32_t word_limit(const TrialArgs& args) { return is_drawn(args) ? static_cast<uint32_t>(args.limit) : 1u; }

// --- any tensors, step by step

inline const uint32_t* crossing_tile(const TrialArgs& args, Words& words, int64_t begin, int count, uint32_t* buffer) {
    int64_t lead = 0, place = args.forced - begin;
    if (is_drawn(args)) {
        lead = words.tile(args.offset + static_cast<uint64_t>(begin), count, buffer) - buffer;
    } else {
        for (int t = 0; t < count; ++t) buffer[t] = made_up(args);
    }
    if (args.forced >= 0 && place >= 0 && place < count) buffer[lead + place] = 0;
    return buffer + lead;
}

// What crossing over puts in the tile's place.
inline void mixed_tile(const TrialArgs& args, int64_t begin, int count, float* __restrict mixed, float* __restrict plus,
                       float* __restrict minus) {
    if (args.kind == kBlend) {
        float own = args.factors[0], other = args.factors[1];
        load_tile(args.tensors[0], begin, count, mixed);
        load_tile(args.tensors[args.places[0]], begin, count, plus);
        for (int t = 0; t < count; ++t) mixed[t] = blended(mixed[t], plus[t], own, other);
        return;
    }
    load_tile(args.tensors[args.places[0]], begin, count, mixed);
    for (int32_t d = 0; d < args.differences; ++d) {
        float factor = args.factors[d];
        // Of a tensor that comes again the tile is in the first-level cache.
        load_tile(args.tensors[args.places[2 * d + 1]], begin, count, plus);
        load_tile(args.tensors[args.places[2 * d + 2]], begin, count, minus);
        for (int t = 0; t < count; ++t) mixed[t] = with_difference(mixed[t], factor, plus[t], minus[t]);
    }
}

inline void step_by_step(const TrialArgs& args, Words& words, int64_t begin, int64_t end) {
    float mixed[kTile], plus[kTile], minus[kTile];
    uint32_t buffer[kTile + kWordSlack], fresh[kTile], old[kTile];
    uint16_t fresh_half[kTile], old_half[kTile];
    Array x = args.tensors[0];
    int32_t dtype = args.out_dtype;
    uint32_t limit = word_limit(args);
    size_t size = static_cast<size_t>(dtype_size(dtype));
    for (int64_t at = begin; at < end; at += kTile) {
        int count = static_cast<int>(smaller(kTile, end - at));
        size_t bytes = size * static_cast<size_t>(count);
        const uint32_t* word = crossing_tile(args, words, at, count, buffer);
        mixed_tile(args, at, count, mixed, plus, minus);
        void* own = dtype == kFloat32 ? static_cast<void*>(old) : old_half;
        void* made = dtype == kFloat32 ? static_cast<void*>(fresh) : fresh_half;
        store_tile(made, dtype, 0, count, mixed);
        if (x.dtype == dtype) {
            memcpy(own, static_cast<const char*>(x.data) + static_cast<int64_t>(size) * at, bytes);
        } else {
            load_tile(x, at, count, plus);
            store_tile(own, dtype, 0, count, plus);
        }
        // All of the tile is read by now: the result may be one of its tensors.
        if (dtype == kFloat32) {
            for (int t = 0; t < count; ++t) old[t] = word[t] < limit ? fresh[t] : old[t];
        } else {
            for (int t = 0; t < count; ++t) old_half[t] = word[t] < limit ? fresh_half[t] : old_half[t];
        }
        memcpy(static_cast<char*>(args.out) + static_cast<int64_t>(size) * at, own, bytes);
    }
}

// --- tensors that are all bfloat16, two elements in a 32-bit word

constexpr int kPairs = kPairsTogether;           // of a tile
constexpr int64_t kAhead = 2048;                 // bytes: how long before its use memory is told to fetch a tile
constexpr int64_t kUncached = int64_t{1} << 23;  // bytes of a result that no cache keeps until it is read again

FM_INLINE uint32_t read_pair(const char* data, int64_t pair) {
    uint32_t value;
    memcpy(&value, data + 4 * pair, 4);
    return value;
}

FM_INLINE float first_of(uint32_t pair) { return bit_cast<float>(pair << 16); }
FM_INLINE float second_of(uint32_t pair) { return bit_cast<float>(pair & 0xffff0000u); }

// As round_bfloat16, but in the upper half, and not of NaN.
FM_INLINE uint32_t rounded_above(float value) {
    uint32_t bits = bit_cast<uint32_t>(value);
    return bits + 0x7fffu + ((bits >> 16) & 1u);
}

// Writes a tile past the caches, which need not read first what is overwritten as a whole.
inline void put_uncached(const uint32_t* from, char* to) {
#if defined(__AVX512F__)
    for (int t = 0; t < kPairs; t += 16) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + 4 * t), _mm512_loadu_si512(from + t));
    }
#elif defined(__SSE2__)
    for (int t = 0; t < kPairs; t += 4) {
        __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + t));
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + 4 * t), four);
    }
#else
    memcpy(to, from, 4 * kPairs);
#endif
}

// Whole tiles from `begin` on, of which the end is returned.
template <int kDifferences>
inline int64_t in_pairs(const TrialArgs& args, Words& words, int64_t begin, int64_t end) {
    alignas(64) uint32_t evens[kPairs], odds[kPairs], chosen[kPairs];
    const char* tensors[2 + 2 * kDifferences];
    tensors[0] = static_cast<const char*>(args.tensors[0].data);
    for (int i = 0; i < 1 + 2 * kDifferences; ++i) {
        tensors[i + 1] = static_cast<const char*>(args.tensors[args.places[i]].data);
    }
    const char* x = tensors[0];
    char* out = static_cast<char*>(args.out);
    bool uncached = 2 * args.numel >= kUncached && reinterpret_cast<uint64_t>(out + 2 * begin) % 64 == 0;
    for (const char* each : tensors) uncached = uncached && each != out;
    uint32_t limit = word_limit(args);
    int64_t at = begin;
    for (; at + 2 * kPairs <= end; at += 2 * kPairs) {
        // As many lines as the tile's words take to be made, or memory would wait, and then words.
        for (int byte = 0; byte < 4 * kPairs; byte += 64) {
            for (const char* each : tensors) __builtin_prefetch(each + 2 * at + kAhead + byte);
        }
        if (is_drawn(args)) {
            words.tile_of_pairs(args.offset + static_cast<uint64_t>(at), kPairs, evens, odds);
        } else {
            for (int t = 0; t < kPairs; ++t) evens[t] = odds[t] = made_up(args);
        }
        int64_t place = args.forced - at;
        if (args.forced >= 0 && place >= 0 && place < 2 * kPairs) (place % 2 == 0 ? evens : odds)[place / 2] = 0;
        uint32_t nan = 0;
        for (int t = 0; t < kPairs; ++t) {
            uint32_t own = read_pair(x + 2 * at, t), other = read_pair(tensors[1] + 2 * at, t);
            float first = first_of(other), second = second_of(other);
            if (kDifferences == 0) {
                first = blended(first_of(own), first, args.factors[0], args.factors[1]);
                second = blended(second_of(own), second, args.factors[0], args.factors[1]);
            }
            for (int d = 0; d < kDifferences; ++d) {
                uint32_t plus = read_pair(tensors[2 * d + 2] + 2 * at, t);
                uint32_t minus = read_pair(tensors[2 * d + 3] + 2 * at, t);
                first = with_difference(first, args.factors[d], first_of(plus), first_of(minus));
                second = with_difference(second, args.factors[d], second_of(plus), second_of(minus));
            }
            nan = __builtin_isunordered(first, second) ? 1u : nan;
            uint32_t low = evens[t] < limit ? rounded_above(first) : own << 16;
            uint32_t high = odds[t] < limit ? rounded_above(second) : own;
            chosen[t] = (low >> 16) | (high & 0xffff0000u);
        }
        // All of the tile is read by now: the result may be one of its tensors.
        if (nan != 0) {
            step_by_step(args, words, at, at + 2 * kPairs);
        } else if (uncached) {
            put_uncached(chosen, out + 2 * at);
        } else {
            memcpy(out + 2 * at, chosen, sizeof(chosen));
        }
    }
#if defined(__SSE2__)
    if (uncached) _mm_sfence();  // before other threads read it
#endif
    return at;
}

void trial(const TrialArgs* args, int64_t begin, int64_t end) {
    Words words(args->stream, args->offset + static_cast<uint64_t>(begin));
    int parents = args->kind == kBlend ? 1 : 1 + 2 * args->differences;
    bool pairs = args->tensors[0].dtype == kBFloat16 && args->out_dtype == kBFloat16;
    for (int i = 0; i < parents; ++i) pairs = pairs && args->tensors[args->places[i]].dtype == kBFloat16;
    if (pairs && (args->offset + static_cast<uint64_t>(begin)) % 4 == 0) {
        if (parents == 1) begin = in_pairs<0>(*args, words, begin, end);
        if (parents == 3) begin = in_pairs<1>(*args, words, begin, end);
        if (parents == 5) begin = in_pairs<2>(*args, words, begin, end);
        if (parents == 7) begin = in_pairs<3>(*args, words, begin, end);
    }
    step_by_step(*args, words, begin, end);
}

}  // namespace

void fill_evolve(cpu::Kernels& table) { table.trial = trial; }

FM_NAMESPACE_END
