// The frequency filter's products and its mask; the transforms are a library's.
//
// Of a matrix with an even number of rows the rows j and j + H / 2 make a pair: what belongs to even frequencies is
// the same in both, what belongs to odd ones the negative. So bases have half as many rows, for sums and for
// differences of pairs: the two classes. An odd number of rows has one class, and a row is its own pair.
//
// The values of a thread's part of a product stay in registers, 64 of them, and both factors come from shared memory,
// 16 bytes at once: a multiply-add needs an eighth of an instruction to get its numbers. What is read of the matrix is
// on its way while what was read before is multiplied. This family alone fuses multiplications and additions: its
// results are within a tolerance, and no sum of a product is the same on all backends.
#include "cuda/api.h"
#include "cuda/tile.h"

FM_NAMESPACE_BEGIN
namespace cuda {
namespace {

struct alignas(16) Four {
    float v[4];
};

FM_INLINE int64_t at_least_one(int64_t n) { return n < 1 ? 1 : n; }
FM_INLINE int64_t pieces(int64_t n, int64_t each) { return (n + each - 1) / each; }

FM_INLINE int64_t pair_rows(const Filtered& x) { return x.height / x.classes; }

// Sixteen bytes of shared memory, or of float32 numbers in the device's that begin at a multiple of 16.
FM_DEVICE Four four_at(const float* from) { return *reinterpret_cast<const Four*>(from); }
FM_DEVICE void put_four(float* to, const Four& four) { *reinterpret_cast<Four*>(to) = four; }

// Four neighbours of a row as they lie in memory, of 16 bits or (kWide) 32.
template <bool kWide>
struct RawFour {
    uint32_t word[kWide ? 4 : 2];
};

// Elements at .. at + 3 of a row of `width`, 0 past its end. aligned: all rows begin at a multiple of four elements'
// size, and have a multiple of four.
template <bool kWide>
FM_DEVICE void load_four(const void* row, int32_t at, int32_t width, bool aligned, RawFour<kWide>& out) {
    const char* from = static_cast<const char*>(row) + static_cast<int64_t>(at) * (kWide ? 4 : 2);
    FM_UNROLL
    for (int i = 0; i < (kWide ? 4 : 2); ++i) out.word[i] = 0;
    if (aligned) {
        if (at >= width) return;
        if (kWide) {
            Words4 words = load16again(from);
            FM_UNROLL
            for (int i = 0; i < 4; ++i) out.word[kWide ? i : 0] = words.word[i];
        } else {
            Words2 words = load8bytes(from);
            out.word[0] = words.word[0];
            out.word[1] = words.word[1];
        }
        return;
    }
    FM_UNROLL
    for (int i = 0; i < 4; ++i) {
        if (at + i >= width) continue;
        if (kWide) {
            out.word[kWide ? i : 0] = load4bytes(from + 4 * i);
        } else {
            out.word[i / 2] |= load2bytes(from + 2 * i) << (16 * (i % 2));
        }
    }
}

template <bool kWide>
FM_DEVICE Four widened(const RawFour<kWide>& raw, int32_t dtype) {
    Four four;
    FM_UNROLL
    for (int i = 0; i < 4; ++i) {
        uint32_t bits = kWide ? raw.word[kWide ? i : 0] : raw.word[i / 2] >> (16 * (i % 2)) & 0xffffu;
        uint16_t half = static_cast<uint16_t>(bits);
        four.v[i] = kWide ? bit_cast<float>(bits) : dtype == kBFloat16 ? widen_bfloat16(half) : widen_float16(half);
    }
    return four;
}

template <bool kWide>
FM_DEVICE void store_four(void* row, int32_t at, int32_t width, bool aligned, int32_t dtype, const Four& four) {
    char* to = static_cast<char*>(row) + static_cast<int64_t>(at) * (kWide ? 4 : 2);
    uint32_t bits[4];
    FM_UNROLL
    for (int i = 0; i < 4; ++i) bits[i] = rounded_bits(kWide ? kFloat32 : dtype, four.v[i]);
    if (!aligned) {
        FM_UNROLL
        for (int i = 0; i < 4; ++i) {
            if (at + i >= width) break;
            if (kWide) {
                store4bytes(to + 4 * i, bits[i]);
            } else {
                store2bytes(to + 2 * i, bits[i]);
            }
        }
    } else if (at < width) {
        if (kWide) {
            Words4 words = {{bits[0], bits[1], bits[2], bits[3]}};
            store16(to, words);
        } else {
            uint32_t low = bits[0] | bits[1] << 16, high = bits[2] | bits[3] << 16;
            store8bytes(to, low | static_cast<uint64_t>(high) << 32);
        }
    }
}

FM_INLINE bool fours_are_aligned(const void* data, int64_t width, int64_t size) {
    return width % 4 == 0 && reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(4 * size) == 0;
}

// --- project: the basis times the matrix

constexpr int kColumns = 64;                       // of a block's tile
constexpr int kVectors = 8;                        // of a basis that a thread takes, a group
constexpr int kGroupsOnce = 8;                     // groups that a block takes
constexpr int kSlots = kThreads / (kColumns / 8);  // of eight threads each, who share a group and have all columns
constexpr int kStaged = 32;                        // pairs of rows in shared memory

struct ProjectShared {
    float part[2][kStaged][kColumns];  // sums and differences of the pairs; sums of slices at the end
    float basis[kStaged][kGroupsOnce * kVectors];
};

struct Project {
    Filtered x;
    float* out;      // [splits, n, r, W]
    int64_t splits;  // of the pairs of rows, among blocks
    int32_t aligned, aligned_out;
};

FM_INLINE int32_t groups_of(int32_t rank) { return (rank + kVectors - 1) / kVectors; }
FM_INLINE int32_t all_groups(const Filtered& x) { return groups_of(x.rank[0]) + groups_of(x.rank[1]); }

// The class of a group, and its first vector there.
FM_INLINE int32_t class_of(const Filtered& x, int32_t group) { return group >= groups_of(x.rank[0]) ? 1 : 0; }
FM_INLINE int32_t first_vector(const Filtered& x, int32_t group) {
    return (group - (class_of(x, group) == 1 ? groups_of(x.rank[0]) : 0)) * kVectors;
}

// What a thread brings into shared memory of the next pairs of rows.
template <bool kWide>
struct Fetched {
    static constexpr int kX = kStaged * kColumns / 4 / kThreads;                // fours of each half
    static constexpr int kBasis = kStaged * kGroupsOnce * kVectors / kThreads;  // numbers
    RawFour<kWide> upper[kX], lower[kX];
    float basis[kBasis];
};

// Where a block works.
struct ProjectPlace {
    int64_t matrix, split;
    int32_t column, group;  // the first ones
    int32_t groups;
};

FM_DEVICE ProjectPlace project_place(const Project& args) {
    int64_t tiles = pieces(args.x.width, kColumns), chunks = pieces(all_groups(args.x), kGroupsOnce);
    int64_t number = block() / tiles;
    ProjectPlace place;
    place.column = static_cast<int32_t>(block() % tiles) * kColumns;
    place.group = static_cast<int32_t>(number % chunks) * kGroupsOnce;
    place.groups = static_cast<int32_t>(smaller(all_groups(args.x) - place.group, kGroupsOnce));
    place.split = number / chunks % args.splits;
    place.matrix = number / chunks / args.splits;
    return place;
}

// What a thread reads: its columns of every kXStep-th pair of rows, and one vector of a basis.
constexpr int kXStep = kThreads / (kColumns / 4);
constexpr int kBasisStep = kThreads / (kGroupsOnce * kVectors);

template <bool kWide>
struct Reader {
    const char* x;       // the first pair's upper row
    int64_t below;       // bytes from there to the lower one
    const float* basis;  // the first pair's number
    int32_t rank;        // numbers from there to the next pair's; 0: no vector
    int32_t column, width;
    bool aligned, two;

