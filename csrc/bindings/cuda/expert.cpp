#include "bindings/cuda/arguments.h"

namespace fastmerge {
namespace bindings {

void bind_expert(py::module_& m) {
    m.attr("EXPERT_ENTRIES") = cuda::kEntries;
    m.def("expert_apply", [](const PlaceRef& where, uintptr_t parts, int32_t count, int64_t blocks) {
        done(cuda::expert_apply(place(where), address<const cuda::ExpertPart>(parts), count, blocks));
    });
    m.def("expert_revert", [](const PlaceRef& where, uintptr_t parts, int32_t count, int64_t blocks, uintptr_t changed,
                              int32_t tensors) {
        done(cuda::expert_revert(place(where), address<const cuda::ExpertPart>(parts), count, blocks,
                                 address<int64_t>(changed), tensors));
    });
}

}  // namespace bindings
}  // namespace fastmerge
