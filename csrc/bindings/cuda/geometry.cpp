#include "fastmerge/geometry.h"

#include "bindings/cuda/arguments.h"

namespace fastmerge {
namespace bindings {

void bind_geometry(py::module_& m) {
    m.attr("GRAM_BLOCK") = kGramBlock;
    m.def("gram", [](const PlaceRef& where, const Ref& base, bool subtract, const std::vector<Ref>& tensors,
                     int64_t numel, int compute, int64_t row_length, uintptr_t out) {
        need(row_length > 0 && numel % row_length == 0, "tensors are made of whole rows");
        need(compute == kFloat32, "deltas are rounded to float32");
        done(cuda::gram(place(where), models(base, subtract, tensors, numel, compute), row_length,
                        address<double>(out)));
    });
}

}  // namespace bindings
}  // namespace fastmerge
