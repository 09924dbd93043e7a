#include "bindings/cuda/arguments.h"

namespace fastmerge {
namespace bindings {

// kind, places of the parents, factors, limit, seed, stream, offset
using TrialRef = std::tuple<int, std::vector<int32_t>, std::vector<float>, uint64_t, uint64_t, uint32_t, uint64_t>;

cuda::Trial trial(const TrialRef& ref, const std::vector<Ref>& tensors, const Ref& out) {
    const auto& [kind, places, factors, limit, seed, stream, offset] = ref;
    bool blend = kind == kBlend;
    need(blend || kind == kDifferences, "kind of trial out of range");
    need(!tensors.empty() && tensors.size() <= kMostParents, "the number of tensors is out of range");
    need(blend ? factors.size() == 2 : !factors.empty() && factors.size() <= kMostDifferences,
         "the number of factors is out of range");
    need(places.size() == (blend ? 1 : 1 + 2 * factors.size()), "a place for each parent");
    cuda::Trial made{};
    for (size_t i = 0; i < tensors.size(); ++i) made.tensors[i] = array(tensors[i]);
    made.count = static_cast<int32_t>(tensors.size());
    made.kind = kind;
    for (size_t i = 0; i < places.size(); ++i) {
        need(places[i] >= 0 && places[i] < made.count, "a place out of range");
        made.places[i] = places[i];
    }
    made.differences = blend ? 0 : static_cast<int32_t>(factors.size());
    for (size_t i = 0; i < factors.size(); ++i) made.factors[i] = factors[i];
    made.limit = limit;
    made.seed = seed;
    made.stream = stream;
    made.offset = offset;
    made.out = address<void>(out.first);
    made.out_dtype = array(out).dtype;
    return made;
}

void bind_evolve(py::module_& m) {
    m.attr("TRIAL_TILE") = cuda::kTrialTile;
    m.def("trial", [](const PlaceRef& where, const TrialRef& ref, const std::vector<Ref>& tensors, int64_t numel,
                      uint64_t tensor_id, int64_t forced, const Ref& out) {
        cuda::Trial made = trial(ref, tensors, out);
        made.numel = numel;
        made.tensor_id = tensor_id;
        made.forced = forced;
        done(cuda::trial(place(where), made, 0));
    });
    // Many tensors: of `tensors` and `out` the dtypes count.
    m.def("trial_many", [](const PlaceRef& where, const TrialRef& ref, const std::vector<Ref>& tensors, const Ref& out,
                           uintptr_t table, uintptr_t tensor_of, int64_t tiles) {
        cuda::Trial made = trial(ref, tensors, out);
        made.table = address<const int64_t>(table);
        made.tensor_of = address<const int32_t>(tensor_of);
        done(cuda::trial(place(where), made, tiles));
    });
}

}  // namespace bindings
}  // namespace fastmerge
