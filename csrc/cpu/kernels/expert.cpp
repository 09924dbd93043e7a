// Kernels of the expert family: the few largest elements of rows, and values that are put into rows and taken out
// again.
#include "fastmerge/expert.h"

#include "cpu/kernels/select.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

FM_NAMESPACE_BEGIN
namespace {

using cpu::ExpertArgs;
using cpu::ExpertPart;

constexpr int64_t kGroup = 16;

// The columns of keys that are at least `low`, rising. `out` has room for kGroup more than there are.
int64_t at_least(const uint32_t* keys, int64_t count, uint32_t low, uint32_t* out) {
    int64_t found = 0;
    int64_t i = 0;
#if defined(__AVX512F__)
    __m512i lows = _mm512_set1_epi32(static_cast<int>(low));
    __m512i column = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (; i + kGroup <= count; i += kGroup) {
        __mmask16 in = _mm512_cmpge_epu32_mask(_mm512_loadu_si512(keys + i), lows);
        _mm512_storeu_si512(out + found, _mm512_maskz_compress_epi32(in, column));
        found += __builtin_popcount(in);
        column = _mm512_add_epi32(column, _mm512_set1_epi32(kGroup));
    }
#else
    // Few are: most groups are passed over by comparisons that the compiler vectorises.
    for (; i + kGroup <= count; i += kGroup) {
        uint32_t any = 0;
        for (int64_t t = 0; t < kGroup; ++t) any |= keys[i + t] >= low ? 1u : 0u;
        if (any == 0) continue;
        for (int64_t t = 0; t < kGroup; ++t) {
            out[found] = static_cast<uint32_t>(i + t);
            found += keys[i + t] >= low;
        }
    }
#endif
    for (; i < count; ++i) {
        out[found] = static_cast<uint32_t>(i);
        found += keys[i] >= low;
    }
    return found;
}

FM_INLINE float load_one(const void* data, int32_t dtype, int64_t i) {
    if (dtype == kFloat32) return read_float(data, i);
    uint16_t bits = read_half(data, i);
    return dtype == kBFloat16 ? widen_bfloat16(bits) : widen_float16(bits);
}

FM_INLINE uint32_t load_bits(const void* data, int32_t dtype, int64_t i) {
    return dtype == kFloat32 ? bit_cast<uint32_t>(read_float(data, i)) : read_half(data, i);
}

FM_INLINE void store_bits(void* data, int32_t dtype, int64_t i, uint32_t bits) {
    if (dtype == kFloat32) {
        memcpy(static_cast<char*>(data) + 4 * i, &bits, 4);
    } else {
        uint16_t half = static_cast<uint16_t>(bits);
        memcpy(static_cast<char*>(data) + 2 * i, &half, 2);
    }
}

FM_INLINE float from_bits(uint32_t bits, int32_t dtype) {
    if (dtype == kFloat32) return bit_cast<float>(bits);
    uint16_t half = static_cast<uint16_t>(bits);
    return dtype == kBFloat16 ? widen_bfloat16(half) : widen_float16(half);
}

FM_INLINE uint32_t rounded_bits(float value, int32_t dtype) {
    if (dtype == kFloat32) return bit_cast<uint32_t>(canonical(value));
    return dtype == kBFloat16 ? round_bfloat16(value) : round_float16(value);
}

// Elements begin + columns[i] of the first model's delta, in `dtype`.
void gather(const Models* models, int64_t begin, const uint32_t* columns, int64_t count, void* out, int32_t dtype) {
    for (int64_t i = 0; i < count; ++i) {
        int64_t at = begin + columns[i];
        float value = load_one(models->models[0].data, models->models[0].dtype, at);
        if (models->base.data != nullptr) value = value - load_one(models->base.data, models->base.dtype, at);
        store_bits(out, dtype, i, rounded_bits(value, dtype));
    }
}

FM_INLINE int64_t column_of(const ExpertPart& part, int64_t entry) {
    if (part.column_bytes == 2) return static_cast<const uint16_t*>(part.columns)[entry];
    return static_cast<const int32_t*>(part.columns)[entry];
}

// What the sum at a place starts from: the base's value where the expert replaces, else `otherwise`.
FM_INLINE float start_of(const ExpertPart& part, int64_t entry, float value, float otherwise) {
    bool replaced = part.base.data != nullptr && expert_replaces(value);
    return replaced ? load_one(part.base.data, part.base.dtype, entry) : otherwise;
}

// The places of a tensor are strewn over memory, far apart: those of the next row are asked for while this one is at
// work, or every place would wait for memory.
FM_INLINE void ask_for_row(const ExpertArgs& args, const ExpertPart& part, int64_t row) {
    if (row >= args.rows) return;
    const char* start = static_cast<const char*>(args.data) + row * args.width * dtype_size(args.dtype);
    for (int64_t j = 0; j < part.kept; ++j)
        __builtin_prefetch(start + column_of(part, row * part.kept + j) * dtype_size(args.dtype), 1);
}

// Rows with one expert. Writing keeps the old bits and puts the new ones; otherwise what differs from these is counted.
template <bool kWrite>
int64_t rows_of_one(const ExpertArgs& args, int64_t begin, int64_t end) {
    const ExpertPart& part = args.parts[0];
    int64_t different = 0;
    ask_for_row(args, part, begin);
    for (int64_t row = begin; row < end; ++row) {
        ask_for_row(args, part, row + 1);
        for (int64_t j = 0; j < part.kept; ++j) {
            int64_t entry = row * part.kept + j;
            int64_t at = row * args.width + column_of(part, entry);
            uint32_t old = kWrite ? load_bits(args.data, args.dtype, at) : load_bits(part.saved, args.dtype, entry);
            float theta = from_bits(old, args.dtype), value = load_one(part.values.data, part.values.dtype, entry);
            float start = start_of(part, entry, value, theta);
            uint32_t now = rounded_bits(expert_add(start, value, part.scale), args.dtype);
            if (kWrite) {
                store_bits(part.saved, args.dtype, entry, old);
                store_bits(args.data, args.dtype, at, now);
            } else {
                different += load_bits(args.data, args.dtype, at) != now;
            }
        }
    }
    return different;
}

// Rows with several experts: each row's places are added up in a row of float32, `total`, and `touched` says which they
// are; both are as they were, `touched` all 0, when a row is done.
template <bool kWrite>
int64_t rows_of_many(const ExpertArgs& args, int64_t begin, int64_t end, float* total, uint8_t* touched) {
    int64_t different = 0;
    auto over = [&](int64_t row, auto&& work) {
        for (int32_t p = 0; p < args.count; ++p) {
            const ExpertPart& part = args.parts[p];
            for (int64_t j = 0; j < part.kept; ++j) {
                int64_t entry = row * part.kept + j;
                work(part, entry, column_of(part, entry));
            }
        }
    };
    for (int32_t p = 0; p < args.count; ++p) ask_for_row(args, args.parts[p], begin);
    for (int64_t row = begin; row < end; ++row) {
        for (int32_t p = 0; p < args.count; ++p) ask_for_row(args, args.parts[p], row + 1);
        int64_t first = row * args.width;
        over(row, [&](const ExpertPart& part, int64_t entry, int64_t column) {
            uint32_t old =
                kWrite ? load_bits(args.data, args.dtype, first + column) : load_bits(part.saved, args.dtype, entry);
            if (kWrite) store_bits(part.saved, args.dtype, entry, old);
            if (touched[column] == 0) total[column] = from_bits(old, args.dtype);
            touched[column] = 1;
            float value = load_one(part.values.data, part.values.dtype, entry);
            total[column] = start_of(part, entry, value, total[column]);
        });
        over(row, [&](const ExpertPart& part, int64_t entry, int64_t column) {
            float value = load_one(part.values.data, part.values.dtype, entry);
            total[column] = expert_add(total[column], value, part.scale);
        });
        over(row, [&](const ExpertPart&, int64_t, int64_t column) {
            if (touched[column] == 0) return;
            touched[column] = 0;
            uint32_t now = rounded_bits(total[column], args.dtype);
            if (kWrite) {
                store_bits(args.data, args.dtype, first + column, now);
            } else {
                different += load_bits(args.data, args.dtype, first + column) != now;
            }
        });
    }
    return different;
}

void apply(const ExpertArgs* args, int64_t begin, int64_t end, float* total, uint8_t* touched) {
    if (args->count == 1) {
        rows_of_one<true>(*args, begin, end);
    } else {
        rows_of_many<true>(*args, begin, end, total, touched);
    }
}

int64_t changed(const ExpertArgs* args, int64_t begin, int64_t end, float* total, uint8_t* touched) {
    return args->count == 1 ? rows_of_one<false>(*args, begin, end)
                            : rows_of_many<false>(*args, begin, end, total, touched);
}

void restore(const ExpertArgs* args, int64_t begin, int64_t end) {
    for (int32_t p = 0; p < args->count; ++p) {
        const ExpertPart& part = args->parts[p];
        ask_for_row(*args, part, begin);
        for (int64_t row = begin; row < end; ++row) {
            ask_for_row(*args, part, row + 1);
            for (int64_t entry = row * part.kept; entry < (row + 1) * part.kept; ++entry) {
                uint32_t old = load_bits(part.saved, args->dtype, entry);
                store_bits(args->data, args->dtype, row * args->width + column_of(part, entry), old);
            }
        }
    }
}

uint32_t most_column(const ExpertPart* part, int64_t begin, int64_t end) {
    uint32_t most = 0;
    if (part->column_bytes == 2) {
        const uint16_t* columns = static_cast<const uint16_t*>(part->columns);
        uint16_t narrow = 0;
        for (int64_t i = begin; i < end; ++i) narrow = columns[i] > narrow ? columns[i] : narrow;
        most = narrow;
    } else {
        const uint32_t* columns = static_cast<const uint32_t*>(part->columns);
        for (int64_t i = begin; i < end; ++i) most = columns[i] > most ? columns[i] : most;
    }
    return most;
}

}  // namespace

void fill_expert(cpu::Kernels& table) {
    table.expert_at_least = at_least;
    table.expert_gather = gather;
    table.expert_apply = apply;
    table.expert_changed = changed;
    table.expert_restore = restore;
    table.expert_most_column = most_column;
}

FM_NAMESPACE_END
