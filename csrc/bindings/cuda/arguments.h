// Arguments as Python hands them over, made into what the kernels take. Checks only what would crash.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/api.h"

namespace py = pybind11;

namespace fastmerge {
namespace bindings {

// (address, dtype code): 0 float32, 1 bfloat16, 2 float16
using Ref = std::pair<uintptr_t, int>;

// Number of the device, and the stream of it on which everything is enqueued.
using PlaceRef = std::pair<int, uintptr_t>;

inline void need(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(what);
}

// RuntimeError with CUDA's sentence where a launch was refused.
inline void done(int error) {
    if (error != 0) throw std::runtime_error(std::string("CUDA: ") + cuda::error_text(error));
}

// A stream whose device is the thread's as long as this lives: the caller's comes back behind the launches.
class AtPlace {
public:
    explicit AtPlace(const PlaceRef& ref) : stream_(reinterpret_cast<void*>(ref.second)) {
        done(cuda::enter_device(ref.first, &before_));
    }
    AtPlace(const AtPlace&) = delete;
    AtPlace& operator=(const AtPlace&) = delete;
    ~AtPlace() { cuda::leave_device(before_); }
    operator cuda::Place() const { return {stream_}; }

private:
    void* stream_;
    void* before_ = nullptr;
};

inline AtPlace place(const PlaceRef& ref) { return AtPlace(ref); }

inline cuda::Array array(const Ref& ref) {
    need(ref.second >= 0 && ref.second <= 2, "dtype code out of range");
    return {reinterpret_cast<const void*>(ref.first), ref.second};
}

template <class T>
T* address(uintptr_t number) {
    return reinterpret_cast<T*>(number);
}

inline cuda::Models models(const Ref& base, bool subtract, const std::vector<Ref>& tensors, int64_t numel,
                           int compute) {
    need(!tensors.empty() && tensors.size() <= cuda::kMostModels, "the number of models is out of range");
    need(compute >= 0 && compute <= 2, "compute dtype code out of range");
    cuda::Models made{};
    made.base = subtract ? array(base) : cuda::Array{nullptr, 0};
    made.count = static_cast<int32_t>(tensors.size());
    made.compute = compute;
    made.numel = numel;
    for (size_t i = 0; i < tensors.size(); ++i) {
        cuda::Array x = array(tensors[i]);
        made.data[i] = x.data;
        made.dtype[i] = static_cast<int8_t>(x.dtype);
    }
    return made;
}

// method, bounds, ties_before, tie blocks, limits, streams, seed, tensor id, offset, masks, bytes of a row of masks
using RuleRef = std::tuple<int, uintptr_t, uintptr_t, int64_t, std::vector<uint64_t>, std::vector<uint32_t>, uint64_t,
                           uint64_t, uint64_t, uintptr_t, int64_t>;

inline cuda::Rule rule(const RuleRef& ref) {
    cuda::Rule made{};
    std::vector<uint64_t> limits;
    std::vector<uint32_t> streams;
    uintptr_t bounds = 0, ties_before = 0, masks = 0;
    std::tie(made.method, bounds, ties_before, made.blocks, limits, streams, made.seed, made.tensor_id, made.offset,
             masks, made.mask_stride) = ref;
    need(limits.size() <= cuda::kMostModels && streams.size() == limits.size(), "random words of too many models");
    for (size_t i = 0; i < limits.size(); ++i) {
        made.limit[i] = limits[i];
        made.stream[i] = streams[i];
    }
    made.bounds = address<const int64_t>(bounds);
    made.ties_before = address<const int64_t>(ties_before);
    made.masks = address<const uint8_t>(masks);
    return made;
}

// One function per family: what it adds to the module.
void bind_select(py::module_& m);
void bind_sparsify(py::module_& m);
void bind_consensus(py::module_& m);
void bind_pcb(py::module_& m);
void bind_expert(py::module_& m);
void bind_geometry(py::module_& m);
void bind_importance(py::module_& m);
void bind_evolve(py::module_& m);
void bind_highpass(py::module_& m);

}  // namespace bindings
}  // namespace fastmerge
