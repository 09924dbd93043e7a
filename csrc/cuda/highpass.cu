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

// Elements at .. at + 3 of a row of `width`, 0 past its end. kAligned: all rows begin at a multiple of four elements'
// size, and have a multiple of four.
template <bool kWide, bool kAligned>
FM_DEVICE void load_four(const void* row, int32_t at, int32_t width, RawFour<kWide>& out) {
    const char* from = static_cast<const char*>(row) + static_cast<int64_t>(at) * (kWide ? 4 : 2);
    FM_UNROLL
    for (int i = 0; i < (kWide ? 4 : 2); ++i) out.word[i] = 0;
    if (kAligned) {
        if (at < width && kWide) {
            Words4 words = load16again(from);
            FM_UNROLL
            for (int i = 0; i < 4; ++i) out.word[kWide ? i : 0] = words.word[i];
        } else if (at < width) {
            Words2 words = load8bytes(from);
            out.word[0] = words.word[0];
            out.word[1] = words.word[1];
        }
    } else {
        FM_UNROLL
        for (int i = 0; i < 4; ++i) {
            if (at + i >= width) break;
            if (kWide) {
                out.word[kWide ? i : 0] = load4bytes(from + 4 * i);
            } else {
                out.word[i / 2] |= load2bytes(from + 2 * i) << (16 * (i % 2));
            }
        }
    }
}

template <bool kWide>
FM_DEVICE Four widened(const RawFour<kWide>& raw, int32_t dtype) {
    Four four;
    FM_UNROLL
    for (int i = 0; i < 4; ++i) {
        four.v[i] = bit_cast<float>(kWide ? raw.word[kWide ? i : 0] : (raw.word[i / 2] >> (16 * (i % 2))) << 16);
    }
    if (!kWide && dtype == kFloat16) {
        FM_UNROLL
        for (int i = 0; i < 4; ++i) {
            four.v[i] = widen_float16(static_cast<uint16_t>(bit_cast<uint32_t>(four.v[i]) >> 16));
        }
    }
    return four;
}

// Two values of a dtype of 16 bits.
FM_DEVICE uint32_t two_halves(int32_t dtype, float low, float high) {
    uint32_t both = dtype == kBFloat16 ? two_bfloat16(low, high) : two_float16(low, high);
    if (low == low && high == high) return both;
    uint32_t nan = dtype == kBFloat16 ? 0x7fc0u : 0x7e00u;
    return (low == low ? both & 0xffffu : nan) | (high == high ? both & 0xffff0000u : nan << 16);
}

template <bool kWide, bool kAligned>
FM_DEVICE void store_four(void* row, int32_t at, int32_t width, int32_t dtype, const Four& four) {
    char* to = static_cast<char*>(row) + static_cast<int64_t>(at) * (kWide ? 4 : 2);
    uint32_t words[4];
    if (kWide) {
        FM_UNROLL
        for (int i = 0; i < 4; ++i) words[i] = bit_cast<uint32_t>(canonical(four.v[i]));
    } else {
        words[0] = two_halves(dtype, four.v[0], four.v[1]);
        words[1] = two_halves(dtype, four.v[2], four.v[3]);
    }
    if (!kAligned) {
        FM_UNROLL
        for (int i = 0; i < 4; ++i) {
            if (at + i >= width) break;
            if (kWide) {
                store4bytes(to + 4 * i, words[i]);
            } else {
                store2bytes(to + 2 * i, words[i / 2] >> (16 * (i % 2)));
            }
        }
    } else if (at < width) {
        if (kWide) {
            Words4 all = {{words[0], words[1], words[2], words[3]}};
            store16(to, all);
        } else {
            store8bytes(to, words[0] | static_cast<uint64_t>(words[1]) << 32);
        }
    }
}

bool fours_are_aligned(const void* data, int64_t width, int64_t size) {
    return width % 4 == 0 && reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(4 * size) == 0;
}

bool bases_are_aligned(const Filtered& x) {
    return fours_are_aligned(x.basis[0], x.rank[0], 4) && fours_are_aligned(x.basis[1], x.rank[1], 4);
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
};

FM_INLINE int32_t groups_of(int32_t rank) { return (rank + kVectors - 1) / kVectors; }
FM_INLINE int32_t all_groups(const Filtered& x) { return groups_of(x.rank[0]) + groups_of(x.rank[1]); }

