// What the CPU backend offers to the bindings: whole operations, on raw pointers, with their own threads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace fastmerge {
namespace cpu {

// Instruction sets: which this build carries and this processor runs, fastest first; and which is in use.
std::vector<std::string> supported_isas();
std::string isa();
bool set_isa(const std::string& name);
const Kernels& kernels();

int threads();
void set_threads(int count);

struct Shard {
    Array array;
    int64_t numel;
};

// Many tensors of n models, each list of one dtype, as addresses.
struct Many {
    int64_t tensors;
    int32_t models;
    const int64_t* lengths;    // [tensors]
    const int64_t* bases;      // [tensors], or nullptr
    const int64_t* addresses;  // [tensors, models]
    int32_t base_dtype, dtype, compute;
    bool subtract;
};

// select
void abs_histogram(const std::vector<Shard>& shards, int bins, int64_t* out);
uint32_t kth_key(const std::vector<Shard>& shards, int64_t k);
void magnitude_bounds(const Models& models, const int64_t* first, const int64_t* last, int64_t* bounds,
                      int64_t* ties_before);
// ranks: [tensors, n, 2]; bounds: [tensors, n, 2, 2]; ties_before: [n, 2, the blocks of all tensors]
void magnitude_bounds_many(const Many& many, const int64_t* ranks, int64_t* bounds, int64_t* ties_before);
void key_histogram(const Models& models, const int64_t* prefix, int64_t* out);
void key_window(const Models& models, const int64_t* low, int64_t width, int64_t* counts);
void tie_counts(const Models& models, const int64_t* bounds, int64_t* out);
void topk_mask(const Models& models, const Rule& rule, uint8_t* out);
void count_nonfinite(Array x, int64_t numel, int64_t* nan_and_inf);
void zero_nonfinite(void* data, int32_t dtype, int64_t numel);

// sparsify
void l1_sums(const Models& models, Rule rule, int64_t* out);
void kept_masks(const Models& models, Rule rule, uint8_t* masks);  // [n, ceil(numel / 8)], zero beforehand

// consensus
void consensus_apply(ConsensusArgs args);
void fused_sum(const Models& models, const float* weights, float* out);  // no base; a chain of fused multiply-adds
// formula: what is the same for all tensors; its rule's bounds, ties and streams are those of all tensors, as above,
// and streams [tensors, n]. out: [tensors], addresses.
void consensus_apply_many(const Many& many, const ConsensusArgs& formula, const int64_t* out);

// PCB-Merging; see fastmerge/reference/pcb.py
void pcb_scores(const PcbArgs& args, float* out);  // [n, numel]
void pcb_window(const PcbArgs& args, const int64_t* low, int64_t width, int64_t* counts, int64_t* highest);
void pcb_histogram(const PcbArgs& args, const int64_t* prefix, int64_t* out);  // [n, 65536], zero beforehand
void pcb_extremes(const Models& models, float* out);                           // [pairs, 2]
void pcb_sums(const PcbArgs& args, int64_t* out);                              // [n + pairs, 12]
void pcb_apply(const PcbApplyArgs& args);

// Light experts; see fastmerge/reference/expert.py. `changed` [tensors]; nothing is restored unless all of it is 0.
void expert_extract(const Models& models, int64_t rows, int64_t width, int64_t kept, void* columns,
                    int32_t column_bytes, void* values, int32_t dtype);
void expert_apply(const std::vector<ExpertArgs>& tensors);
void expert_revert(const std::vector<ExpertArgs>& tensors, int64_t* changed);

// Inner products; see fastmerge/reference/geometry.py. out: [pairs, rows, blocks of a row]
void gram(const Models& models, int64_t row_length, double* out);

// How much places matter; see fastmerge/reference/importance.py. The base is subtracted; compute is float32.
void nearswap(const Models& models, float t, void* out, int32_t dtype);
void ram_counts(const Models& models, float epsilon, int64_t* counts);  // [n, 2]
void ram_apply(const Models& models, const float* factors, float epsilon, void* out, int32_t dtype);
void model_variance(const Models& models, float* out);
void energy_sums(const Models& models, const uint8_t* mask, int64_t* limbs);  // [n, 12]; mask: a bit each, or nullptr
void divergences(const Models& models, int64_t width, float* out);            // [rows]
void importance(const Models& models, const float* divergence, int64_t width, float* out);

// Trials, tensor by tensor; small ones side by side. A result may be one of its tensors.
void trials(const std::vector<TrialArgs>& tensors);

// exp (0), tanh (1) or log (2) of float32 values.
void function(int32_t which, const float* x, int64_t count, float* out);

// The random words of elements first .. first + count - 1 of a stream.
void random_words(Stream stream, uint64_t first, int64_t count, uint32_t* out);

// The same, and nothing keeps them: what making them takes, for benchmarks.
void discarded_words(Stream stream, uint64_t first, int64_t count);

int64_t tie_blocks(int64_t numel);

}  // namespace cpu
}  // namespace fastmerge