    FM_METHOD Reader(const Project& args, const ProjectPlace& place, int64_t begin) {
        const Filtered& of = args.x;
        constexpr int64_t kSize = kWide ? 4 : 2;
        width = static_cast<int32_t>(of.width);
        column = place.column + thread() % (kColumns / 4) * 4;
        aligned = args.aligned != 0;
        two = of.classes == 2;
        int64_t row = place.matrix * of.height + begin + thread() / (kColumns / 4);
        x = static_cast<const char*>(of.x.data) + row * of.width * kSize;
        below = pair_rows(of) * of.width * kSize;
        int32_t vector = thread() % (kGroupsOnce * kVectors), group = place.group + vector / kVectors;
        basis = nullptr;
        rank = 0;
        if (vector / kVectors >= place.groups) return;
        int32_t which = class_of(of, group), own = first_vector(of, group) + vector % kVectors;
        if (own >= of.rank[which]) return;
        rank = of.rank[which];
        basis = of.basis[which] + (begin + thread() / (kGroupsOnce * kVectors)) * rank + own;
    }

    // The next `count` pairs; what is behind them is 0.
    FM_METHOD void read(int32_t count, Fetched<kWide>& out) const {
        FM_UNROLL
        for (int i = 0; i < Fetched<kWide>::kX; ++i) {
            const char* from = x + static_cast<int64_t>(i * kXStep) * width * (kWide ? 4 : 2);
            int32_t upto = thread() / (kColumns / 4) + i * kXStep < count ? width : 0;
            load_four<kWide>(from, column, upto, aligned, out.upper[i]);
            load_four<kWide>(from + below, column, two ? upto : 0, aligned, out.lower[i]);
        }
        FM_UNROLL
        for (int i = 0; i < Fetched<kWide>::kBasis; ++i) {
            bool there = thread() / (kGroupsOnce * kVectors) + i * kBasisStep < count && rank != 0;
            out.basis[i] = there ? basis[static_cast<int64_t>(i * kBasisStep) * rank] : 0.0f;
        }
    }

