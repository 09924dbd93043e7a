// The module fastmerge._cuda: pointers of a GPU's memory, sizes and a stream in, nothing out but numbers. Compiled by
// any compiler with the emulator in the place of CUDA it is fastmerge._cuda_emulated, whose pointers are those of the
// CPU.
#include "bindings/cuda/arguments.h"

#ifndef FASTMERGE_CUDA_MODULE
#define FASTMERGE_CUDA_MODULE _cuda
#endif
#ifndef FASTMERGE_CUDA_ARCHITECTURES
#define FASTMERGE_CUDA_ARCHITECTURES ""
#endif

PYBIND11_MODULE(FASTMERGE_CUDA_MODULE, m) {
    namespace cuda = fastmerge::cuda;
    using fastmerge::bindings::done;
    using fastmerge::bindings::place;
    using fastmerge::bindings::PlaceRef;
    m.doc() = "CUDA kernels of fastmerge. Use fastmerge.ops instead.";
    m.attr("TIE_BLOCK") = cuda::kTieBlock;
    m.attr("MOST_MODELS") = cuda::kMostModels;
    m.attr("WINDOW_NUMBERS") = cuda::kWindowNumbers;
    m.attr("ARCHITECTURES") = FASTMERGE_CUDA_ARCHITECTURES;
    m.def("check_usable", &cuda::check_usable, "Why kernels cannot run here; an empty sentence where they can.");
    m.attr("MOST_NUMBERS") = cuda::kMostNumbers;
    m.def(
        "write_numbers",
        [](const PlaceRef& where, const std::vector<int64_t>& values, uintptr_t out) {
            fastmerge::bindings::need(values.size() <= cuda::kMostNumbers, "more numbers than a launch takes");
            int32_t count = static_cast<int32_t>(values.size());
            done(cuda::write_numbers(place(where), values.data(), count, fastmerge::bindings::address<int64_t>(out)));
        },
        "A few int64 numbers into the device's memory.");
    m.def("launches", &cuda::launches, "How many kernels were launched so far.");
    m.def("shared_limit", &cuda::shared_limit, "Bytes of shared memory that a block may have on the current device.");
    fastmerge::bindings::bind_select(m);
    fastmerge::bindings::bind_sparsify(m);
    fastmerge::bindings::bind_consensus(m);
    fastmerge::bindings::bind_pcb(m);
    fastmerge::bindings::bind_expert(m);
    fastmerge::bindings::bind_geometry(m);
    fastmerge::bindings::bind_importance(m);
    fastmerge::bindings::bind_evolve(m);
    fastmerge::bindings::bind_highpass(m);
}
