// Order statistics of keys in memory.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

namespace fastmerge {
namespace cpu {

// A histogram finds the bin of a rank, and only that bin is looked into.
class Counted {
public:
    struct Span {
        const uint32_t* keys;
        int64_t count;
    };

    // All keys lie within [least, most].
    Counted(std::vector<Span> spans, uint32_t least, uint32_t most) : spans_(std::move(spans)), least_(least) {
        while (((most - least) >> shift_) >= kBins) ++shift_;
        // Two sets of bins, so that neighbours that are equal do not wait for one counter.
        std::vector<int64_t> raw(2 * kBins, 0);
        for (const Span& span : spans_)
            for (int64_t i = 0; i < span.count; ++i) ++raw[static_cast<size_t>((i % 2) * kBins + bin(span.keys[i]))];
        for (size_t b = 0; b < kBins; ++b) bins_[b] = raw[b] + raw[kBins + b];
    }

    struct Place {
        uint32_t key;
        int64_t greater, equal;
    };

    // The rank-th largest, rank from 1 to the number of keys.
    Place largest(int64_t rank) const {
        int64_t chosen = kBins - 1, passed = 0;
        while (passed + bins_[static_cast<size_t>(chosen)] < rank) passed += bins_[static_cast<size_t>(chosen--)];
        // Written without a branch, hence one place more than there are keys.
        std::vector<uint32_t> few(static_cast<size_t>(bins_[static_cast<size_t>(chosen)]) + 1);
        size_t found = 0;
        for (const Span& span : spans_) {
            for (int64_t i = 0; i < span.count; ++i) {
                few[found] = span.keys[i];
                found += bin(span.keys[i]) == chosen;
            }
        }
        few.pop_back();
        int64_t local = rank - passed - 1;
        std::nth_element(few.begin(), few.begin() + local, few.end(), [](uint32_t x, uint32_t y) { return x > y; });
        Place place = {few[static_cast<size_t>(local)], passed, 0};
        for (uint32_t key : few) {
            place.greater += key > place.key;
            place.equal += key == place.key;
        }
        return place;
    }

private:
    static constexpr int64_t kBins = 4096;

    int64_t bin(uint32_t key) const { return static_cast<int64_t>((key - least_) >> shift_); }

    std::vector<Span> spans_;
    uint32_t least_;
    int shift_ = 0;
    std::array<int64_t, kBins> bins_{};
};

}  // namespace cpu
}  // namespace fastmerge
