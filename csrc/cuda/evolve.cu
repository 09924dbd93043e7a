// Trials of evolutionary search. A thread has eight elements of a tile; all of their parents are on their way before
// the random words are made, which takes longest.
#include "fastmerge/evolve.h"

#include "cuda/api.h"
#include "cuda/tile.h"

FM_NAMESPACE_BEGIN
namespace cuda {
namespace {

static_assert(kTile == kTrialTile, "tables are made of these tiles");

// The tensor that a block works for.
struct Own {
    const int64_t* addresses;  // nullptr: by value
    void* out;
    uint64_t tensor_id;
    int64_t numel, forced, first;  // first: the number of its first tile
};

FM_DEVICE Own own_tensor(const Trial& trial) {
    if (trial.table == nullptr) return {nullptr, trial.out, trial.tensor_id, trial.numel, trial.forced, 0};
    const int64_t* row = trial.table + static_cast<int64_t>(trial.tensor_of[block()]) * (kTrialRow + trial.count);
    return {row + kTrialRow, reinterpret_cast<void*>(row[1]), static_cast<uint64_t>(row[2]), row[0], row[3], row[4]};
}

FM_DEVICE Array parent(const Trial& trial, const Own& own, int32_t place) {
    Array x = trial.tensors[place];
    if (own.addresses != nullptr) x.data = reinterpret_cast<const void*>(own.addresses[place]);
    return x;
}

// Which of the elements at .. at + 7 cross over, a bit for each.
FM_DEVICE uint32_t crossing8(const Trial& trial, const Own& own, int64_t at) {
    uint32_t bits = 0;
    if ((trial.limit >> 32) != 0) {
        bits = 0xffu;
    } else if (trial.limit != 0) {
        uint64_t index = trial.offset + static_cast<uint64_t>(at);
        uint32_t lead = static_cast<uint32_t>(index & 3u), limit = static_cast<uint32_t>(trial.limit);
        PhiloxStream stream = philox_stream(trial.seed, own.tensor_id, trial.stream);
        int32_t count = lead == 0 ? 2 : 3;
        for (int32_t i = 0; i < count; ++i) {
            PhiloxBlock words = philox_at(stream, (index >> 2) + static_cast<uint64_t>(i));
            FM_UNROLL
            for (int t = 0; t < 4; ++t) bits |= (words.word[t] < limit ? 1u : 0u) << (4 * i + t);
        }
        bits = (bits >> lead) & 0xffu;
    }
    int64_t place = own.forced - at;
    return own.forced >= 0 && place >= 0 && place < kEach ? bits | 1u << place : bits;
}

template <int kParents>
FM_KERNEL(kThreads)
trial_kernel(FM_LARGE Trial trial) {
    Own own = own_tensor(trial);
    int64_t at = (block() - own.first) * kTile + thread() * kEach;
    if (at >= own.numel) return;
    Raw<true> raw[1 + kParents];
    load_raw<true>(parent(trial, own, 0), at, own.numel, false, raw[0]);
    FM_UNROLL
    for (int i = 1; i <= kParents; ++i) {
        int32_t place = trial.places[i - 1];
        if (place == 0) {
            raw[i] = raw[0];
        } else {
            load_raw<true>(parent(trial, own, place), at, own.numel, false, raw[i]);
        }
    }
    uint32_t bits = crossing8(trial, own, at);
    float mixed[kEach], plus[kEach], minus[kEach];
    int32_t dtype = trial.out_dtype, x_dtype = trial.tensors[0].dtype;
    widen_raw<true>(raw[1], trial.tensors[trial.places[0]].dtype, mixed);
    if (kParents == 1) {
        widen_raw<true>(raw[0], x_dtype, plus);
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) mixed[t] = blended(plus[t], mixed[t], trial.factors[0], trial.factors[1]);
    }
    FM_UNROLL
    for (int i = 2; i + 1 <= kParents; i += 2) {
        widen_raw<true>(raw[i], trial.tensors[trial.places[i - 1]].dtype, plus);
        widen_raw<true>(raw[i + 1], trial.tensors[trial.places[i]].dtype, minus);
        float factor = trial.factors[i / 2 - 1];
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) mixed[t] = with_difference(mixed[t], factor, plus[t], minus[t]);
    }
    uint32_t fresh[kEach] = {0, 0, 0, 0, 0, 0, 0, 0}, old[kEach] = {0, 0, 0, 0, 0, 0, 0, 0};
    pack8(dtype, mixed, fresh);
    if (x_dtype == dtype) {
        FM_UNROLL
        for (int i = 0; i < kEach; ++i) old[i] = raw[0].word[i];
    } else {
        widen_raw<true>(raw[0], x_dtype, plus);
        pack8(dtype, plus, old);
    }
    FM_UNROLL
    for (int i = 0; i < kEach; ++i) {
        uint32_t one = 0u - ((bits >> i) & 1u);
        uint32_t two = (0u - ((bits >> (2 * i)) & 1u)) >> 16 | (0u - ((bits >> (2 * i + 1)) & 1u)) << 16;
        uint32_t chosen = dtype == kFloat32 ? one : two;
        old[i] = (fresh[i] & chosen) | (old[i] & ~chosen);
    }
    store_packed8(own.out, dtype, at, own.numel, old);
}

}  // namespace

int trial(Place place, const Trial& trial, int64_t tiles) {
    if (trial.table == nullptr) tiles = (trial.numel + kTile - 1) / kTile;
    auto with = [&](void (*kernel)(Trial)) { return launch(kernel, tiles, kThreads, 0, place.stream, trial); };
    if (trial.kind == kBlend) return with(trial_kernel<1>);
    if (trial.differences == 1) return with(trial_kernel<3>);
    return with(trial.differences == 2 ? trial_kernel<5> : trial_kernel<7>);
}

}  // namespace cuda
FM_NAMESPACE_END
