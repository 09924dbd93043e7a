#include "bindings/cuda/arguments.h"

namespace fastmerge {
namespace bindings {

namespace {

// x, n, H, W, and of each class the basis and its rank
using FilteredRef = std::tuple<Ref, int64_t, int64_t, int64_t, std::vector<std::pair<uintptr_t, int32_t>>>;

cuda::Filtered filtered(const FilteredRef& ref) {
    cuda::Filtered made{};
    Ref x;
    std::vector<std::pair<uintptr_t, int32_t>> bases;
    std::tie(x, made.matrices, made.height, made.width, bases) = ref;
    need(bases.size() == 1 || (bases.size() == 2 && made.height % 2 == 0), "the number of classes is out of range");
    need(made.width < (int64_t{1} << 31) - 128, "rows are longer than kernels count");
    made.x = array(x);
    made.classes = static_cast<int32_t>(bases.size());
    for (size_t i = 0; i < bases.size(); ++i) {
        made.basis[i] = address<const float>(bases[i].first);
        made.rank[i] = bases[i].second;
    }
    return made;
}

// lines of the whole spectrum, places of each, least, most, ring, whether wrapped, whether mirrored
using LimitsRef = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool>;

cuda::MaskLimits limits(const LimitsRef& ref) {
    cuda::MaskLimits made{};
    bool wrapped = false, mirrored = false;
    std::tie(made.size, made.across, made.least, made.most, made.ring, wrapped, mirrored) = ref;
    made.wrapped = wrapped ? 1 : 0;
    made.mirrored = mirrored ? 1 : 0;
    return made;
}

}  // namespace

void bind_highpass(py::module_& m) {
    m.def("highpass_splits", [](const PlaceRef& where, const FilteredRef& x, int64_t most) {
        AtPlace there = place(where);
        return cuda::highpass_splits(filtered(x), most);
    });
    m.def("highpass_project", [](const PlaceRef& where, const FilteredRef& x, int64_t splits, uintptr_t out) {
        done(cuda::highpass_project(place(where), filtered(x), splits, address<float>(out)));
    });
    m.def("highpass_subtract", [](const PlaceRef& where, const FilteredRef& x, uintptr_t coefficients, uintptr_t out) {
        done(
            cuda::highpass_subtract(place(where), filtered(x), address<const float>(coefficients), address<void>(out)));
    });
    m.def("highpass_mask", [](const PlaceRef& where, uintptr_t lines, const LimitsRef& mask, int64_t matrices,
                              int64_t first, int64_t count, float scale) {
        done(cuda::highpass_mask(place(where), address<float>(lines), limits(mask), matrices, first, count, scale));
    });
}

}  // namespace bindings
}  // namespace fastmerge
