#include "bindings/cuda/arguments.h"

namespace fastmerge {
namespace bindings {
namespace {

// base, whether it is subtracted, x, compute, rows, their length, density, epsilon, seed, tensor id, offset, stream
using RowsRef =
    std::tuple<Ref, bool, Ref, int, int64_t, int64_t, double, double, uint64_t, uint64_t, uint64_t, uint32_t>;

cuda::Rows rows(const RowsRef& ref) {
    cuda::Rows made{};
    Ref base, x;
    bool subtract = false;
    std::tie(base, subtract, x, made.compute, made.count, made.length, made.density, made.epsilon, made.seed,
             made.tensor_id, made.offset, made.stream) = ref;
    made.base = subtract ? array(base) : cuda::Array{nullptr, 0};
    made.x = array(x);
    return made;
}

}  // namespace

void bind_sparsify(py::module_& m) {
    m.def("count_nonfinite", [](const PlaceRef& where, const Ref& x, int64_t numel, uintptr_t out) {
        done(cuda::count_nonfinite(place(where), array(x), numel, address<int64_t>(out)));
    });
    m.def("zero_nonfinite", [](const PlaceRef& where, const Ref& x, int64_t numel) {
        done(cuda::zero_nonfinite(place(where), address<void>(x.first), array(x).dtype, numel));
    });
    m.def("kept_masks", [](const PlaceRef& where, const Ref& base, bool subtract, const std::vector<Ref>& tensors,
                           int64_t numel, int compute, const RuleRef& kept, uintptr_t masks) {
        done(cuda::kept_masks(place(where), models(base, subtract, tensors, numel, compute), rule(kept),
                              address<uint8_t>(masks)));
    });
    m.def("l1_sums", [](const PlaceRef& where, const Ref& base, bool subtract, const std::vector<Ref>& tensors,
                        int64_t numel, int compute, const RuleRef& kept, uintptr_t limbs) {
        done(cuda::l1_sums(place(where), models(base, subtract, tensors, numel, compute), rule(kept),
                           address<int64_t>(limbs)));
    });
    m.def("ranks_rows", [](const PlaceRef& where, int64_t length) {
        place(where);
        return cuda::ranks_rows(length);
    });
    m.def("rank_rows", [](const PlaceRef& where, const RowsRef& some, int most_open, uintptr_t mask) {
        done(cuda::rank_rows(place(where), rows(some), most_open, address<uint8_t>(mask)));
    });
    m.def("row_keys", [](const PlaceRef& where, const RowsRef& some, uintptr_t keys) {
        done(cuda::row_keys(place(where), rows(some), address<int32_t>(keys)));
    });
    m.def("row_masks", [](const PlaceRef& where, const RowsRef& some, uintptr_t sorted, uintptr_t mask) {
        done(cuda::row_masks(place(where), rows(some), address<const int32_t>(sorted), address<uint8_t>(mask)));
    });
}

}  // namespace bindings
}  // namespace fastmerge
