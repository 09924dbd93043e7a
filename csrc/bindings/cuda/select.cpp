#include "bindings/cuda/arguments.h"

namespace fastmerge {
namespace bindings {

void bind_select(py::module_& m) {
    using cuda::Digit;
    using cuda::Work;

    py::class_<Work>(m, "Work", "Tensors that one family's kernels go through.")
        .def(py::init([](const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel, int compute,
                         const std::vector<int64_t>& numbers, uintptr_t table, int64_t count, int64_t blocks,
                         int64_t blocks_results, int kind, bool together) {
            need(kind >= 0 && kind <= 2, "the kind of keys is out of range");
            need(numbers.size() <= 2 * cuda::kMostModels, "there are more numbers than ranks");
            Work work{};
            work.models = models(base, subtract, tensors, numel, compute);
            for (size_t i = 0; i < numbers.size(); ++i) work.number[i] = numbers[i];
            work.table = address<const int64_t>(table);
            work.tensors = count;
            work.blocks = blocks;
            work.blocks_results = blocks_results;
            work.kind = kind;
            work.together = together;
            return work;
        }));

    m.def("count_keys",
          [](const PlaceRef& where, const Work& work, int shift, int width, bool ranked, uintptr_t counts) {
              done(cuda::count_keys(place(where), work, Digit{shift, width}, ranked, address<int64_t>(counts)));
          });
    m.def("count_digit", [](const PlaceRef& where, const Work& work, int shift, int width, uintptr_t state,
                            uintptr_t counts, uintptr_t found, int ranks) {
        done(cuda::count_digit(place(where), work, Digit{shift, width}, address<const int64_t>(state),
                               address<int64_t>(counts), address<int32_t>(found), ranks));
    });
    m.def("choose_digit", [](const PlaceRef& where, const Work& work, int shift, int width, uintptr_t state,
                             uintptr_t counts, uintptr_t bounds, uintptr_t magnitude) {
        done(cuda::choose_digit(place(where), work, Digit{shift, width}, address<int64_t>(state),
                                address<int64_t>(counts), address<int64_t>(bounds), address<float>(magnitude)));
    });
    m.def("count_ties", [](const PlaceRef& where, const Work& work, uintptr_t bounds, uintptr_t counts) {
        done(cuda::count_ties(place(where), work, address<const int64_t>(bounds), address<int64_t>(counts)));
    });
    m.def("sum_ties",
          [](const PlaceRef& where, const Work& work, uintptr_t bounds, uintptr_t found, int ranks, uintptr_t ties) {
              done(cuda::sum_ties(place(where), work, address<const int64_t>(bounds), address<const int32_t>(found),
                                  ranks, address<int64_t>(ties)));
          });
    m.def("bounds_of_small", [](const PlaceRef& where, const Work& work, uintptr_t bounds, uintptr_t ties_before) {
        done(cuda::bounds_of_small(place(where), work, address<int64_t>(bounds), address<int64_t>(ties_before)));
    });
    m.def("count_window", [](const PlaceRef& where, const Work& work, int64_t width, uintptr_t counts) {
        done(cuda::count_window(place(where), work, width, address<int64_t>(counts)));
    });
    m.def("mask_band", [](const PlaceRef& where, const Ref& x, int64_t numel, uintptr_t bounds, uintptr_t ties_before,
                          uintptr_t out) {
        done(cuda::mask_band(place(where), array(x), numel, address<const int64_t>(bounds),
                             address<const int64_t>(ties_before), address<uint8_t>(out)));
    });
}

}  // namespace bindings
}  // namespace fastmerge