// The class of a group, and its first vector there.
FM_INLINE int32_t class_of(const Filtered& x, int32_t group) { return group >= groups_of(x.rank[0]) ? 1 : 0; }
FM_INLINE int32_t first_vector(const Filtered& x, int32_t group) {
    return (group - (class_of(x, group) == 1 ? groups_of(x.rank[0]) : 0)) * kVectors;
}

// Fours of a staged row: of the tile's columns, and of all vectors.
constexpr int kFours = kColumns / 4;
static_assert(kFours == kGroupsOnce * kVectors / 4, "as many of both");
constexpr int kReaders = kThreads / kFours;  // rows that a block reads at once
constexpr int kReads = kStaged / kReaders;

// What a thread brings into shared memory of the next pairs of rows: its columns and its vectors of some rows.
template <bool kWide>
struct Fetched {
    RawFour<kWide> upper[kReads], lower[kReads];
    RawFour<true> basis[kReads];
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

FM_DEVICE int32_t reader() { return thread() / kFours; }
FM_DEVICE int32_t own_four() { return thread() % kFours * 4; }

template <bool kWide, bool kAligned>
struct Reader {
    static constexpr int64_t kSize = kWide ? 4 : 2;
    const char* x;       // the first pair's upper row
    int64_t below;       // bytes from there to the lower one
    const float* basis;  // the first pair's row of it
    int32_t vector;      // the first of four there
    int32_t rank;        // how long such a row is; 0: no vector
    int32_t column, width;
    bool two;

    FM_METHOD Reader(const Project& args, const ProjectPlace& place, int64_t begin) {
        const Filtered& of = args.x;
        width = static_cast<int32_t>(of.width);
        column = place.column + own_four();
        two = of.classes == 2;
        int64_t row = begin + reader();
        x = static_cast<const char*>(of.x.data) + (place.matrix * of.height + row) * of.width * kSize;
        below = pair_rows(of) * of.width * kSize;
        int32_t group = place.group + own_four() / kVectors;
        bool some = own_four() / kVectors < place.groups;
        int32_t which = some ? class_of(of, group) : 0;
        vector = some ? first_vector(of, group) + own_four() % kVectors : 0;
        rank = some ? of.rank[which] : 0;
        basis = of.basis[which] + row * rank;
    }

    // The next `count` pairs; what is behind them is 0.
    FM_METHOD void read(int32_t count, Fetched<kWide>& out) const {
        FM_UNROLL
        for (int i = 0; i < kReads; ++i) {
            bool there = reader() + i * kReaders < count;
            const char* from = x + kSize * i * kReaders * width;
            load_four<kWide, kAligned>(from, column, there ? width : 0, out.upper[i]);
            load_four<kWide, kAligned>(from + below, column, there && two ? width : 0, out.lower[i]);
            load_four<true, kAligned>(basis + static_cast<int64_t>(i * kReaders) * rank, vector, there ? rank : 0,
                                      out.basis[i]);
        }
    }

