// The module fastmerge._cpu: pointers and sizes in, nothing out but numbers. Checks only what would crash.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>

#include "cpu/api.h"
#include "fastmerge/consensus.h"
#include "fastmerge/evolve.h"
#include "fastmerge/geometry.h"
#include "fastmerge/pcb.h"
#include "fastmerge/philox.h"
#include "fastmerge/sparsify.h"

namespace py = pybind11;

namespace {

using fastmerge::cpu::Array;
using fastmerge::cpu::ConsensusArgs;
using fastmerge::cpu::ExpertArgs;
using fastmerge::cpu::Many;
using fastmerge::cpu::Models;
using fastmerge::cpu::PcbApplyArgs;
using fastmerge::cpu::PcbArgs;
using fastmerge::cpu::Rule;
using fastmerge::cpu::Shard;
using fastmerge::cpu::Stream;
using fastmerge::cpu::TrialArgs;

// (address, dtype code): 0 float32, 1 bfloat16, 2 float16
using Ref = std::pair<uintptr_t, int>;

Array array(const Ref& ref) {
    if (ref.second < 0 || ref.second > 2) throw std::invalid_argument("dtype code out of range");
    return {reinterpret_cast<const void*>(ref.first), ref.second};
}

int64_t* numbers(uintptr_t address) { return reinterpret_cast<int64_t*>(address); }

void need(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(what);
}

struct Inputs {
    std::vector<Array> arrays;
    Models models;

    Inputs(const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel, int compute) {
        need(!tensors.empty(), "at least one model is needed");
        need(compute >= 0 && compute <= 2, "compute dtype code out of range");
        for (const Ref& ref : tensors) arrays.push_back(array(ref));
        models.base = subtract ? array(base) : Array{nullptr, 0};
        models.models = arrays.data();
        models.count = static_cast<int32_t>(arrays.size());
        models.compute = compute;
        models.numel = numel;
    }
    Inputs(const Inputs&) = delete;
    Inputs& operator=(const Inputs&) = delete;
};

// Addresses of int64: lengths [T], bases [T] or 0, models [T, n]; dtypes of bases and models.
struct ManyRef {
    Many many;

    ManyRef(int64_t tensors, int32_t models, uintptr_t lengths, uintptr_t bases, uintptr_t addresses, int base_dtype,
            int dtype, int compute, bool subtract) {
        need(tensors > 0 && models > 0, "at least one tensor of one model is needed");
        need(base_dtype >= 0 && base_dtype <= 2 && dtype >= 0 && dtype <= 2, "dtype code out of range");
        need(compute >= 0 && compute <= 2, "compute dtype code out of range");
        need(bases != 0 || !subtract, "bases are needed to subtract them");
        many = {tensors,    models, numbers(lengths), numbers(bases), numbers(addresses),
                base_dtype, dtype,  compute,          subtract};
    }
};

struct RuleArgs {
    int method;
    uintptr_t bounds, ties_before;
    std::vector<double> density, epsilon;
    int64_t row_length;
    uint64_t seed, tensor_id;
    std::vector<int64_t> positions;
    uint64_t offset;
    uintptr_t masks;
};

struct Rules {
    std::vector<Stream> streams;
    Rule rule;

