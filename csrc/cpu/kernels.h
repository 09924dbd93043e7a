// The contract between the drivers (threads, memory, decisions) and the kernels (one copy per instruction set).
//
// Plain data and function pointers only. A kernel works on a range of elements on the calling thread, in scratch memory
// that the driver hands it; it allocates nothing and calls nothing outside its own unit.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace fastmerge {
namespace cpu {

constexpr int64_t kTieBlock = 65536;  // elements per tie count; must equal TIE_BLOCK in Python
constexpr int kTile = 512;            // elements that a kernel handles at once, in first-level cache
constexpr int64_t kLongRow = 65535;   // DELLA rows longer than this are ranked against a sorted copy

struct Array {
    const void* data;
    int32_t dtype;
};

// n models of `numel` elements. With a base the values are round_C(model - base), without it round_C(model).
struct Models {
    Array base;  // data == nullptr: no subtraction
    const Array* models;
    int32_t count;
    int32_t compute;  // dtype that intermediate results are rounded to
    int64_t numel;
};

struct Stream {
    uint32_t k0, k1, c2, c3;
};

struct Rule {
    int32_t method;
    const int64_t* bounds;       // [n, 2, 2]
    const int64_t* ties_before;  // [n, 2, blocks]
    int64_t blocks;
    const double* density;  // [n]
    const double* epsilon;  // [n]
    const Stream* streams;  // [n]
    uint64_t offset;
    int64_t row_length;
    const uint8_t* masks;  // [n, mask_stride] what was decided before, a bit for each element, low bit first
    int64_t mask_stride;   // bytes
    const uint32_t* const* sorted_row;  // [n] ascending keys of the long row in hand; nullptr for short rows
};

struct Window {
    uint32_t low, high;  // keys within [low, high] are collected, keys above high are counted
};

struct ConsensusArgs {
    Models models;
    Rule rule;
    Array base;  // what is added at the end; data == nullptr: nothing
    const float* weights;
    const float* scales;
    int32_t election;
    float zero_sign;
    int32_t divisor;
    float divisor_value;
    float lambda;
    void* out;
    int32_t out_dtype;
};

// What the sweeps of PCB-Merging need; each needs a part. `models.compute` is float32.
struct PcbArgs {
    Models models;
    int32_t variant;
    const float* clip;        // [n, 2]
    const float* extremes;    // [pairs, 2]
    const float* means;       // [n + pairs]
    const float* thresholds;  // [n, 2]
};

// Keys from low[i] on are counted one by one; counts are shared by the threads, `above` and `highest` are not.
struct PcbWindow {
    const int64_t* low;  // [n]
    int64_t width;
    int64_t* counts;    // [n, 1 + width]; nothing is written to counts[i, 0]
    int64_t* above;     // [n] keys past the window
    uint32_t* highest;  // [n]
};

struct PcbApplyArgs {
    PcbArgs scores;
    const float* weights;
    void* out;
    int32_t out_dtype;
    float* scale;  // [n, numel], or nullptr
};

// What one expert holds of a tensor: `kept` places of each row. See fastmerge/reference/expert.py.
struct ExpertPart {
    const void* columns;
    int32_t column_bytes;  // 2 or 4
    Array values;
    Array base;   // the base's values at these places; data == nullptr: the expert is added
    void* saved;  // the tensor's own bits there
    int64_t kept;
    float scale;
};

struct ExpertArgs {
    void* data;
    int32_t dtype;
    int64_t rows, width;
    const ExpertPart* parts;
    int32_t count;
};

// A trial of one tensor. See fastmerge/reference/evolve.py.
struct TrialArgs {
    Array tensors[8];  // the distinct ones, x the first
    int32_t kind;
    int32_t places[7];    // of the reference; of a and of both sides of each difference
    int32_t differences;  // how many
    float factors[3];     // 1 - F and F; of each difference
    Stream stream;
    uint64_t limit;  // words below it cross over
    uint64_t offset;
    int64_t forced;  // of this chunk's elements the one that always crosses over, or -1
    int64_t numel;
    void* out;
    int32_t out_dtype;
};

// Sums of one model over a range, as limbs.
struct MassSums {
    uint64_t all[12];
    uint64_t kept[12];
};

struct Kernels {
    const char* name;