    FM_METHOD void advance(int32_t pairs) {
        x += kSize * pairs * width;
        basis += static_cast<int64_t>(pairs) * rank;
    }
};

template <bool kWide>
FM_DEVICE void stage(const Filtered& x, const Fetched<kWide>& fetched, ProjectShared& mine) {
    FM_UNROLL
    for (int i = 0; i < kReads; ++i) {
        int32_t staged = reader() + i * kReaders;
        Four upper = widened<kWide>(fetched.upper[i], x.x.dtype), lower = widened<kWide>(fetched.lower[i], x.x.dtype);
        Four sum, difference;
        FM_UNROLL
        for (int k = 0; k < 4; ++k) {
            // Of one class the lower ones are 0. A sum with that is the value itself, but for the sign of a zero.
            sum.v[k] = upper.v[k] + lower.v[k];
            difference.v[k] = upper.v[k] - lower.v[k];
        }
        put_four(&mine.part[0][staged][own_four()], sum);
        put_four(&mine.part[1][staged][own_four()], difference);
        put_four(&mine.basis[staged][own_four()], widened<true>(fetched.basis[i], kFloat32));
    }
}

// A thread has eight columns of a group's vectors: four in each half of the tile, so that its neighbours' lie beside
// them. Slots that a block has more than groups take slices of the rows; their sums are added in order.
// Loads of single elements need more registers: fewer blocks shall have room then.
template <bool kWide, bool kAligned>
FM_KERNEL_RESIDENT(kThreads, kAligned ? 2 : 1)
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
    Reader<kWide, kAligned> rows(args, place, begin);
    Fetched<kWide> next;
    int32_t left = static_cast<int32_t>(end - begin);
    rows.read(step < left ? step : left, next);
    for (; left > 0; left -= step) {
        sync();
        stage<kWide>(x, next, mine);
        sync();
        rows.advance(step);
        if (left > step) rows.read(step < left - step ? step : left - step, next);
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
            int32_t column = place.column + half * (kColumns / 2) + own;
            store_four<true, kAligned>(args.out + (line + first + i) * x.width, column, width, kFloat32, four);
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
    float basis[2][kDepth][kDrawnPairs + 8];  // so that vectors begin at different banks
};

struct Subtract {
    Filtered x;
    const float* coefficients;  // [n, r, W]
    void* out;
    int64_t each;  // tiles above one another that a block takes
};

// Vectors of a class that are multiplied from `depth` on; kSteps of them at a time, with zeros behind the last.
constexpr int kSteps = 4;
FM_DEVICE int32_t depth_of(const Filtered& x, int32_t which, int32_t depth) {
    return static_cast<int32_t>(smaller(x.rank[which] - depth, kDepth));
}

// These vectors' coefficients of the columns into shared memory.
template <bool kAligned>
FM_DEVICE void stage_coefficients(const Subtract& args, int64_t matrix, int32_t column, int32_t depth,
                                  SubtractShared& mine) {
    const Filtered& x = args.x;
    int32_t width = static_cast<int32_t>(x.width);
    const float* from = args.coefficients + matrix * (x.rank[0] + x.rank[1]) * x.width;
    for (int32_t which = 0; which < x.classes; ++which) {
        int32_t count = depth_of(x, which, depth);
        for (int32_t i = thread() / 32; i < (count + kSteps - 1) / kSteps * kSteps; i += kDrawn / 32) {
            RawFour<true> four;
            const float* row = from + ((which == 1 ? x.rank[0] : 0) + depth + i) * x.width;
            load_four<true, kAligned>(row, column + lane() * 4, i < count ? width : 0, four);
            put_four(&mine.coefficients[which][i][lane() * 4], widened<true>(four, kFloat32));
        }
    }
}

// A tile's rows of the bases, turned round. A warp takes eight rows and kSteps vectors at a time, whose places lie in
// different banks.
FM_DEVICE void stage_basis(const Filtered& x, int64_t row, int32_t depth, SubtractShared& mine) {
    constexpr int kWarpsPairs = kDrawnPairs / 8;
    for (int32_t which = 0; which < x.classes; ++which) {
        int32_t rank = x.rank[which], count = depth_of(x, which, depth);
        for (int32_t i = thread() / 32; i < (count + kSteps - 1) / kSteps * kWarpsPairs; i += kDrawn / 32) {
            int32_t vector = i / kWarpsPairs * kSteps + lane() / 8, pair = i % kWarpsPairs * 8 + lane() % 8;
            bool there = vector < count && row + pair < pair_rows(x);
            mine.basis[which][vector][pair] = there ? x.basis[which][(row + pair) * rank + depth + vector] : 0.0f;
        }
    }
}
static_assert(kDepth % kSteps == 0 && kSteps == 4 && kDrawnPairs % 8 == 0, "32 numbers at a time");

template <bool kWide, bool kAligned>
FM_KERNEL_RESIDENT(kDrawn, kAligned ? 4 : 3)
subtract_kernel(FM_LARGE Subtract args) {
    SubtractShared& mine = shared<SubtractShared>();
    const Filtered& x = args.x;
    int64_t tiles = pieces(x.width, kDrawnColumns), strips = pieces(pieces(pair_rows(x), kDrawnPairs), args.each);
    int64_t matrix = block() / tiles / strips, first = block() / tiles % strips * args.each * kDrawnPairs;
    int64_t last = smaller(pair_rows(x), first + args.each * kDrawnPairs);
    int32_t column = static_cast<int32_t>(block() % tiles) * kDrawnColumns, width = static_cast<int32_t>(x.width);
    int32_t most = x.rank[0] > x.rank[1] ? x.rank[0] : x.rank[1], above = thread() / 32 * kPairs;
    bool two = x.classes == 2;
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
            if (row == first || most > kDepth) stage_coefficients<kAligned>(args, matrix, column, depth, mine);
            stage_basis(x, row, depth, mine);
            sync();
            FM_UNROLL
            for (int which = 0; which < 2; ++which) {
                int32_t count = depth_of(x, which, depth);
                FM_ROLLED
                for (int32_t begin = 0; begin < count; begin += kSteps) {
                    FM_UNROLL
                    for (int j = 0; j < kSteps; ++j) {
                        Four line = four_at(&mine.coefficients[which][begin + j][lane() * 4]);
                        Four upper = four_at(&mine.basis[which][begin + j][above]);
                        Four lower = four_at(&mine.basis[which][begin + j][above + 4]);
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
                load_four<kWide, kAligned>(from, column + lane() * 4, upto, raw[0][i]);
                from += two ? pair_rows(x) * x.width * (kWide ? 4 : 2) : 0;
                load_four<kWide, kAligned>(from, column + lane() * 4, two ? upto : 0, raw[1][i]);
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
                store_four<kWide, kAligned>(to, column + lane() * 4, width, x.x.dtype, upper);
                to += pair_rows(x) * x.width * (kWide ? 4 : 2);
                if (two) store_four<kWide, kAligned>(to, column + lane() * 4, width, x.x.dtype, lower);
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
        load_four<kTwo, true>(row + 2 * at, 0, 4, raw[i]);
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

// The number with the least time, as a model has it: processors take blocks in rounds, at least two each, of which one
// waits while the other works; and sums that are written are read again.
int64_t highpass_splits(const Filtered& x, int64_t most) {
    int64_t blocks = pieces(x.width, kColumns) * pieces(all_groups(x), kGroupsOnce) * x.matrices, count = processors();
    double of_matrices = static_cast<double>(blocks) / static_cast<double>(count);
    double of_sums = of_matrices * 2.0 * (x.rank[0] + x.rank[1]) / static_cast<double>(x.height);
    // Of rows enough that the first ones, for which nothing is done meanwhile, are few.
    most = smaller(most, pair_rows(x) / (4 * kStaged));
    int64_t best = 1;
    double least = 0.0;
    for (int64_t splits = 1; splits <= at_least_one(most); ++splits) {
        int64_t rounds = pieces(splits * blocks, count);
        double number = static_cast<double>(splits), time = static_cast<double>(rounds < 2 ? 2 : rounds) / number;
        if (splits > 1) time += number * of_sums;
        if (splits == 1 || time < least) {
            best = splits;
            least = time;
        }
    }
    // Without those that would have no row.
    return pieces(pair_rows(x), pieces(pair_rows(x), best));
}

int highpass_project(Place place, const Filtered& x, int64_t splits, float* out) {
    int64_t size = dtype_size(x.x.dtype);
    bool aligned = bases_are_aligned(x) && fours_are_aligned(x.x.data, x.width, size);
    aligned = aligned && fours_are_aligned(out, x.width, 4);
    Project args = {x, out, splits};
    int64_t grid = pieces(x.width, kColumns) * pieces(all_groups(x), kGroupsOnce) * splits * x.matrices;
    auto with = [&](void (*kernel)(Project)) {
        return launch(kernel, grid, kThreads, sizeof(ProjectShared), place.stream, args);
    };
    if (size == 4) return with(aligned ? project_kernel<true, true> : project_kernel<true, false>);
    return with(aligned ? project_kernel<false, true> : project_kernel<false, false>);
}

int highpass_subtract(Place place, const Filtered& x, const float* coefficients, void* out) {
    int64_t size = dtype_size(x.x.dtype), columns = pieces(x.width, kDrawnColumns) * x.matrices;
    int64_t tiles = pieces(pair_rows(x), kDrawnPairs);
    // Several tiles of a block share its coefficients, where there are enough of them for all processors.
    int64_t each = smaller(at_least_one(columns * tiles / (6 * processors())), 8);
    bool aligned = fours_are_aligned(x.x.data, x.width, size) && fours_are_aligned(out, x.width, size);
    aligned = aligned && fours_are_aligned(coefficients, x.width, 4);
    Subtract args = {x, coefficients, out, each};
    auto with = [&](void (*kernel)(Subtract)) {
        return launch(kernel, columns * pieces(tiles, each), kDrawn, sizeof(SubtractShared), place.stream, args);
    };
    if (size == 4) return with(aligned ? subtract_kernel<true, true> : subtract_kernel<true, false>);
    return with(aligned ? subtract_kernel<false, true> : subtract_kernel<false, false>);
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