    Rules(const RuleArgs& args, const Models& models) {
        size_t n = static_cast<size_t>(models.count);
        need(args.method >= 0 && args.method <= 4, "sparsify method out of range");
        rule = Rule{};
        rule.method = args.method;
        rule.blocks = fastmerge::cpu::tie_blocks(models.numel);
        rule.offset = args.offset;
        rule.row_length = args.row_length;
        if (args.method == fastmerge::kBand) {
            need(args.bounds != 0 && args.ties_before != 0, "bounds and ties_before are needed for a band");
            rule.bounds = numbers(args.bounds);
            rule.ties_before = numbers(args.ties_before);
        } else if (args.method == fastmerge::kMask) {
            need(args.masks != 0 || models.numel == 0, "masks are needed");
            rule.masks = reinterpret_cast<const uint8_t*>(args.masks);
            rule.mask_stride = (models.numel + 7) / 8;
        } else if (args.method != fastmerge::kKeepAll) {
            need(args.density.size() == n && args.positions.size() == n,
                 "one density and position per model is needed");
            rule.density = args.density.data();
            uint32_t purpose = args.method == fastmerge::kDella ? fastmerge::kStreamDella : fastmerge::kStreamBernoulli;
            for (int64_t position : args.positions) {
                uint32_t id = fastmerge::stream_id(purpose, 0, static_cast<uint32_t>(position));
                fastmerge::PhiloxStream s = fastmerge::philox_stream(args.seed, args.tensor_id, id);
                streams.push_back({s.k0, s.k1, s.c2, s.c3});
            }
            rule.streams = streams.data();
        }
        if (args.method == fastmerge::kDella) {
            need(args.epsilon.size() == n, "one epsilon per model is needed");
            need(args.row_length > 0 && models.numel % args.row_length == 0, "a chunk must hold whole rows");
            rule.epsilon = args.epsilon.data();
        }
    }
    Rules(const Rules&) = delete;
    Rules& operator=(const Rules&) = delete;
};

float* floats(uintptr_t address) { return reinterpret_cast<float*>(address); }

// Variant, then the addresses of clip, extremes, means and thresholds; 0 for what a sweep does not need.
struct PcbRule {
    int variant;
    uintptr_t clip, extremes, means, thresholds;
};

struct PcbInputs {
    Inputs inputs;
    PcbArgs args;

    PcbInputs(const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel, const PcbRule& rule,
              bool scored = true)
        : inputs(base, subtract, tensors, numel, fastmerge::kFloat32) {
        need(rule.variant >= 0 && rule.variant <= 3, "PCB variant out of range");
        bool paper = rule.variant == fastmerge::kPcbPaper;
        need(paper ? rule.extremes != 0 : rule.clip != 0, "the rule lacks the range of its rows");
        need(!paper || !scored || rule.means != 0, "the rule lacks the means of its rows");
        args = {inputs.models,         rule.variant,       floats(rule.clip),
                floats(rule.extremes), floats(rule.means), floats(rule.thresholds)};
    }
};

// (tensor, address of the columns, their bytes, values, places per row, scale, the base's values there, address of the
// old bits)
using ExpertPart = std::tuple<int64_t, uintptr_t, int, Ref, int64_t, float, Ref, uintptr_t>;

// Tensors (what, rows, width) and the parts of experts that belong to each, which come tensor by tensor.
struct ExpertInputs {
    std::vector<fastmerge::cpu::ExpertPart> parts;
    std::vector<ExpertArgs> tensors;