    FM_METHOD void advance(int32_t pairs) {
        x += static_cast<int64_t>(pairs) * width * (kWide ? 4 : 2);
        if (rank != 0) basis += static_cast<int64_t>(pairs) * rank;
    }
};

template <bool kWide>
FM_DEVICE void stage(const Filtered& x, const Fetched<kWide>& fetched, ProjectShared& mine) {
    FM_UNROLL
    for (int i = 0; i < Fetched<kWide>::kX; ++i) {
        int32_t staged = thread() / (kColumns / 4) + i * (kThreads / (kColumns / 4));
        int32_t column = thread() % (kColumns / 4) * 4;
        Four upper = widened<kWide>(fetched.upper[i], x.x.dtype), lower = widened<kWide>(fetched.lower[i], x.x.dtype);
        Four sum, difference;
        FM_UNROLL
        for (int k = 0; k < 4; ++k) {
            sum.v[k] = x.classes == 2 ? upper.v[k] + lower.v[k] : upper.v[k];
            difference.v[k] = upper.v[k] - lower.v[k];
        }
        put_four(&mine.part[0][staged][column], sum);
        if (x.classes == 2) put_four(&mine.part[1][staged][column], difference);
    }
    FM_UNROLL
    for (int i = 0; i < Fetched<kWide>::kBasis; ++i) {
        int32_t staged = thread() / (kGroupsOnce * kVectors) + i * (kThreads / (kGroupsOnce * kVectors));
        mine.basis[staged][thread() % (kGroupsOnce * kVectors)] = fetched.basis[i];
    }
}

// A thread has eight columns of a group's vectors: four in each half of the tile, so that its neighbours' lie beside
// them. Slots that a block has more than groups take slices of the rows; their sums are added in order.
template <bool kWide>
FM_KERNEL_RESIDENT(kThreads, 2)
project_kernel(FM_LARGE Project args) {
    ProjectShared& mine = shared<ProjectShared>();
    const Filtered& x = args.x;
    ProjectPlace place = project_place(args);
    int64_t each = pieces(pair_rows(x), args.splits);
    int64_t begin = place.split * each, end = smaller(pair_rows(x), begin + each);
    int32_t slices = kSlots / place.groups, step = kStaged / slices * slices;
    int32_t own = thread() % 8 * 4, slot = thread() / 8;
    int32_t group = slot % place.groups, slice = slot / place.groups;
    bool works = slice < slices;
    int32_t which = class_of(x, place.group + group);
    float sum[kVectors][8];
    FM_UNROLL
    for (int i = 0; i < kVectors; ++i) {
        FM_UNROLL
        for (int k = 0; k < 8; ++k) sum[i][k] = 0.0f;
    }
    Reader<kWide> reader(args, place, begin);
    Fetched<kWide> next;
    int32_t left = static_cast<int32_t>(end - begin);
    reader.read(step < left ? step : left, next);
    for (; left > 0; left -= step) {
        sync();
        stage<kWide>(x, next, mine);
        sync();
        reader.advance(step);
        if (left > step) reader.read(step < left - step ? step : left - step, next);
        FM_ROLLED
        for (int32_t staged = works ? slice : step; staged < step; staged += slices) {
            const float* part = mine.part[which][staged];
            Four left = four_at(part + own), right = four_at(part + kColumns / 2 + own);
            const float* basis = mine.basis[staged] + group * kVectors;
            Four first = four_at(basis), second = four_at(basis + 4);
            FM_UNROLL
            for (int i = 0; i < kVectors; ++i) {
                float factor = i < 4 ? first.v[i & 3] : second.v[i & 3];
                FM_UNROLL
                for (int k = 0; k < 8; ++k) {
                    sum[i][k] = multiply_add(factor, k < 4 ? left.v[k & 3] : right.v[k & 3], sum[i][k]);
                }
            }
        }
    }
    // In the place of the parts: a group's vectors of one slice.
    float* total = &mine.part[0][0][0] + group * kVectors * kColumns;
    static_assert(sizeof(mine.part) >= sizeof(float) * kGroupsOnce * kVectors * kColumns, "there is room for them");
    for (int32_t s = 1; s < slices; ++s) {
        sync();
        if (slice == s) {
            FM_UNROLL
            for (int i = 0; i < kVectors; ++i) {
                FM_UNROLL
                for (int half = 0; half < 2; ++half) {
                    Four four = {{sum[i][4 * half], sum[i][4 * half + 1], sum[i][4 * half + 2], sum[i][4 * half + 3]}};
                    put_four(total + i * kColumns + half * (kColumns / 2) + own, four);
                }
            }
        }
        sync();
        if (slice == 0) {
            FM_UNROLL
            for (int i = 0; i < kVectors; ++i) {
                FM_UNROLL
                for (int half = 0; half < 2; ++half) {
                    Four four = four_at(total + i * kColumns + half * (kColumns / 2) + own);
                    FM_UNROLL
                    for (int k = 0; k < 4; ++k) sum[i][4 * half + k] = sum[i][4 * half + k] + four.v[k];
                }
            }
        }
    }
    if (slice != 0) return;
    int32_t rank = x.rank[which], first = first_vector(x, place.group + group), width = static_cast<int32_t>(x.width);
    int64_t line = (place.split * x.matrices + place.matrix) * (x.rank[0] + x.rank[1]) + (which == 1 ? x.rank[0] : 0);
    FM_UNROLL
    for (int i = 0; i < kVectors; ++i) {
        if (first + i >= rank) break;
        FM_UNROLL
        for (int half = 0; half < 2; ++half) {
            Four four = {{sum[i][4 * half], sum[i][4 * half + 1], sum[i][4 * half + 2], sum[i][4 * half + 3]}};
            store_four<true>(args.out + (line + first + i) * x.width, place.column + half * (kColumns / 2) + own, width,
                             args.aligned_out != 0, kFloat32, four);
        }
    }
}

// --- subtract: what the basis makes of coefficients

constexpr int kDrawn = 128;                        // threads of a block: four warps, above one another
constexpr int kDrawnColumns = 128;                 // of a block, four of each lane
constexpr int kPairs = 8;                          // of rows, of a thread
constexpr int kDrawnPairs = kPairs * kDrawn / 32;  // of a block
constexpr int kDepth = 32;                         // vectors of each class in shared memory
constexpr int kBatch = 4;                          // pairs of rows that a thread reads at once

struct SubtractShared {
    float coefficients[2][kDepth][kDrawnColumns];
    float basis[2][kDepth][kDrawnPairs];
};

struct Subtract {
    Filtered x;
    const float* coefficients;  // [n, r, W]
    void* out;
    int64_t each;  // tiles above one another that a block takes
    int32_t aligned, aligned_coefficients;
};

// The vectors from `depth` on of the coefficients' columns into shared memory; what is not there is 0.
FM_DEVICE void stage_coefficients(const Subtract& args, int64_t matrix, int32_t column, int32_t depth,
                                  SubtractShared& mine) {
    const Filtered& x = args.x;
    int32_t width = static_cast<int32_t>(x.width);
    const float* from = args.coefficients + matrix * (x.rank[0] + x.rank[1]) * x.width;
    for (int32_t which = 0; which < x.classes; ++which) {
        int32_t count = static_cast<int32_t>(smaller(x.rank[which] - depth, kDepth));
        for (int32_t i = thread() / 32; i < count; i += kDrawn / 32) {
            RawFour<true> four;
            const float* row = from + ((which == 1 ? x.rank[0] : 0) + depth + i) * x.width;
            load_four<true>(row, column + lane() * 4, width, args.aligned_coefficients != 0, four);
            put_four(&mine.coefficients[which][i][lane() * 4], widened<true>(four, kFloat32));
        }
    }
}

// The same of a tile's rows of the basis, turned round. Its numbers are read row by row.
FM_DEVICE void stage_basis(const Filtered& x, int64_t row, int32_t depth, SubtractShared& mine) {
    for (int32_t which = 0; which < x.classes; ++which) {
        int32_t rank = x.rank[which], count = static_cast<int32_t>(smaller(rank - depth, kDepth));
        for (int32_t i = thread() / 32; i < kDrawnPairs; i += kDrawn / 32) {
            bool there = lane() < count && row + i < pair_rows(x);
            float value = there ? x.basis[which][(row + i) * rank + depth + lane()] : 0.0f;
            if (lane() < count) mine.basis[which][lane()][i] = value;
        }
    }
}
static_assert(kDepth == 32, "a lane for each vector");

template <bool kWide>
FM_KERNEL_RESIDENT(kDrawn, 3)
subtract_kernel(FM_LARGE Subtract args) {
    SubtractShared& mine = shared<SubtractShared>();
    const Filtered& x = args.x;
    int64_t tiles = pieces(x.width, kDrawnColumns), strips = pieces(pieces(pair_rows(x), kDrawnPairs), args.each);
    int64_t matrix = block() / tiles / strips, first = block() / tiles % strips * args.each * kDrawnPairs;
    int64_t last = smaller(pair_rows(x), first + args.each * kDrawnPairs);
    int32_t column = static_cast<int32_t>(block() % tiles) * kDrawnColumns, width = static_cast<int32_t>(x.width);
    int32_t most = x.rank[0] > x.rank[1] ? x.rank[0] : x.rank[1], above = thread() / 32 * kPairs;
    bool aligned = args.aligned != 0, two = x.classes == 2;
    int64_t start = matrix * x.height * x.width;
    for (int64_t row = first; row < last; row += kDrawnPairs) {
        float product[2][kPairs][4];
        FM_UNROLL
        for (int i = 0; i < kPairs; ++i) {
            FM_UNROLL
            for (int k = 0; k < 4; ++k) product[0][i][k] = product[1][i][k] = 0.0f;
        }
        for (int32_t depth = 0; depth < most; depth += kDepth) {
            sync();
            // All that a column has, if there is room for it, stays for the next rows.
            if (row == first || most > kDepth) stage_coefficients(args, matrix, column, depth, mine);
            stage_basis(x, row, depth, mine);
            sync();
            FM_UNROLL
            for (int which = 0; which < 2; ++which) {
                int32_t count = static_cast<int32_t>(smaller(x.rank[which] - depth, kDepth));
                FM_ROLLED
                for (int32_t j = 0; j < count; ++j) {
                    Four line = four_at(&mine.coefficients[which][j][lane() * 4]);
                    Four upper = four_at(&mine.basis[which][j][above]);
                    Four lower = four_at(&mine.basis[which][j][above + 4]);
                    FM_UNROLL
                    for (int i = 0; i < kPairs; ++i) {
                        float factor = i < 4 ? upper.v[i & 3] : lower.v[i & 3];
                        FM_UNROLL
                        for (int k = 0; k < 4; ++k) {
                            product[which][i][k] = multiply_add(factor, line.v[k], product[which][i][k]);
                        }
                    }
                }
            }
        }
        FM_UNROLL
        for (int batch = 0; batch < kPairs; batch += kBatch) {
            RawFour<kWide> raw[2][kBatch];
            FM_UNROLL
            for (int i = 0; i < kBatch; ++i) {
                int64_t pair = row + above + batch + i;
                bool there = pair < last;
                const char* from =
                    static_cast<const char*>(x.x.data) + (start + (there ? pair : first) * x.width) * (kWide ? 4 : 2);
                int32_t upto = there ? width : 0;
                load_four<kWide>(from, column + lane() * 4, upto, aligned, raw[0][i]);
                from += two ? pair_rows(x) * x.width * (kWide ? 4 : 2) : 0;
                load_four<kWide>(from, column + lane() * 4, two ? upto : 0, aligned, raw[1][i]);
            }
            FM_UNROLL
            for (int i = 0; i < kBatch; ++i) {
                int64_t pair = row + above + batch + i;
                if (pair >= last) break;
                Four upper = widened<kWide>(raw[0][i], x.x.dtype), lower = widened<kWide>(raw[1][i], x.x.dtype);
                FM_UNROLL
                for (int k = 0; k < 4; ++k) {
                    float even = product[0][batch + i][k], odd = product[1][batch + i][k];
                    upper.v[k] = upper.v[k] - (even + odd);
                    lower.v[k] = lower.v[k] - (even - odd);
                }
                char* to = static_cast<char*>(args.out) + (start + pair * x.width) * (kWide ? 4 : 2);
                store_four<kWide>(to, column + lane() * 4, width, aligned, x.x.dtype, upper);
                to += pair_rows(x) * x.width * (kWide ? 4 : 2);
                if (two) store_four<kWide>(to, column + lane() * 4, width, aligned, x.x.dtype, lower);
            }
        }
    }
}

// --- mask: the spectrum's lines

constexpr int kPlaces = 8;  // of a line, of a thread

// What index k of n adds to the squared distance from the disc's centre.
FM_INLINE int64_t square_of(const MaskLimits& limits, int64_t k, int64_t n) {
    int64_t distance = limits.wrapped == 0 ? k - n / 2 : smaller(k, n - k);
    return distance * distance;
}

FM_INLINE int64_t mirrored(int64_t k, int64_t n) { return k == 0 ? 0 : n - k; }

FM_INLINE float mask_at(const MaskLimits& limits, int64_t squared) {
    if (squared < limits.least || squared > limits.most) return 0.0f;
    return squared == limits.ring ? 2.0f : 1.0f;
}

// line, opposite: what the line has of the squared distance, here and at the mirrored index.
FM_DEVICE float weight_at(const MaskLimits& limits, int64_t line, int64_t opposite, int64_t place) {
    float here = mask_at(limits, line + square_of(limits, place, limits.across));
    if (limits.mirrored == 0) return here;
    int64_t there = mirrored(place, limits.across);
    return (here + mask_at(limits, opposite + square_of(limits, there, limits.across))) * 0.5f;
}

// A block has so many places of a line; a thread two neighbours at a time where kTwo, or one.
template <bool kTwo>
FM_KERNEL(kThreads)
mask_kernel(float* lines, MaskLimits limits, int64_t first, int64_t count, float scale) {
    constexpr int kSteps = kTwo ? kPlaces / 2 : kPlaces, kStep = kTwo ? 2 : 1;
    int64_t tiles = pieces(limits.across, kThreads * kPlaces), number = block() / tiles;
    int64_t index = first + number % count, line = square_of(limits, index, limits.size);
    int64_t opposite = square_of(limits, mirrored(index, limits.size), limits.size);
    int64_t begin = block() % tiles * (kThreads * kPlaces) + thread() * kStep;
    float* row = lines + 2 * number * limits.across;
    RawFour<kTwo> raw[kSteps];
    FM_UNROLL
    for (int i = 0; i < kSteps; ++i) {
        int64_t at = smaller(begin + i * kThreads * kStep, limits.across - kStep);
        load_four<kTwo>(row + 2 * at, 0, 4, true, raw[i]);
    }
    FM_UNROLL
    for (int i = 0; i < kSteps; ++i) {
        int64_t at = begin + i * kThreads * kStep;
        if (at >= limits.across) break;
        float weight[2];
        FM_UNROLL
        for (int k = 0; k < kStep; ++k) weight[k] = weight_at(limits, line, opposite, at + k) * scale;
        FM_UNROLL
        for (int k = 0; k < 2 * kStep; ++k) {
            raw[i].word[k] = bit_cast<uint32_t>(bit_cast<float>(raw[i].word[k]) * weight[k / 2]);
        }
        if (kTwo) {
            Words4 words = {{raw[i].word[0], raw[i].word[1], raw[i].word[kTwo ? 2 : 0], raw[i].word[kTwo ? 3 : 1]}};
            store16(row + 2 * at, words);
        } else {
            store8bytes(row + 2 * at, raw[i].word[0] | static_cast<uint64_t>(raw[i].word[1]) << 32);
        }
    }
}

}  // namespace

// As many as give every processor two blocks, and no more than there is room for; of rows enough for a few steps.
int64_t highpass_splits(const Filtered& x, int64_t most) {
    int64_t blocks = pieces(x.width, kColumns) * pieces(all_groups(x), kGroupsOnce) * x.matrices;
    int64_t wanted = pieces(2 * processors(), at_least_one(blocks));
    wanted = smaller(smaller(wanted, most), pair_rows(x) / (4 * kStaged));
    // Without those that would have no row.
    int64_t each = pieces(pair_rows(x), at_least_one(wanted));
    return pieces(pair_rows(x), each);
}

int highpass_project(Place place, const Filtered& x, int64_t splits, float* out) {
    int64_t size = dtype_size(x.x.dtype);
    Project args = {x, out, splits, fours_are_aligned(x.x.data, x.width, size), fours_are_aligned(out, x.width, 4)};
    int64_t grid = pieces(x.width, kColumns) * pieces(all_groups(x), kGroupsOnce) * splits * x.matrices;
    auto with = [&](void (*kernel)(Project)) {
        return launch(kernel, grid, kThreads, sizeof(ProjectShared), place.stream, args);
    };
    return with(size == 4 ? project_kernel<true> : project_kernel<false>);
}

int highpass_subtract(Place place, const Filtered& x, const float* coefficients, void* out) {
    int64_t size = dtype_size(x.x.dtype), columns = pieces(x.width, kDrawnColumns) * x.matrices;
    int64_t tiles = pieces(pair_rows(x), kDrawnPairs);
    // Several tiles of a block share its coefficients, where there are enough of them for all processors.
    int64_t each = smaller(at_least_one(columns * tiles / (6 * processors())), 8);
    bool aligned = fours_are_aligned(x.x.data, x.width, size) && fours_are_aligned(out, x.width, size);
    Subtract args = {x, coefficients, out, each, aligned, fours_are_aligned(coefficients, x.width, 4)};
    auto with = [&](void (*kernel)(Subtract)) {
        return launch(kernel, columns * pieces(tiles, each), kDrawn, sizeof(SubtractShared), place.stream, args);
    };
    return with(size == 4 ? subtract_kernel<true> : subtract_kernel<false>);
}

int highpass_mask(Place place, float* lines, const MaskLimits& limits, int64_t matrices, int64_t first, int64_t count,
                  float scale) {
    int64_t grid = pieces(limits.across, kThreads * kPlaces) * count * matrices;
    bool two = limits.across % 2 == 0 && reinterpret_cast<uintptr_t>(lines) % 16 == 0;
    auto with = [&](void (*kernel)(float*, MaskLimits, int64_t, int64_t, float)) {
        return launch(kernel, grid, kThreads, 0, place.stream, lines, limits, first, count, scale);
    };
    return with(two ? mask_kernel<true> : mask_kernel<false>);
}

}  // namespace cuda
FM_NAMESPACE_END
