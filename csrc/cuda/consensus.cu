// The merge itself: delta, mask, weight, election, disjoint sum, division, lambda, base, one rounding. Every input is
// read once, and nothing is stored but the result.
//
// With three models the election needs nearly as many instructions as a GPU has time for while the memory delivers.
// Hence the usual merge of up to four models has their deltas in registers; in any other the sums of those with a
// positive and of those with a negative sign are taken side by side, and at the end the vote picks one.
// Every sum runs over the models in the order given; nothing is fused. What does not take part adds 0.
#include "fastmerge/consensus.h"

#include <math.h>
#include <stddef.h>

#include "cuda/api.h"
#include "cuda/kept.h"

FM_NAMESPACE_BEGIN
namespace cuda {
namespace {

// A model as a block sees it.
struct Member {
    const void* data;  // from the part's first element on
    int32_t dtype;
    float weight, scale;
    Kept kept;
};

// What a block knows of its part of a tensor, in shared memory. Elements are counted from the part's first one.
struct Part {
    Array base;  // subtracted, added, or both
    void* out;
    int64_t begin;  // in the tensor
    int32_t length;
    int32_t place;   // of the first element in its tie block
    int32_t simple;  // all data begin at multiples of 16 bytes
    uint32_t partial[kWarps + 1];
    Member member[kMostModels];  // as many as there are
};

struct Merge {
    Models models;
    Rule rule;
    Formula formula;
    Array add;
    void* out;
    int32_t out_dtype;
    Tensors tensors;
    int64_t part;
};
static_assert(sizeof(Merge) <= 4096, "the parameters of a launch");

FM_INLINE bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

FM_INLINE bool subtracts(const Merge& merge) { return merge.models.base.data != nullptr; }
FM_INLINE bool adds(const Merge& merge) { return merge.add.data != nullptr; }

// What is the same for all tiles of a part. By the whole block.
FM_DEVICE void open_part(const Merge& merge, Part& part) {
    const Models& models = merge.models;
    int32_t n = models.count;
    Array base = adds(merge) ? merge.add : models.base;
    void* out = merge.out;
    int64_t numel = models.numel, number = block(), tensor = 0, first_block = 0, blocks = merge.rule.blocks;
    uint64_t tensor_id = merge.rule.tensor_id;
    const int64_t* row = nullptr;
    if (merge.tensors.table != nullptr) {
        tensor = merge.tensors.tensor_of[number];
        row = merge.tensors.table + tensor * (kTensorRow + n);
        numel = row[0];
        base.data = reinterpret_cast<const void*>(row[1]);
        out = reinterpret_cast<void*>(row[2]);
        tensor_id = static_cast<uint64_t>(row[3]);
        number -= row[4];
        first_block = row[5];
        blocks = tie_blocks(numel);
    }
    int64_t begin = number * merge.part, end = smaller(numel, begin + merge.part), tie_block = begin / kTieBlock;
    bool aligned = is_aligned(base.data), split = false;
    for (int32_t i = thread(); i < n; i += kThreads) {
        Member& member = part.member[i];
        Array x = {row == nullptr ? models.data[i] : reinterpret_cast<const void*>(row[kTensorRow + i]),
                   models.dtype[i]};
        member.data = from_element(x, begin).data;
        member.dtype = x.dtype;
        member.weight = merge.formula.weight[i];
        member.scale = merge.formula.scale[i];
        aligned = aligned && is_aligned(x.data);
        open_kept(merge.rule, i, merge.rule.bounds + 4 * (tensor * n + i),
                  merge.rule.ties_before + 2 * i * merge.rule.blocks + first_block + tie_block, tie_block + 1 >= blocks,
                  tensor_id, member.kept);
        split = split || member.kept.split != 0;
    }
    bool simple = !any_of_block(!aligned);
    if (thread() == 0) {
        part.base = from_element(base, begin);
        part.out = static_cast<char*>(out) + dtype_size(merge.out_dtype) * begin;
        part.begin = begin;
        part.length = static_cast<int32_t>(end - begin);
        part.place = static_cast<int32_t>(begin - tie_block * kTieBlock);
        part.simple = simple ? 1 : 0;
    }
    if (any_of_block(split)) {
        for (int32_t i = 0; i < n; ++i) {
            Member& member = part.member[i];
            if (member.kept.split == 0) continue;
            Array x = {member.data, member.dtype};
            find_cuts(part.base, subtracts(merge), x, models.compute, -part.place, part.length, member.kept,
                      part.partial);
        }
    }
}

FM_INLINE void multiply8(float factor, float* values) {
    FM_UNROLL
    for (int t = 0; t < kEach; ++t) values[t] = values[t] * factor;
}

// A model's values, made into its delta without what is not kept, scaled. bits: what is kept, unless a band says so.
template <bool kRounds>
FM_DEVICE void sparsify8(const Merge& merge, const Part& part, const Member& member, uint32_t bits, int32_t at,
                         const float* base, float* values) {
    int32_t compute = merge.models.compute;
    if (kRounds && member.dtype != compute) round8(compute, values);
    if (subtracts(merge)) {
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) values[t] = values[t] - base[t];
        if (kRounds) round8(compute, values);
    }
    if (merge.rule.method == kBand) {
        each_in_band(member.kept, part.place + at, values,
                     [&](int t, bool keep) { values[t] = keep ? values[t] : 0.0f; });
    } else if (merge.rule.method != kKeepAll) {
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) values[t] = (bits >> t) & 1u ? values[t] : 0.0f;
    }
    if (member.scale != 1.0f) {
        multiply8(member.scale, values);
        if (kRounds) round8(compute, values);
    }
}

