#include "bindings/cuda/arguments.h"

namespace fastmerge {
namespace bindings {
namespace {

// weights, scales, election, divisor, zero sign, divisor value, lambda, whether zeros stay when they are divided
using FormulaRef = std::tuple<std::vector<float>, std::vector<float>, int, int, float, float, float, bool>;

cuda::Formula formula(const FormulaRef& ref, int32_t models) {
    cuda::Formula made{};
    std::vector<float> weights, scales;
    bool zeros_stay = false;
    std::tie(weights, scales, made.election, made.divisor, made.zero_sign, made.divisor_value, made.lambda,
             zeros_stay) = ref;
    size_t count = static_cast<size_t>(models);
    need(weights.size() == count && scales.size() == count, "a weight and a scale for each model");
    for (size_t i = 0; i < count; ++i) {
        made.weight[i] = weights[i];
        made.scale[i] = scales[i];
    }
    made.zeros_stay = zeros_stay ? 1 : 0;
    return made;
}

}  // namespace

void bind_consensus(py::module_& m) {
    m.def("consensus_apply",
          [](const PlaceRef& where, const Ref& base, bool subtract, bool add, const std::vector<Ref>& tensors,
             int64_t numel, int compute, const RuleRef& kept, const FormulaRef& numbers, const Ref& out) {
              cuda::Models inputs = models(base, subtract, tensors, numel, compute);
              cuda::Array added = add ? array(base) : cuda::Array{nullptr, 0};
              done(cuda::consensus_apply(place(where), inputs, rule(kept), formula(numbers, inputs.count), added,
                                         address<void>(out.first), array(out).dtype));
          });
    m.def("part_of", &cuda::part_of, "Elements that a block of a merge takes, where there are so many in all.");
    // base, tensors: of addresses only whether there is one counts; the others are in the table.
    m.def("consensus_apply_many",
          [](const PlaceRef& where, const Ref& base, bool subtract, bool add, const std::vector<Ref>& tensors,
             int compute, const RuleRef& kept, const FormulaRef& numbers, int out_dtype, uintptr_t table,
             uintptr_t tensor_of, int64_t parts, int64_t part) {
              cuda::Models inputs = models(base, subtract, tensors, 0, compute);
              cuda::Array added = add ? array(base) : cuda::Array{nullptr, 0};
              cuda::Tensors listed = {address<const int64_t>(table), address<const int32_t>(tensor_of)};
              done(cuda::consensus_apply_many(place(where), inputs, rule(kept), formula(numbers, inputs.count), added,
                                              out_dtype, listed, parts, part));
          });
}

}  // namespace bindings
}  // namespace fastmerge
