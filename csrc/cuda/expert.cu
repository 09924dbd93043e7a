// Light experts: values that are put into the rows of tensors and taken out again, of all tensors in one launch.
//
// A block takes some entries of one part, where an entry is a column of a row and what belongs there. Places are strewn
// over memory: what limits is how many of them are asked for at once, so a thread has several entries under way.
//
// Where experts meet in a tensor, a place can be in several parts. The last part that has it owns it: its thread looks
// the column up in the others, adds up what they have, keeps the old bits for all of them and writes the sum. So no
// place has two writers, and nobody reads what another thread writes.
#include "fastmerge/expert.h"

#include "cuda/api.h"
#include "cuda/tile.h"

FM_NAMESPACE_BEGIN
namespace cuda {
namespace {

constexpr int kTogether = 4;  // entries of a thread that are under way together

FM_INLINE int64_t column_size(const ExpertPart& part) { return part.columns_wide != 0 ? 4 : 2; }
FM_INLINE Array values_of(const ExpertPart& part) { return {part.values, static_cast<int32_t>(part.values_dtype)}; }
FM_INLINE Array base_of(const ExpertPart& part) { return {part.base, static_cast<int32_t>(part.base_dtype)}; }
FM_INLINE float scale_of(const ExpertPart& part) { return bit_cast<float>(static_cast<uint32_t>(part.scale)); }

// --- elements as they lie in memory, of 2 or 4 bytes, wherever that begins

FM_DEVICE bool lies_evenly(const void* data, int64_t size) {
    return (reinterpret_cast<uintptr_t>(data) & static_cast<uintptr_t>(size - 1)) == 0;
}

FM_DEVICE uint32_t load_bits(const void* data, int64_t size, int64_t i) {
    const char* from = static_cast<const char*>(data) + size * i;
    if (lies_evenly(data, size)) return size == 4 ? load4bytes(from) : load2bytes(from);
    uint32_t bits = 0;
    for (int b = 0; b < size; ++b) bits |= load_byte(from + b) << (8 * b);
    return bits;
}

// Several of them: what is asked is asked once, and no load waits for another.
FM_DEVICE void load_bits(const void* data, int64_t size, const int64_t* at, uint32_t* out) {
    const char* from = static_cast<const char*>(data);
    if (!lies_evenly(data, size)) {
        FM_UNROLL
        for (int e = 0; e < kTogether; ++e) out[e] = load_bits(data, size, at[e]);
    } else if (size == 4) {
        FM_UNROLL
        for (int e = 0; e < kTogether; ++e) out[e] = load4bytes(from + 4 * at[e]);
    } else {
        FM_UNROLL
        for (int e = 0; e < kTogether; ++e) out[e] = load2bytes(from + 2 * at[e]);
    }
}

FM_DEVICE void store_bits(void* data, int64_t size, int64_t i, uint32_t bits) {
    unsigned char* to = static_cast<unsigned char*>(data) + size * i;
    if (!lies_evenly(data, size)) {
        for (int b = 0; b < size; ++b) to[b] = static_cast<unsigned char>(bits >> (8 * b));
    } else if (size == 4) {
        store4bytes(to, bits);
    } else {
        store2bytes(to, bits);
    }
}

FM_INLINE float widened(uint32_t bits, int32_t dtype) {
    if (dtype == kFloat32) return bit_cast<float>(bits);
    uint16_t half = static_cast<uint16_t>(bits);
    return dtype == kBFloat16 ? widen_bfloat16(half) : widen_float16(half);
}

FM_DEVICE float load_value(Array x, int64_t i) { return widened(load_bits(x.data, dtype_size(x.dtype), i), x.dtype); }

// --- which entries

// The part that a block works for: of those with the first blocks up to this one the last. Each warp looks for itself,
// at 32 places at once.
FM_DEVICE int32_t part_of_block(const ExpertPart* parts, int32_t count) {
    int32_t low = 0, high = count;
    while (high - low > 1) {
        int32_t step = (high - low + 31) / 32, at = low + lane() * step;
        uint32_t before = ballot(at < high && parts[at].first_block <= block());
        low += (count_bits(before) - 1) * step;
        high = low + step < high ? low + step : high;
    }
    return low;
}

// The entry of a part in this row and column, or -1.
FM_DEVICE int64_t entry_at(const ExpertPart& part, int64_t row, uint32_t column) {
    int64_t low = row * part.kept, end = low + part.kept, high = end;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        bool before = load_bits(part.columns, column_size(part), middle) < column;
        low = before ? middle + 1 : low;
        high = before ? high : middle;
    }
    return low < end && load_bits(part.columns, column_size(part), low) == column ? low : -1;
}

// A block's entries of its part.
struct Some {
    int64_t first, end;  // in the part
    int64_t row;         // of the first one
    uint32_t place;      // of it in its row
};

FM_DEVICE Some some_of(const ExpertPart& part) {
    Some some;
    some.first = (block() - part.first_block) * kEntries;
    some.end = smaller(some.first + kEntries, part.entries);
    some.row = some.first / part.kept;
    some.place = static_cast<uint32_t>(some.first - some.row * part.kept);
    return some;
}

// An entry's row. In 32 bits, counted from the block's first row: to divide 64 takes far longer.
FM_DEVICE int64_t row_of(const ExpertPart& part, const Some& some, int64_t entry) {
    return some.row + (some.place + static_cast<uint32_t>(entry - some.first)) / static_cast<uint32_t>(part.kept);
}

// No place outside of a row is touched, whatever a column says.
FM_INLINE bool in_row(const ExpertPart& part, uint32_t column) { return column < static_cast<uint64_t>(part.width); }

// --- what is done

// kApply puts the parts on and keeps the old bits. kCount counts the places that hold something else than was put
// there. kRestore puts the old bits back.
enum Mode { kApply, kCount, kRestore };

// Whether no later part of the tensor has this place, too.
FM_DEVICE bool owns(const ExpertPart* parts, int32_t own, int64_t row, uint32_t column) {
    for (int64_t p = own + 1; p < parts[own].end; ++p) {
        if (entry_at(parts[p], row, column) >= 0) return false;
    }
    return true;
}

// What is put at the place of an entry, which owns it, from all parts that have it.
template <Mode kMode>
FM_DEVICE uint32_t sum_of_many(const ExpertPart* parts, int32_t own, int64_t entry, int64_t row, uint32_t column,
                               uint32_t old) {
    const ExpertPart& mine = parts[own];
    int32_t dtype = static_cast<int32_t>(mine.dtype);
    float total = widened(old, dtype);
    // The last part that replaces says what the sum starts from.
    for (int64_t p = mine.first; p <= own; ++p) {
        if (parts[p].base == nullptr) continue;
        int64_t at = p == own ? entry : entry_at(parts[p], row, column);
        if (at >= 0 && expert_replaces(load_value(values_of(parts[p]), at))) total = load_value(base_of(parts[p]), at);
    }
    for (int64_t p = mine.first; p <= own; ++p) {
        int64_t at = p == own ? entry : entry_at(parts[p], row, column);
        if (at < 0) continue;
        if (kMode == kApply) store_bits(parts[p].saved, dtype_size(dtype), at, old);
        total = expert_add(total, load_value(values_of(parts[p]), at), scale_of(parts[p]));
    }
    return rounded_bits(dtype, total);
}

// The places where several parts may meet; how many hold something else.
template <Mode kMode>
FM_DEVICE uint32_t some_of_many(const ExpertPart* parts, int32_t own) {
    const ExpertPart& part = parts[own];
    Some some = some_of(part);
    int64_t size = dtype_size(static_cast<int32_t>(part.dtype));
    uint32_t different = 0;
    for (int64_t entry = some.first + thread(); entry < some.end; entry += kThreads) {
        uint32_t column = load_bits(part.columns, column_size(part), entry);
        int64_t row = row_of(part, some, entry), at = row * part.width + column;
        if (!in_row(part, column) || !owns(parts, own, row, column)) continue;
        uint32_t old = kMode == kApply ? load_bits(part.data, size, at) : load_bits(part.saved, size, entry);
        uint32_t now = kMode == kRestore ? old : sum_of_many<kMode>(parts, own, entry, row, column, old);
        if (kMode == kCount) {
            different += load_bits(part.data, size, at) != now ? 1u : 0u;
        } else {
            store_bits(part.data, size, at, now);
        }
    }
    return different;
}

// The places of a part that is its tensor's only one.
template <Mode kMode>
FM_DEVICE uint32_t some_of_one(const ExpertPart& part) {
    Some some = some_of(part);
    int32_t dtype = static_cast<int32_t>(part.dtype);
    int64_t size = dtype_size(dtype);
    uint32_t different = 0;
    FM_ROLLED
    for (int64_t begin = some.first + thread(); begin < some.end; begin += kThreads * kTogether) {
        int64_t entry[kTogether], at[kTogether];
        uint32_t column[kTogether], value[kTogether], base[kTogether], old[kTogether], held[kTogether];
        FM_UNROLL
        for (int e = 0; e < kTogether; ++e) entry[e] = smaller(begin + e * kThreads, some.end - 1);
        load_bits(part.columns, column_size(part), entry, column);
        if (kMode != kRestore) load_bits(part.values, dtype_size(values_of(part).dtype), entry, value);
        bool replaces = kMode != kRestore && part.base != nullptr;
        if (replaces) load_bits(part.base, dtype_size(base_of(part).dtype), entry, base);
        if (kMode != kApply) load_bits(part.saved, size, entry, old);
        FM_UNROLL
        for (int e = 0; e < kTogether; ++e) {
            at[e] = row_of(part, some, entry[e]) * part.width + (in_row(part, column[e]) ? column[e] : 0u);
        }
        if (kMode != kRestore) load_bits(part.data, size, at, held);
        FM_UNROLL
        for (int e = 0; e < kTogether; ++e) {
            if (begin + e * kThreads >= some.end || !in_row(part, column[e])) continue;
            if (kMode == kRestore) {
                store_bits(part.data, size, at[e], old[e]);
                continue;
            }
            uint32_t before = kMode == kApply ? held[e] : old[e];
            float given = widened(value[e], values_of(part).dtype), start = widened(before, dtype);
            if (replaces && expert_replaces(given)) start = widened(base[e], base_of(part).dtype);
            uint32_t sum = rounded_bits(dtype, expert_add(start, given, scale_of(part)));
            if (kMode == kApply) {
                store_bits(part.saved, size, entry[e], before);
                store_bits(part.data, size, at[e], sum);
            } else {
                different += held[e] != sum ? 1u : 0u;
            }
        }
    }
    return different;
}

// changed: how many places of each tensor hold something else than was put there and, behind them, of all.
template <Mode kMode>
FM_KERNEL_RESIDENT(kThreads, 2)
expert_kernel(const ExpertPart* parts, int32_t count, int64_t* changed, int32_t tensors) {
    if (kMode == kRestore && changed[tensors] != 0) return;
    int32_t own = part_of_block(parts, count);
    const ExpertPart& part = parts[own];
    bool alone = part.end - part.first == 1;
    uint32_t different = alone ? some_of_one<kMode>(part) : some_of_many<kMode>(parts, own);
    if (kMode != kCount) return;
    different = sum_of_warp(different);
    if (lane() == 0 && different > 0) {
        atomic_add(&changed[part.tensor], static_cast<int64_t>(different));
        atomic_add(&changed[tensors], static_cast<int64_t>(different));
    }
}

}  // namespace

int expert_apply(Place place, const ExpertPart* parts, int32_t count, int64_t blocks) {
    int64_t* none = nullptr;
    return launch(expert_kernel<kApply>, blocks, kThreads, 0, place.stream, parts, count, none, 0);
}

int expert_revert(Place place, const ExpertPart* parts, int32_t count, int64_t blocks, int64_t* changed,
                  int32_t tensors) {
    int error = launch(expert_kernel<kCount>, blocks, kThreads, 0, place.stream, parts, count, changed, tensors);
    if (error != 0) return error;
    return launch(expert_kernel<kRestore>, blocks, kThreads, 0, place.stream, parts, count, changed, tensors);
}

}  // namespace cuda
FM_NAMESPACE_END
