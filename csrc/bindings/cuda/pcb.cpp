#include <tuple>

#include "bindings/cuda/arguments.h"
#include "fastmerge/pcb.h"

namespace fastmerge {
namespace bindings {

namespace {

// (variant, clip, extremes, means), the last three as addresses
using PcbRef = std::tuple<int, uintptr_t, uintptr_t, uintptr_t>;

// The models that `models` makes, and the rule that scores them.
cuda::PcbArgs pcb_args(const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel,
                       const PcbRef& rule) {
    cuda::PcbArgs made{};
    made.models = models(base, subtract, tensors, numel, kFloat32);
    made.variant = std::get<0>(rule);
    made.clip = address<float>(std::get<1>(rule));
    made.extremes = address<float>(std::get<2>(rule));
    made.means = address<float>(std::get<3>(rule));
    need(made.variant >= kPcbScript && made.variant <= kPcbPaper, "variant code out of range");
    return made;
}

}  // namespace

void bind_pcb(py::module_& m) {
    m.def("pcb_scores", [](const PlaceRef& where, const Ref& base, bool subtract, const std::vector<Ref>& tensors,
                           int64_t numel, const PcbRef& rule, uintptr_t out) {
        cuda::PcbSweepArgs sweep{};
        sweep.sweep = cuda::kPcbScores;
        sweep.out = address<void>(out);
        sweep.stride = numel;
        done(cuda::pcb_sweep(place(where), pcb_args(base, subtract, tensors, numel, rule), sweep));
    });
    m.def("pcb_window",
          [](const PlaceRef& where, const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel,
             const PcbRef& rule, uintptr_t low, int64_t width, uintptr_t counts, uintptr_t highest) {
              cuda::PcbSweepArgs sweep{};
              sweep.sweep = cuda::kPcbWindow;
              sweep.low = address<int64_t>(low);
              sweep.counts = address<int64_t>(counts);
              sweep.width = width;
              sweep.highest = address<int64_t>(highest);
              done(cuda::pcb_sweep(place(where), pcb_args(base, subtract, tensors, numel, rule), sweep));
          });
    m.def("pcb_histogram",
          [](const PlaceRef& where, const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel,
             const PcbRef& rule, uintptr_t prefix, uintptr_t counts, uintptr_t highest, uintptr_t missing) {
              cuda::PcbSweepArgs sweep{};
              sweep.sweep = cuda::kPcbHistogram;
              sweep.low = address<int64_t>(prefix);
              sweep.counts = address<int64_t>(counts);
              sweep.highest = address<int64_t>(highest);
              sweep.missing = address<int32_t>(missing);
              done(cuda::pcb_sweep(place(where), pcb_args(base, subtract, tensors, numel, rule), sweep));
          });
    m.def("pcb_sample",
          [](const PlaceRef& where, const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel,
             const PcbRef& rule, uintptr_t out, int64_t stride, int64_t runs, int64_t first) {
              cuda::PcbSweepArgs sweep{};
              sweep.sweep = cuda::kPcbSample;
              sweep.out = address<void>(out);
              sweep.stride = stride;
              sweep.runs = runs;
              sweep.first = first;
              done(cuda::pcb_sweep(place(where), pcb_args(base, subtract, tensors, numel, rule), sweep));
          });
    m.def("pcb_collect", [](const PlaceRef& where, const Ref& base, bool subtract, const std::vector<Ref>& tensors,
                            int64_t numel, const PcbRef& rule, uintptr_t window, uintptr_t counts, uintptr_t highest,
                            uintptr_t keys, int64_t capacity) {
        cuda::PcbSweepArgs sweep{};
        sweep.sweep = cuda::kPcbCollect;
        sweep.window = address<int32_t>(window);
        sweep.counts = address<int64_t>(counts);
        sweep.highest = address<int64_t>(highest);
        sweep.out = address<void>(keys);
        sweep.stride = capacity;
        done(cuda::pcb_sweep(place(where), pcb_args(base, subtract, tensors, numel, rule), sweep));
    });
    m.def("pcb_apply", [](const PlaceRef& where, const Ref& base, bool subtract, const std::vector<Ref>& tensors,
                          int64_t numel, const PcbRef& rule, uintptr_t thresholds, const std::vector<float>& weights,
                          const Ref& out, uintptr_t scale) {
        need(weights.size() == tensors.size(), "one weight per model is needed");
        done(cuda::pcb_apply(place(where), pcb_args(base, subtract, tensors, numel, rule), address<float>(thresholds),
                             weights.data(), address<void>(out.first), array(out).dtype, address<float>(scale)));
    });
    m.def("pcb_extremes", [](const PlaceRef& where, const Ref& base, bool subtract, const std::vector<Ref>& tensors,
                             int64_t numel, uintptr_t ordered) {
        done(cuda::pcb_extremes(place(where), models(base, subtract, tensors, numel, kFloat32),
                                address<int32_t>(ordered)));
    });
    m.def("pcb_sums", [](const PlaceRef& where, const Ref& base, bool subtract, const std::vector<Ref>& tensors,
                         int64_t numel, const PcbRef& rule, uintptr_t limbs) {
        done(cuda::pcb_sums(place(where), pcb_args(base, subtract, tensors, numel, rule), address<int64_t>(limbs)));
    });
    m.def("pcb_collected_halves", [](const PlaceRef& where, int rows, uintptr_t keys, int64_t capacity,
                                     uintptr_t collected, uintptr_t prefix, uintptr_t counts) {
        done(cuda::pcb_collected_halves(place(where), rows, address<uint32_t>(keys), capacity,
                                        address<int64_t>(collected), address<int64_t>(prefix),
                                        address<int64_t>(counts)));
    });
    m.def("pcb_pick", [](const PlaceRef& where, int rows, uintptr_t counts, uintptr_t prefix, uintptr_t rank) {
        done(cuda::pcb_pick(place(where), rows, address<int64_t>(counts), address<int64_t>(prefix),
                            address<int64_t>(rank)));
    });
    m.def("pcb_likely_window", [](const PlaceRef& where, int rows, uintptr_t sample, int64_t size, uintptr_t places,
                                  int64_t most, uintptr_t memory, uintptr_t window) {
        done(cuda::pcb_likely_window(place(where), rows, address<int32_t>(sample), size, address<int64_t>(places), most,
                                     address<int32_t>(memory), address<int32_t>(window)));
    });
    m.def("pcb_settle", [](const PlaceRef& where, int rows, uintptr_t rank, uintptr_t window, uintptr_t collected,
                           int64_t capacity, uintptr_t prefix, uintptr_t found, uintptr_t missing) {
        done(cuda::pcb_settle(place(where), rows, address<int64_t>(rank), address<int32_t>(window),
                              address<int64_t>(collected), capacity, address<int64_t>(prefix), address<int64_t>(found),
                              address<int32_t>(missing)));
    });
}

}  // namespace bindings
}  // namespace fastmerge
