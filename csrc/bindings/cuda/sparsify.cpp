#include "bindings/cuda/arguments.h"

namespace fastmerge {
namespace bindings {

void bind_sparsify(py::module_& m) {
    m.def("count_nonfinite", [](const PlaceRef& where, const Ref& x, int64_t numel, uintptr_t out) {
        done(cuda::count_nonfinite(place(where), array(x), numel, address<int64_t>(out)));
    });
    m.def("zero_nonfinite", [](const PlaceRef& where, const Ref& x, int64_t numel) {
        done(cuda::zero_nonfinite(place(where), address<void>(x.first), array(x).dtype, numel));
    });
}

}  // namespace bindings
}  // namespace fastmerge
