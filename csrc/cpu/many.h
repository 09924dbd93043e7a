// Many tensors in one operation: small ones side by side, each on one thread; large ones one after the other.
#pragma once

#include <vector>

#include "cpu/api.h"
#include "cpu/pool.h"

namespace fastmerge {
namespace cpu {

// Tensor t: its models' arrays, and where its tie blocks begin among those of all.
class Each {
public:
    Each(const Many& many, int64_t t) : arrays_(static_cast<size_t>(many.models)) {
        const int64_t* row = many.addresses + t * many.models;
        for (int32_t m = 0; m < many.models; ++m) {
            arrays_[static_cast<size_t>(m)] = {reinterpret_cast<const void*>(row[m]), many.dtype};
        }
        base = {many.bases == nullptr ? nullptr : reinterpret_cast<const void*>(many.bases[t]), many.base_dtype};
        models.base = many.subtract ? base : Array{nullptr, 0};
        models.models = arrays_.data();
        models.count = many.models;
        models.compute = many.compute;
        models.numel = many.lengths[t];
    }
    Each(const Each&) = delete;
    Each& operator=(const Each&) = delete;

    Array base;
    Models models;

private:
    std::vector<Array> arrays_;
};

// Where each tensor's tie blocks begin among those of all, and how many there are.
inline std::vector<int64_t> first_blocks(const Many& many) {
    std::vector<int64_t> first(1, 0);
    for (int64_t t = 0; t < many.tensors; ++t) first.push_back(first.back() + tie_blocks(many.lengths[t]));
    return first;
}

// Calls work(t) for each tensor.
template <class Work>
void over_tensors(const Many& many, const Work& work) {
    std::vector<int64_t> small;
    for (int64_t t = 0; t < many.tensors; ++t) {
        if (many.lengths[t] <= kTieBlock) {
            small.push_back(t);
        } else {
            work(t);
        }
    }
    parallel(static_cast<int64_t>(small.size()), [&](int64_t i, int) { work(small[static_cast<size_t>(i)]); });
}

}  // namespace cpu
}  // namespace fastmerge
