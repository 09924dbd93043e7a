// Kernels of the evolve family: random words of a tile, what would be put in x's place, and a choice between the two.
#include "fastmerge/evolve.h"

#include "cpu/kernels/select.h"
#include "cpu/kernels/words.h"

FM_NAMESPACE_BEGIN
namespace {

using cpu::TrialArgs;

// cross[t] = all ones or 0
inline void cross_tile(const TrialArgs& args, int64_t begin, int count, uint32_t* buffer, uint32_t* __restrict cross) {
    if ((args.limit >> 32) != 0) {
        for (int t = 0; t < count; ++t) cross[t] = 0xffffffffu;
    } else if (args.limit == 0) {
        for (int t = 0; t < count; ++t) cross[t] = 0u;
    } else {
        const uint32_t* word = word_tile(args.stream, args.offset + static_cast<uint64_t>(begin), count, buffer);
        uint32_t limit = static_cast<uint32_t>(args.limit);
        for (int t = 0; t < count; ++t) cross[t] = word[t] < limit ? 0xffffffffu : 0u;
    }
    int64_t place = args.forced - begin;
    if (args.forced >= 0 && place >= 0 && place < count) cross[place] = 0xffffffffu;
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

void trial(const TrialArgs* args, int64_t begin, int64_t end) {
    float mixed[kTile], plus[kTile], minus[kTile];
    uint32_t cross[kTile], buffer[kTile + kWordSlack], fresh[kTile], old[kTile];
    uint16_t fresh_half[kTile], old_half[kTile];
    Array x = args->tensors[0];
    int32_t dtype = args->out_dtype;
    size_t size = static_cast<size_t>(dtype_size(dtype));
    for (int64_t at = begin; at < end; at += kTile) {
        int count = static_cast<int>(smaller(kTile, end - at));
        size_t bytes = size * static_cast<size_t>(count);
        cross_tile(*args, at, count, buffer, cross);
        mixed_tile(*args, at, count, mixed, plus, minus);
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
            for (int t = 0; t < count; ++t) old[t] = (fresh[t] & cross[t]) | (old[t] & ~cross[t]);
        } else {
            for (int t = 0; t < count; ++t) {
                uint16_t chosen = static_cast<uint16_t>(cross[t]);
                old_half[t] = static_cast<uint16_t>((fresh_half[t] & chosen) | (old_half[t] & ~chosen));
            }
        }
        memcpy(static_cast<char*>(args->out) + static_cast<int64_t>(size) * at, own, bytes);
    }
}

}  // namespace

void fill_evolve(cpu::Kernels& table) { table.trial = trial; }

FM_NAMESPACE_END