// What is kept of the models first .. first + count - 1 where values do not say so: eight bits for each.
FM_DEVICE uint64_t decided_bits(const Merge& merge, const Part& part, int32_t first, int32_t count, int32_t at) {
    uint64_t bits = 0;
    if (merge.rule.method == kBernoulli || merge.rule.method == kMask) {
        // One model after the other, in a loop, for random words are many instructions.
        for (int32_t i = 0; i < count; ++i) {
            uint64_t own = kept_bits(merge.rule, part.member[first + i].kept, part.begin + at);
            bits |= own << (8 * i);
        }
    }
    return bits;
}

// total / divisor. A division takes far longer where its numerator is 0, as of dropped elements it is: there 1, with
// the sign of the 0, is divided, and of the result only the sign is taken. By bits, or else compilers divide the 0.
FM_INLINE float quotient(float total, float divisor, bool zeros_stay) {
    bool zero = zeros_stay && total == 0.0f;
    float numerator = bit_cast<float>(bit_cast<uint32_t>(total) | (zero ? 0x3f800000u : 0u));
    float divided = numerator / divisor;
    return bit_cast<float>(bit_cast<uint32_t>(divided) & (zero ? 0x80000000u : 0xffffffffu));
}

FM_INLINE bool divides_by_shares(const Formula& formula) {
    return formula.divisor == kDivideWeights || formula.divisor == kDivideCount;
}

FM_INLINE float share_of(const Formula& formula, const Member& member) {
    return formula.divisor == kDivideCount ? 1.0f : member.weight;
}

// Scales what was mixed, puts it on the base and stores it. base: as the compute dtype has it.
template <bool kRounds>
FM_DEVICE void finish8(const Merge& merge, const Part& part, int32_t at, const float* base, float* mixed) {
    int32_t compute = merge.models.compute;
    if (merge.formula.lambda != 1.0f) {
        multiply8(merge.formula.lambda, mixed);
        if (kRounds) round8(compute, mixed);
    }
    if (adds(merge)) {
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) mixed[t] = base[t] + mixed[t];
        if (kRounds) round8(compute, mixed);
    }
    store8(part.out, merge.out_dtype, at, part.length, mixed);
}

// The base as the compute dtype has it.
template <bool kGeneral>
FM_DEVICE void widen_base(const Merge& merge, const Part& part, const Raw<kGeneral>& raw, float* base) {
    widen_raw<kGeneral>(raw, part.base.dtype, base);
    if (kGeneral && part.base.dtype != merge.models.compute) round8(merge.models.compute, base);
}

// The values of `kCount` models from `first` on, or as many as there are, and of the base. Where all are simple no
// branch stands between the loads.
template <int kCount, bool kWide>
FM_DEVICE void load_members(const Part& part, int32_t first, int32_t n, bool has_base, int32_t at, Raw<kWide>* raw,
                            Raw<kWide>& raw_base) {
    auto load = [&](bool simple) {
        FM_UNROLL
        for (int i = 0; i < kCount; ++i) {
            if (first + i < n) {
                Array x = {part.member[first + i].data, part.member[first + i].dtype};
                load_raw<kWide>(x, at, part.length, simple, raw[i]);
            }
        }
        if (has_base) load_raw<kWide>(part.base, at, part.length, simple, raw_base);
    };
    if (part.simple != 0 && at + kEach <= part.length) {
        load(true);
    } else {
        load(false);
    }
}