    // select
    void (*keys)(const Models* models, int32_t model, int64_t begin, int64_t count, uint32_t* out);
    int64_t (*collect)(const Models* models, int32_t model, int64_t begin, int64_t count, Window window, uint32_t* out,
                       int64_t* above);
    int64_t (*count_key)(const uint32_t* keys, int64_t count, uint32_t key);
    void (*count_ties)(const Models* models, int32_t model, int64_t begin, int64_t count, const uint32_t* thresholds,
                       int64_t* out);
    void (*key_histogram)(const Models* models, int32_t model, int64_t begin, int64_t count, int64_t prefix,
                          uint32_t* bins);
    void (*raw_histogram)(Array x, int64_t begin, int64_t count, int32_t shift, uint32_t* bins);
    void (*mask)(const Models* models, const Rule* rule, int64_t begin, int64_t count, uint8_t* out);
    void (*nonfinite)(Array x, int64_t begin, int64_t count, int64_t* nan_and_inf);

    // sparsify. `decide` sets the bits of what each model keeps in masks that were zero.
    size_t (*scratch_bytes)(int32_t models, int32_t method, int64_t row_length);
    void (*mass)(const Models* models, const Rule* rule, int64_t begin, int64_t end, void* scratch, MassSums* sums);
    void (*decide)(const Models* models, const Rule* rule, int64_t begin, int64_t end, void* scratch, uint8_t* masks);

    // consensus
    void (*consensus)(const ConsensusArgs* args, int64_t begin, int64_t end, void* scratch);
    void (*fused_sum)(const Models* models, const float* weights, int64_t begin, int64_t end, float* out);

    // PCB-Merging. Scores go to out[i * stride ..]; ordered_extremes holds [pairs, 2] ordered bits; limbs hold
    // [n + pairs, 12], carried when the kernel returns.
    size_t (*pcb_scratch)(int32_t models);
    void (*pcb_scores)(const PcbArgs* args, int64_t begin, int64_t end, void* scratch, float* out, int64_t stride);
    void (*pcb_window)(const PcbArgs* args, int64_t begin, int64_t end, void* scratch, const PcbWindow* window);
    void (*pcb_extremes)(const Models* models, int64_t begin, int64_t end, void* scratch, int32_t* ordered_extremes);
    void (*pcb_sums)(const PcbArgs* args, int64_t begin, int64_t end, void* scratch, uint64_t* limbs);
    void (*pcb_apply)(const PcbApplyArgs* args, int64_t begin, int64_t end, void* scratch);

    // expert. Rows [begin, end); `total` and `touched`, which is all 0, have room for a row where parts are several.
    int64_t (*expert_at_least)(const uint32_t* keys, int64_t count, uint32_t low, uint32_t* out);
    void (*expert_gather)(const Models* models, int64_t begin, const uint32_t* columns, int64_t count, void* out,
                          int32_t dtype);
    void (*expert_apply)(const ExpertArgs* args, int64_t begin, int64_t end, float* total, uint8_t* touched);
    int64_t (*expert_changed)(const ExpertArgs* args, int64_t begin, int64_t end, float* total, uint8_t* touched);
    void (*expert_restore)(const ExpertArgs* args, int64_t begin, int64_t end);
    uint32_t (*expert_most_column)(const ExpertPart* part, int64_t begin, int64_t end);

    // geometry. Inner products of all pairs of models over one block, to out[pair * stride].
    size_t (*gram_scratch)(int32_t models);
    void (*gram)(const Models* models, int64_t begin, int64_t end, void* scratch, double* out, int64_t stride);

    // importance. Counts are added to; [n, 12] limbs are carried; rows of divergences have room for three in scratch.
    void (*nearswap)(const Models* models, float t, int64_t begin, int64_t end, void* out, int32_t dtype);
    void (*ram_counts)(const Models* models, float epsilon, int64_t begin, int64_t end, int64_t* counts);
    void (*ram_apply)(const Models* models, const float* factors, float epsilon, int64_t begin, int64_t end, void* out,
                      int32_t dtype);
    void (*model_variance)(const Models* models, int64_t begin, int64_t end, float* out);
    void (*energy)(const Models* models, const uint8_t* mask, int64_t begin, int64_t end, uint64_t* limbs);
    void (*divergence)(const Models* models, int64_t width, int64_t first, int64_t last, float* scratch, float* out);
    void (*importance)(const Models* models, const float* divergences, int64_t width, int64_t begin, int64_t end,
                       float* out);

    // evolve
    void (*trial)(const TrialArgs* args, int64_t begin, int64_t end);

    // exp (0), tanh (1) or log (2) of float32 values, for tests and benchmarks
    void (*function)(int32_t which, const float* x, int64_t count, float* out);

    // the generator alone, for tests and benchmarks
    void (*words)(Stream stream, uint64_t first, int64_t count, uint32_t* out);
};

}  // namespace cpu
}  // namespace fastmerge