    ExpertInputs(const std::vector<std::tuple<Ref, int64_t, int64_t>>& targets, const std::vector<ExpertPart>& given) {
        parts.reserve(given.size());
        size_t next = 0;
        for (size_t t = 0; t < targets.size(); ++t) {
            const auto& [target, rows, width] = targets[t];
            size_t first = next;
            for (; next < given.size() && std::get<0>(given[next]) == static_cast<int64_t>(t); ++next) {
                const auto& [of, columns, column_bytes, values, kept, scale, base, saved] = given[next];
                need(column_bytes == 2 || column_bytes == 4, "columns have 2 or 4 bytes");
                need(kept >= 0 && kept <= width, "an expert keeps more than a row has");
                parts.push_back({reinterpret_cast<const void*>(columns), column_bytes, array(values), array(base),
                                 reinterpret_cast<void*>(saved), kept, scale});
            }
            tensors.push_back({const_cast<void*>(array(target).data), target.second, rows, width, parts.data() + first,
                               static_cast<int32_t>(next - first)});
        }
        need(next == given.size(), "parts come tensor by tensor");
    }
    ExpertInputs(const ExpertInputs&) = delete;
    ExpertInputs& operator=(const ExpertInputs&) = delete;
};

// The distinct tensors, x the first; elements of each; the tensor's number, the element that always crosses over or -1,
// counted in the whole tensor; and the result.
using TrialTensor = std::tuple<std::vector<Ref>, int64_t, uint64_t, int64_t, Ref>;

std::vector<TrialArgs> trials_of(int kind, const std::vector<int32_t>& places, const std::vector<float>& factors,
                                 uint64_t limit, uint64_t seed, uint32_t stream, uint64_t offset,
                                 const std::vector<TrialTensor>& tensors) {
    bool blend = kind == fastmerge::kBlend;
    need(blend || kind == fastmerge::kDifferences, "kind of trial out of range");
    need(blend ? factors.size() == 2 : !factors.empty() && factors.size() <= fastmerge::kMostDifferences,
         "the number of factors is out of range");
    need(places.size() == (blend ? 1 : 1 + 2 * factors.size()), "one place per parent is needed");
    std::vector<TrialArgs> made;
    for (const auto& [own, numel, tensor_id, forced, out] : tensors) {
        TrialArgs args{};
        need(!own.empty() && own.size() <= fastmerge::kMostParents, "the number of tensors is out of range");
        for (size_t i = 0; i < own.size(); ++i) args.tensors[i] = array(own[i]);
        args.kind = kind;
        for (size_t i = 0; i < places.size(); ++i) {
            need(places[i] >= 0 && places[i] < static_cast<int32_t>(own.size()), "a place out of range");
            args.places[i] = places[i];
        }
        args.differences = blend ? 0 : static_cast<int32_t>(factors.size());
        for (size_t i = 0; i < factors.size(); ++i) args.factors[i] = factors[i];
        fastmerge::PhiloxStream s = fastmerge::philox_stream(seed, tensor_id, stream);
        args.stream = {s.k0, s.k1, s.c2, s.c3};
        args.limit = limit;
        args.offset = offset;
        args.forced = forced < 0 ? -1 : forced - static_cast<int64_t>(offset);
        args.numel = numel;
        args.out = const_cast<void*>(array(out).data);
        args.out_dtype = array(out).dtype;
        made.push_back(args);
    }
    return made;
}

std::vector<Shard> shards_of(const std::vector<std::pair<Ref, int64_t>>& shards) {
    std::vector<Shard> result;
    for (const auto& shard : shards) result.push_back({array(shard.first), shard.second});
    return result;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    using release = py::call_guard<py::gil_scoped_release>;
    m.doc() = "CPU kernels of fastmerge, one copy per instruction set. Use fastmerge.ops instead.";
    m.attr("TIE_BLOCK") = fastmerge::cpu::kTieBlock;
    m.attr("GRAM_BLOCK") = fastmerge::kGramBlock;

    m.def("isa", &fastmerge::cpu::isa, "The instruction set in use.");
    m.def("isas", &fastmerge::cpu::supported_isas, "Those that this build carries and this processor runs.");
    m.def("set_isa", &fastmerge::cpu::set_isa, "Chooses one; False where it is not supported here.");
    m.def("threads", &fastmerge::cpu::threads);
    m.def("set_threads", &fastmerge::cpu::set_threads, "Call it while no operation runs.");

    py::class_<RuleArgs>(m, "Rule").def(
        py::init([](int method, uintptr_t bounds, uintptr_t ties_before, std::vector<double> density,
                    std::vector<double> epsilon, int64_t row_length, uint64_t seed, uint64_t tensor_id,
                    std::vector<int64_t> positions, uint64_t offset, uintptr_t masks) {
            return RuleArgs{method,     bounds, ties_before, std::move(density),   std::move(epsilon),
                            row_length, seed,   tensor_id,   std::move(positions), offset,
                            masks};
        }));

    m.def(
        "abs_histogram",
        [](const std::vector<std::pair<Ref, int64_t>>& shards, int bins, uintptr_t out) {
            need(bins > 0 && bins <= 32768, "bins out of range");
            fastmerge::cpu::abs_histogram(shards_of(shards), bins, numbers(out));
        },
        release());
    m.def(
        "kth_key",
        [](const std::vector<std::pair<Ref, int64_t>>& shards, int64_t k) {
            int64_t total = 0;
            for (const auto& shard : shards) total += shard.second;
            need(k >= 1 && k <= total, "k out of range");
            return fastmerge::cpu::kth_key(shards_of(shards), k);
        },
        release());
    m.def(
        "magnitude_bounds",
        [](const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel, int compute,
           const std::vector<int64_t>& first, const std::vector<int64_t>& last, uintptr_t bounds,
           uintptr_t ties_before) {
            Inputs inputs(base, subtract, tensors, numel, compute);
            need(first.size() == tensors.size() && last.size() == tensors.size(), "one rank per model is needed");
            fastmerge::cpu::magnitude_bounds(inputs.models, first.data(), last.data(), numbers(bounds),
                                             numbers(ties_before));
        },
        release());
    py::class_<ManyRef>(m, "Many", "Many tensors, each list of one dtype.")
        .def(py::init<int64_t, int32_t, uintptr_t, uintptr_t, uintptr_t, int, int, int, bool>());
    m.def(
        "magnitude_bounds_many",
        [](const ManyRef& ref, uintptr_t ranks, uintptr_t bounds, uintptr_t ties_before) {
            fastmerge::cpu::magnitude_bounds_many(ref.many, numbers(ranks), numbers(bounds), numbers(ties_before));
        },
        release());
    m.def(
        "key_histogram",
        [](const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel, int compute,
           const std::vector<int64_t>& prefix, uintptr_t out) {
            Inputs inputs(base, subtract, tensors, numel, compute);
            need(prefix.size() == tensors.size(), "one prefix per model is needed");
            fastmerge::cpu::key_histogram(inputs.models, prefix.data(), numbers(out));
        },
        release());
    m.def(
        "key_window",
        [](const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel, int compute,
           const std::vector<int64_t>& low, int64_t width, uintptr_t counts) {
            Inputs inputs(base, subtract, tensors, numel, compute);
            need(low.size() == tensors.size(), "one window per model is needed");
            need(width > 0, "the window is empty");
            fastmerge::cpu::key_window(inputs.models, low.data(), width, numbers(counts));
        },
        release());
    m.def(
        "tie_counts",
        [](const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel, int compute,
           uintptr_t bounds, uintptr_t out) {
            Inputs inputs(base, subtract, tensors, numel, compute);
            fastmerge::cpu::tie_counts(inputs.models, numbers(bounds), numbers(out));
        },
        release());
    m.def(
        "topk_mask",
        [](const Ref& x, int64_t numel, const RuleArgs& args, uintptr_t out) {
            Inputs inputs(x, false, {x}, numel, 0);
            Rules rules(args, inputs.models);
            need(args.method == fastmerge::kBand, "a mask needs a band");
            fastmerge::cpu::topk_mask(inputs.models, rules.rule, reinterpret_cast<uint8_t*>(out));
        },
        release());
    m.def(
        "count_nonfinite",
        [](const Ref& x, int64_t numel, uintptr_t out) {
            fastmerge::cpu::count_nonfinite(array(x), numel, numbers(out));
        },
        release());
    m.def(
        "zero_nonfinite",
        [](const Ref& x, int64_t numel) {
            fastmerge::cpu::zero_nonfinite(reinterpret_cast<void*>(x.first), x.second, numel);
        },
        release());
    m.def(
        "l1_sums",
        [](const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel, int compute,
           const RuleArgs& args, uintptr_t out) {
            Inputs inputs(base, subtract, tensors, numel, compute);
            Rules rules(args, inputs.models);
            fastmerge::cpu::l1_sums(inputs.models, rules.rule, numbers(out));
        },
        release());
    m.def(
        "gram",
        [](const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel, int compute,
           int64_t row_length, uintptr_t out) {
            Inputs inputs(base, subtract, tensors, numel, compute);
            need(row_length > 0 && numel % row_length == 0, "tensors are made of whole rows");
            need(compute == fastmerge::kFloat32, "deltas are rounded to float32");
            fastmerge::cpu::gram(inputs.models, row_length, reinterpret_cast<double*>(out));
        },
        release());
    m.def(
        "kept_masks",
        [](const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel, int compute,
           const RuleArgs& args, uintptr_t out) {
            Inputs inputs(base, subtract, tensors, numel, compute);
            Rules rules(args, inputs.models);
            fastmerge::cpu::kept_masks(inputs.models, rules.rule, reinterpret_cast<uint8_t*>(out));
        },
        release());
    m.def(
        "consensus_apply",
        [](const Ref& base, bool subtract, bool add, const std::vector<Ref>& tensors, int64_t numel, int compute,
           const RuleArgs& args, const std::vector<float>& weights, const std::vector<float>& scales, int election,
           float zero_sign, int divisor, float divisor_value, float lambda, const Ref& out) {
            Inputs inputs(base, subtract, tensors, numel, compute);
            Rules rules(args, inputs.models);
            need(weights.size() == tensors.size() && scales.size() == tensors.size(),
                 "one weight and scale per model is needed");
            Array target = array(out);
            ConsensusArgs call{};
            call.models = inputs.models;
            call.rule = rules.rule;
            call.base = add ? array(base) : Array{nullptr, 0};
            call.weights = weights.data();
            call.scales = scales.data();
            call.election = election;
            call.zero_sign = zero_sign;
            call.divisor = divisor;
            call.divisor_value = divisor_value;
            call.lambda = lambda;
            call.out = reinterpret_cast<void*>(out.first);
            call.out_dtype = target.dtype;
            fastmerge::cpu::consensus_apply(call);
        },
        release());
    m.def(
        "fused_sum",
        [](const std::vector<Ref>& tensors, int64_t numel, const std::vector<float>& weights, uintptr_t out) {
            Inputs inputs(Ref(0, 0), false, tensors, numel, fastmerge::kFloat32);
            fastmerge::cpu::fused_sum(inputs.models, weights.data(), floats(out));
        },
        release());
    m.def(
        "consensus_apply_many",
        [](const ManyRef& ref, const RuleArgs& args, const std::vector<uint64_t>& tensor_ids,
           const std::vector<float>& weights, const std::vector<float>& scales, int election, float zero_sign,
           int divisor, float divisor_value, float lambda, uintptr_t out, int out_dtype) {
            const Many& many = ref.many;
            size_t n = static_cast<size_t>(many.models);
            need(weights.size() == n && scales.size() == n, "one weight and scale per model is needed");
            need(args.method <= fastmerge::kBernoulli, "a rule for many tensors is a band, or random");
            need(out_dtype >= 0 && out_dtype <= 2, "dtype code out of range");
            Models blank{};
            blank.count = many.models;
            Rules rules(args, blank);
            std::vector<Stream> streams;
            if (args.method == fastmerge::kBernoulli) {
                need(tensor_ids.size() == static_cast<size_t>(many.tensors), "one number per tensor is needed");
                for (uint64_t id : tensor_ids) {
                    RuleArgs own = args;
                    own.tensor_id = id;
                    Rules each(own, blank);
                    streams.insert(streams.end(), each.streams.begin(), each.streams.end());
                }
                rules.rule.streams = streams.data();
            }
            ConsensusArgs call{};
            call.rule = rules.rule;
            call.weights = weights.data();
            call.scales = scales.data();
            call.election = election;
            call.zero_sign = zero_sign;
            call.divisor = divisor;
            call.divisor_value = divisor_value;
            call.lambda = lambda;
            call.out_dtype = out_dtype;
            fastmerge::cpu::consensus_apply_many(many, call, numbers(out));
        },
        release());
    py::class_<PcbRule>(m, "PcbRule")
        .def(py::init([](int variant, uintptr_t clip, uintptr_t extremes, uintptr_t means, uintptr_t thresholds) {
            return PcbRule{variant, clip, extremes, means, thresholds};
        }));
    m.def(
        "pcb_scores",
        [](const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel, const PcbRule& rule,
           uintptr_t out) {
            PcbInputs inputs(base, subtract, tensors, numel, rule);
            fastmerge::cpu::pcb_scores(inputs.args, floats(out));
        },
        release());
    m.def(
        "pcb_window",
        [](const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel, const PcbRule& rule,
           const std::vector<int64_t>& low, int64_t width, uintptr_t counts, uintptr_t highest) {
            PcbInputs inputs(base, subtract, tensors, numel, rule);
            need(low.size() == tensors.size(), "one window per model is needed");
            need(width > 0, "the window is empty");
            for (int64_t start : low) need(start >= 0, "a window begins below the first key");
            fastmerge::cpu::pcb_window(inputs.args, low.data(), width, numbers(counts), numbers(highest));
        },
        release());
    m.def(
        "pcb_histogram",
        [](const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel, const PcbRule& rule,
           const std::vector<int64_t>& prefix, uintptr_t out) {
            PcbInputs inputs(base, subtract, tensors, numel, rule);
            need(prefix.size() == tensors.size(), "one prefix per model is needed");
            fastmerge::cpu::pcb_histogram(inputs.args, prefix.data(), numbers(out));
        },
        release());
    m.def(
        "pcb_extremes",
        [](const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel, uintptr_t out) {
            Inputs inputs(base, subtract, tensors, numel, fastmerge::kFloat32);
            fastmerge::cpu::pcb_extremes(inputs.models, floats(out));
        },
        release());
    m.def(
        "pcb_sums",
        [](const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel, const PcbRule& rule,
           uintptr_t out) {
            PcbInputs inputs(base, subtract, tensors, numel, rule, false);
            need(rule.variant == fastmerge::kPcbPaper, "only the paper's formula has sums");
            fastmerge::cpu::pcb_sums(inputs.args, numbers(out));
        },
        release());
    m.def(
        "pcb_apply",
        [](const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel, const PcbRule& rule,
           const std::vector<float>& weights, const Ref& out, uintptr_t scale) {
            PcbInputs inputs(base, subtract, tensors, numel, rule);
            need(rule.thresholds != 0, "the rule lacks thresholds");
            need(weights.size() == tensors.size(), "one weight per model is needed");
            Array target = array(out);
            PcbApplyArgs call{};
            call.scores = inputs.args;
            call.weights = weights.data();
            call.out = reinterpret_cast<void*>(out.first);
            call.out_dtype = target.dtype;
            call.scale = floats(scale);
            fastmerge::cpu::pcb_apply(call);
        },
        release());
    m.def(
        "expert_extract",
        [](const Ref& base, bool subtract, const Ref& x, int64_t rows, int64_t width, int64_t kept, uintptr_t columns,
           int column_bytes, const Ref& values) {
            Inputs inputs(base, subtract, {x}, rows * width, fastmerge::kFloat32);
            need(kept >= 0 && kept <= width, "k out of range");
            need(column_bytes == (width <= 65536 ? 2 : 4), "columns have 2 bytes, those of wide rows 4");
            fastmerge::cpu::expert_extract(inputs.models, rows, width, kept, reinterpret_cast<void*>(columns),
                                           column_bytes, const_cast<void*>(array(values).data), values.second);
        },
        release());
    m.def(
        "expert_apply",
        [](const std::vector<std::tuple<Ref, int64_t, int64_t>>& targets, const std::vector<ExpertPart>& parts) {
            fastmerge::cpu::expert_apply(ExpertInputs(targets, parts).tensors);
        },
        release());
    m.def(
        "expert_revert",
        [](const std::vector<std::tuple<Ref, int64_t, int64_t>>& targets, const std::vector<ExpertPart>& parts,
           uintptr_t changed) {
            fastmerge::cpu::expert_revert(ExpertInputs(targets, parts).tensors, numbers(changed));
        },
        release());
    m.def(
        "function",
        [](int which, uintptr_t x, int64_t count, uintptr_t out) {
            fastmerge::cpu::function(which, floats(x), count, floats(out));
        },
        release(), "exp (0), tanh (1) or log (2) of float32 values.");
    m.def(
        "nearswap",
        [](const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel, float t, const Ref& out) {
            Inputs inputs(base, subtract, tensors, numel, fastmerge::kFloat32);
            fastmerge::cpu::nearswap(inputs.models, t, reinterpret_cast<void*>(out.first), array(out).dtype);
        },
        release());
    m.def(
        "ram_counts",
        [](const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel, float epsilon,
           uintptr_t out) {
            Inputs inputs(base, subtract, tensors, numel, fastmerge::kFloat32);
            fastmerge::cpu::ram_counts(inputs.models, epsilon, numbers(out));
        },
        release());
    m.def(
        "ram_apply",
        [](const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel,
           const std::vector<float>& factors, float epsilon, const Ref& out) {
            Inputs inputs(base, subtract, tensors, numel, fastmerge::kFloat32);
            need(factors.size() == tensors.size(), "one factor per model is needed");
            fastmerge::cpu::ram_apply(inputs.models, factors.data(), epsilon, reinterpret_cast<void*>(out.first),
                                      array(out).dtype);
        },
        release());
    m.def(
        "model_variance",
        [](const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel, uintptr_t out) {
            Inputs inputs(base, subtract, tensors, numel, fastmerge::kFloat32);
            fastmerge::cpu::model_variance(inputs.models, floats(out));
        },
        release());
    m.def(
        "energy_sums",
        [](const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel, uintptr_t mask,
           uintptr_t out) {
            Inputs inputs(base, subtract, tensors, numel, fastmerge::kFloat32);
            fastmerge::cpu::energy_sums(inputs.models, reinterpret_cast<const uint8_t*>(mask), numbers(out));
        },
        release());
    m.def(
        "divergences",
        [](const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel, int64_t width,
           uintptr_t out) {
            Inputs inputs(base, subtract, tensors, numel, fastmerge::kFloat32);
            need(width > 0 && numel % width == 0, "a chunk must hold whole rows");
            fastmerge::cpu::divergences(inputs.models, width, floats(out));
        },
        release());
    m.def(
        "importance",
        [](const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel, uintptr_t divergence,
           int64_t width, uintptr_t out) {
            Inputs inputs(base, subtract, tensors, numel, fastmerge::kFloat32);
            need(width > 0 && numel % width == 0, "a chunk must hold whole rows");
            fastmerge::cpu::importance(inputs.models, floats(divergence), width, floats(out));
        },
        release());
    m.attr("MOST_DIFFERENCES") = fastmerge::kMostDifferences;
    m.def(
        "trials",
        [](int kind, const std::vector<int32_t>& places, const std::vector<float>& factors, uint64_t limit,
           uint64_t seed, uint32_t stream, uint64_t offset, const std::vector<TrialTensor>& tensors) {
            fastmerge::cpu::trials(trials_of(kind, places, factors, limit, seed, stream, offset, tensors));
        },
        release());
    m.def(
        "discarded_words",
        [](uint64_t seed, uint64_t tensor_id, uint32_t stream, uint64_t first, int64_t count) {
            fastmerge::PhiloxStream s = fastmerge::philox_stream(seed, tensor_id, stream);
            fastmerge::cpu::discarded_words({s.k0, s.k1, s.c2, s.c3}, first, count);
        },
        release());
}