// Calls use(member, values) with what takes part of each model's delta, in the models' order; base: the base's values.
template <bool kGeneral, class Use>
FM_DEVICE void each_delta(const Merge& merge, const Part& part, int32_t at, float* base, const Use& use) {
    constexpr int kGroup = kGeneral ? 2 : 4;  // models that are loaded together
    int32_t n = merge.models.count;
    bool has_base = subtracts(merge) || adds(merge);
    for (int32_t first = 0; first < n; first += kGroup) {
        Raw<kGeneral> raw[kGroup], raw_base;
        load_members<kGroup, kGeneral>(part, first, n, has_base && first == 0, at, raw, raw_base);
        if (has_base && first == 0) widen_base(merge, part, raw_base, base);
        int32_t count = n - first < kGroup ? n - first : kGroup;
        uint64_t bits = decided_bits(merge, part, first, count, at);
        FM_UNROLL
        for (int j = 0; j < kGroup; ++j) {
            if (j >= count) continue;
            const Member& member = part.member[first + j];
            float values[kEach];
            widen_raw<kGeneral>(raw[j], member.dtype, values);
            sparsify8<kGeneral>(merge, part, member, static_cast<uint32_t>(bits >> (8 * j)), at, base, values);
            use(member, values);
        }
    }
}

// --- the usual merge
//
// Up to four models of 16 bits, elected by their weighted deltas and divided by the weights, all positive, or the
// number of those that take part; float32 throughout.

template <int kMost>
FM_KERNEL_RESIDENT(kThreads, kMost == 4 ? 2 : 3)
merge_kernel(FM_LARGE Merge merge) {
    Part& part = shared<Part>();
    open_part(merge, part);
    const Formula& formula = merge.formula;
    int32_t n = merge.models.count;
    bool has_base = subtracts(merge) || adds(merge);
    float zero_sign = formula.zero_sign;
    for (int32_t at = thread() * kEach; at < part.length; at += kTile) {
        // All loads before the first use, so that they are under way together.
        Raw<false> raw[kMost], raw_base;
        load_members<kMost, false>(part, 0, n, has_base, at, raw, raw_base);
        uint64_t bits = decided_bits(merge, part, 0, n, at);
        float base[kEach], mixed[kEach], rows[kMost][kEach], share[kMost];
        if (has_base) widen_base(merge, part, raw_base, base);
        FM_UNROLL
        for (int i = 0; i < kMost; ++i) {
            share[i] = 1.0f;
            FM_UNROLL
            for (int t = 0; t < kEach; ++t) rows[i][t] = 0.0f;  // what changes no sum and takes no part
            if (i < n) {
                const Member& member = part.member[i];
                widen_raw<false>(raw[i], member.dtype, rows[i]);
                sparsify8<false>(merge, part, member, static_cast<uint32_t>(bits >> (8 * i)), at, base, rows[i]);
                if (member.weight != 1.0f) multiply8(member.weight, rows[i]);
                share[i] = share_of(formula, member);
            }
        }
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) {
            float sum = rows[0][t];
            FM_UNROLL
            for (int i = 1; i < kMost; ++i) sum = sum + rows[i][t];
            float elected = elected_sign(sum, zero_sign);
            // Turned by the elected sign, which is exact, what takes part is what is positive. Of NaN and 0 the greater
            // is 0.
            float turned = rows[0][t] * elected;
            float total = fmaxf(turned, 0.0f), divisor = turned > 0.0f ? share[0] : 0.0f;
            FM_UNROLL
            for (int i = 1; i < kMost; ++i) {
                turned = rows[i][t] * elected;
                total = total + fmaxf(turned, 0.0f);
                divisor = divisor + (turned > 0.0f ? share[i] : 0.0f);
            }
            // Where nobody takes part 1 is divided, which does not take long as 0 would, and turned to 0.
            bool nobody = divisor == 0.0f;
            float divided = (nobody ? 1.0f : total) / (nobody ? 1.0f : divisor);
            mixed[t] = divided * (nobody ? 0.0f : elected);
        }
        finish8<false>(merge, part, at, base, mixed);
    }
}

// --- without an election

// kGeneral: of any type, and rounded to any compute dtype.
template <bool kGeneral>
FM_KERNEL_RESIDENT(kThreads, 2)
sum_kernel(FM_LARGE Merge merge) {
    Part& part = shared<Part>();
    open_part(merge, part);
    const Formula& formula = merge.formula;
    int32_t compute = merge.models.compute;
    for (int32_t at = thread() * kEach; at < part.length; at += kTile) {
        float base[kEach], mixed[kEach];
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) mixed[t] = -0.0f;  // to which adding is exact for every value
        each_delta<kGeneral>(merge, part, at, base, [&](const Member& member, float* values) {
            multiply8(member.weight, values);
            if (kGeneral) round8(compute, values);
            FM_UNROLL
            for (int t = 0; t < kEach; ++t) mixed[t] = mixed[t] + values[t];
        });
        if (kGeneral) round8(compute, mixed);
        if (formula.divisor != kDivideNone) {
            FM_UNROLL
            for (int t = 0; t < kEach; ++t) {
                mixed[t] = quotient(mixed[t], formula.divisor_value, formula.zeros_stay != 0);
            }
            if (kGeneral) round8(compute, mixed);
        }
        finish8<kGeneral>(merge, part, at, base, mixed);
    }
}

