// Inner products: a warp takes one block of a row, and each of its threads two lanes. Up to four models are multiplied
// with each other, or with up to four others, while all sums stay in registers; more models take several launches.
#include "fastmerge/geometry.h"

#include "cuda/api.h"
#include "cuda/tile.h"

FM_NAMESPACE_BEGIN
namespace cuda {
namespace {

constexpr int kGroup = 4;                // models of a launch, on each side
constexpr int kSteps = 4;                // steps whose loads are under way together
constexpr int kStep = kGramLanes;        // elements of a step
constexpr int kLanes = kGramLanes / 32;  // of a thread: its own place, and those 32 further on
constexpr int kSpan = kSteps * kStep;
static_assert(kGramBlock % kSpan == 0, "a block is made of whole spans");

struct GramArgs {
    Models models;
    int64_t row_length, in_row, blocks;  // in_row: blocks of a row; blocks: of all rows
    int32_t left, right;                 // the first model of each side
    double* out;                         // [pairs, blocks]
};

// What a thread multiplies of one tensor: its elements of a span, 0 past the end.
struct Part {
    float value[kSteps][kLanes];
};

FM_DEVICE void load_part(Array x, int64_t at, int64_t end, Part& part) {
    uint32_t bits[kSteps][kLanes];
    FM_UNROLL
    for (int step = 0; step < kSteps; ++step) {
        FM_UNROLL
        for (int half = 0; half < kLanes; ++half) {
            int64_t i = at + step * kStep + half * 32;
            bits[step][half] = i < end ? bits_at(x, i) : 0u;
        }
    }
    FM_UNROLL
    for (int step = 0; step < kSteps; ++step) {
        FM_UNROLL
        for (int half = 0; half < kLanes; ++half) part.value[step][half] = widened(bits[step][half], x.dtype);
    }
}

FM_DEVICE void load_delta(const Models& models, int32_t m, int64_t at, int64_t end, const Part& base, Part& part) {
    load_part(model_of(models, m), at, end, part);
    if (models.base.data == nullptr) return;
    FM_UNROLL
    for (int step = 0; step < kSteps; ++step) {
        FM_UNROLL
        for (int half = 0; half < kLanes; ++half)
            part.value[step][half] = part.value[step][half] - base.value[step][half];
    }
}

FM_DEVICE void add_products(const Part& x, const Part& y, double* sums) {
    FM_UNROLL
    for (int step = 0; step < kSteps; ++step) {
        FM_UNROLL
        for (int half = 0; half < kLanes; ++half) {
            double product = static_cast<double>(x.value[step][half]) * static_cast<double>(y.value[step][half]);
            sums[half] = sums[half] + product;
        }
    }
}

// The upper half of the lanes is added to the lower half, until one is left.
FM_DEVICE double folded(const double* sums) {
    double sum = sums[0] + sums[1];
    FM_UNROLL
    for (int half = 16; half > 0; half /= 2) sum = sum + from_across(sum, half);
    return canonical_double(sum);
}

// kRight 0: models left .. left + kLeft - 1 with each other; else all pairs of these and right .. right + kRight - 1.
template <int kLeft, int kRight>
FM_KERNEL(kThreads)
gram_kernel(FM_LARGE GramArgs args) {
    constexpr int kColumns = kRight == 0 ? kLeft : kRight;
    int64_t number = block() * kWarps + thread() / 32;
    if (number >= args.blocks) return;
    int64_t row = number / args.in_row;
    int64_t begin = row * args.row_length + (number - row * args.in_row) * kGramBlock;
    int64_t end = smaller(begin + kGramBlock, (row + 1) * args.row_length);
    double sums[kLeft][kColumns][kLanes] = {};
    FM_ROLLED
    for (int64_t at = begin; at < end; at += kSpan) {
        Part base, left[kLeft];
        if (args.models.base.data != nullptr) load_part(args.models.base, at + lane(), end, base);
        FM_UNROLL
        for (int i = 0; i < kLeft; ++i) load_delta(args.models, args.left + i, at + lane(), end, base, left[i]);
        FM_UNROLL
        for (int j = 0; j < kColumns; ++j) {
            if (kRight == 0) {
                FM_UNROLL
                for (int i = 0; i <= j && i < kLeft; ++i) add_products(left[i], left[j < kLeft ? j : 0], sums[i][j]);
            } else {
                Part right;
                load_delta(args.models, args.right + j, at + lane(), end, base, right);
                FM_UNROLL
                for (int i = 0; i < kLeft; ++i) add_products(left[i], right, sums[i][j]);
            }
        }
    }
    FM_UNROLL
    for (int i = 0; i < kLeft; ++i) {
        FM_UNROLL
        for (int j = kRight == 0 ? i : 0; j < kColumns; ++j) {
            double sum = folded(sums[i][j]);
            int64_t pair = gram_pair(args.left + i, (kRight == 0 ? args.left : args.right) + j, args.models.count);
            if (lane() == 0) args.out[pair * args.blocks + number] = sum;
        }
    }
}

template <int kLeft, int kRight>
int launch_gram(Place place, const GramArgs& args) {
    return launch(gram_kernel<kLeft, kRight>, (args.blocks + kWarps - 1) / kWarps, kThreads, 0, place.stream, args);
}

int among(Place place, const GramArgs& args, int32_t count) {
    switch (count) {
        case 1:
            return launch_gram<1, 0>(place, args);
        case 2:
            return launch_gram<2, 0>(place, args);
        case 3:
            return launch_gram<3, 0>(place, args);
        default:
            return launch_gram<kGroup, 0>(place, args);
    }
}

int between(Place place, const GramArgs& args, int32_t count) {
    switch (count) {
        case 1:
            return launch_gram<kGroup, 1>(place, args);
        case 2:
            return launch_gram<kGroup, 2>(place, args);
        case 3:
            return launch_gram<kGroup, 3>(place, args);
        default:
            return launch_gram<kGroup, kGroup>(place, args);
    }
}

}  // namespace

int gram(Place place, const Models& models, int64_t row_length, double* out) {
    int64_t in_row = gram_blocks(row_length);
    GramArgs args = {models, row_length, in_row, models.numel / row_length * in_row, 0, 0, out};
    for (args.left = 0; args.left < models.count; args.left += kGroup) {
        int error = among(place, args, models.count - args.left);
        for (args.right = args.left + kGroup; error == 0 && args.right < models.count; args.right += kGroup)
            error = between(place, args, models.count - args.right);
        if (error != 0) return error;
    }
    return 0;
}

}  // namespace cuda
FM_NAMESPACE_END
