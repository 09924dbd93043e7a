#include "bindings/cuda/arguments.h"

namespace fastmerge {
namespace bindings {

void bind_importance(py::module_& m) {
    m.def("nearswap", [](const PlaceRef& where, const Ref& base, const Ref& x, int64_t numel, float t, const Ref& out) {
        done(cuda::nearswap(place(where), models(base, true, {x}, numel, kFloat32), t, address<void>(out.first),
                            array(out).dtype));
    });
    m.def("ram_apply", [](const PlaceRef& where, const Ref& base, const std::vector<Ref>& tensors, int64_t numel,
                          const std::vector<float>& factors, float epsilon, const Ref& out) {
        need(factors.size() == tensors.size(), "a factor for each model");
        done(cuda::ram_apply(place(where), models(base, true, tensors, numel, kFloat32), factors.data(), epsilon,
                             address<void>(out.first), array(out).dtype));
    });
    m.def("ram_counts", [](const PlaceRef& where, const Ref& base, const std::vector<Ref>& tensors, int64_t numel,
                           float epsilon, uintptr_t counts) {
        done(cuda::ram_counts(place(where), models(base, true, tensors, numel, kFloat32), epsilon,
                              address<int64_t>(counts)));
    });
    m.def("model_variance", [](const PlaceRef& where, const Ref& base, const std::vector<Ref>& tensors, int64_t numel,
                               uintptr_t out) {
        done(cuda::model_variance(place(where), models(base, true, tensors, numel, kFloat32), address<float>(out)));
    });
    m.def("energy_sums", [](const PlaceRef& where, const Ref& base, const std::vector<Ref>& tensors, int64_t numel,
                            const RuleRef& kept, uintptr_t limbs) {
        done(cuda::energy_sums(place(where), models(base, true, tensors, numel, kFloat32), rule(kept),
                               address<int64_t>(limbs)));
    });
    m.def("importance", [](const PlaceRef& where, const Ref& base, const Ref& x, int64_t numel, uintptr_t divergence,
                           int64_t width, uintptr_t out) {
        need(width > 0 && numel % width == 0, "tensors are made of whole rows");
        done(cuda::importance(place(where), models(base, true, {x}, numel, kFloat32), address<const float>(divergence),
                              width, address<float>(out)));
    });
    m.def("row_memory", [](const PlaceRef& where, int64_t width) {
        place(where);
        return cuda::row_memory(width);
    });
    m.def("divergences", [](const PlaceRef& where, const Ref& base, const Ref& x, int64_t width, int64_t first,
                            int64_t count, uintptr_t memory, uintptr_t out) {
        need(width > 0, "rows have elements");
        done(cuda::divergences(place(where), array(base), array(x), width, first, count, address<float>(memory),
                               address<float>(out)));
    });
}

}  // namespace bindings
}  // namespace fastmerge