// --- sums of both signs: any number of models, any election, any compute dtype

// kGeneral: as for sums.
template <bool kGeneral>
FM_KERNEL_RESIDENT(kThreads, 2)
merge_signs_kernel(FM_LARGE Merge merge) {
    Part& part = shared<Part>();
    open_part(merge, part);
    const Formula& formula = merge.formula;
    int32_t compute = merge.models.compute;
    bool weighted = formula.election == kElectWeighted, frequency = formula.election == kElectFrequency;
    for (int32_t at = thread() * kEach; at < part.length; at += kTile) {
        float base[kEach], votes[kEach];
        float above[kEach], above_share[kEach], below[kEach], below_share[kEach];
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) {
            votes[t] = above[t] = above_share[t] = below[t] = below_share[t] = 0.0f;
        }
        each_delta<kGeneral>(merge, part, at, base, [&](const Member& member, const float* values) {
            float terms[kEach], share = share_of(formula, member);
            FM_UNROLL
            for (int t = 0; t < kEach; ++t) terms[t] = values[t] * member.weight;
            if (kGeneral) round8(compute, terms);
            FM_UNROLL
            for (int t = 0; t < kEach; ++t) {
                float voter = weighted ? terms[t] : values[t];
                bool positive = voter > 0.0f, negative = voter < 0.0f;
                votes[t] = votes[t] + (frequency ? sign_of(voter) : voter);
                above[t] = above[t] + (positive ? terms[t] : 0.0f);
                below[t] = below[t] + (negative ? terms[t] : 0.0f);
                above_share[t] = above_share[t] + (positive ? share : 0.0f);
                below_share[t] = below_share[t] + (negative ? share : 0.0f);
            }
        });
        FM_UNROLL
        for (int t = 0; t < kEach; ++t) {
            float elected = elected_sign(votes[t], formula.zero_sign);
            votes[t] = elected > 0.0f ? above[t] : (elected < 0.0f ? below[t] : 0.0f);
            above_share[t] = elected > 0.0f ? above_share[t] : (elected < 0.0f ? below_share[t] : 0.0f);
        }
        if (kGeneral) round8(compute, votes);
        if (formula.divisor != kDivideNone) {
            bool shares = divides_by_shares(formula);
            if (kGeneral && formula.divisor == kDivideWeights) round8(compute, above_share);
            FM_UNROLL
            for (int t = 0; t < kEach; ++t) {
                float divisor = above_share[t] == 0.0f ? 1.0f : above_share[t];
                votes[t] = quotient(votes[t], shares ? divisor : formula.divisor_value, formula.zeros_stay != 0);
            }
            if (kGeneral) round8(compute, votes);
        }
        finish8<kGeneral>(merge, part, at, base, votes);
    }
}

// --- which kernel

int launch_parts(const Merge& merge, int64_t grid, void* stream) {
    int32_t n = merge.models.count;
    size_t bytes = offsetof(Part, member) + sizeof(Member) * static_cast<size_t>(n);
    auto with = [&](void (*kernel)(Merge)) { return launch(kernel, grid, kThreads, bytes, stream, merge); };
    bool rounds = merge.models.compute != kFloat32;
    bool wide =
        (adds(merge) && merge.add.dtype == kFloat32) || (subtracts(merge) && merge.models.base.dtype == kFloat32);
    for (int32_t i = 0; i < n; ++i) wide = wide || merge.models.dtype[i] == kFloat32;
    if (merge.formula.election == kElectNone) return with(rounds || wide ? sum_kernel<true> : sum_kernel<false>);
    if (rounds || wide) return with(merge_signs_kernel<true>);
    bool usual = merge.formula.election == kElectWeighted && divides_by_shares(merge.formula);
    if (n > 4 || !usual || merge.formula.zeros_stay == 0) return with(merge_signs_kernel<false>);
    if (n == 4) return with(merge_kernel<4>);
    return with(n == 3 ? merge_kernel<3> : merge_kernel<2>);
}

}  // namespace

int64_t part_of(int64_t numel) { return part_of_so_many(numel, processors()); }

int consensus_apply(Place place, const Models& models, const Rule& rule, const Formula& formula, Array add, void* out,
                    int32_t out_dtype) {
    int64_t part = part_of(models.numel);
    Merge merge = {models, rule, formula, add, out, out_dtype, {nullptr, nullptr}, part};
    return launch_parts(merge, (models.numel + part - 1) / part, place.stream);
}

int consensus_apply_many(Place place, const Models& models, const Rule& rule, const Formula& formula, Array add,
                         int32_t out_dtype, const Tensors& tensors, int64_t parts, int64_t part) {
    Merge merge = {models, rule, formula, add, nullptr, out_dtype, tensors, part};
    return launch_parts(merge, parts, place.stream);
}

}  // namespace cuda
FM_NAMESPACE_END
