// Memory for what the threads of one operation collect, and do not know the size of beforehand.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "cpu/api.h"

namespace fastmerge {
namespace cpu {

// Memory for the collected keys, kept between calls because fresh pages cost more than the keys that go into them.
class Arena {
public:
    uint32_t* reserve(int64_t count) {
        if (chunk_ < chunks_.size() && used_ + count > kChunk) next();
        if (chunk_ >= chunks_.size()) {
            chunks_.emplace_back(static_cast<uint32_t*>(std::malloc(kChunk * sizeof(uint32_t))), &std::free);
            if (!chunks_.back()) throw std::bad_alloc();
            used_ = 0;
        }
        return chunks_[chunk_].get() + used_;
    }

    void keep(int64_t count) { used_ += count; }

    void rewind() {
        if (chunks_.size() > kKept) chunks_.resize(kKept);
        chunk_ = 0;
        used_ = 0;
    }

private:
    static constexpr int64_t kChunk = int64_t{1} << 19;  // 2 MiB
    static constexpr size_t kKept = 8;

    void next() {
        ++chunk_;
        used_ = 0;
    }

    struct Chunk : std::unique_ptr<uint32_t, void (*)(void*)> {
        Chunk() : std::unique_ptr<uint32_t, void (*)(void*)>(nullptr, &std::free) {}
        Chunk(uint32_t* memory, void (*release)(void*)) : std::unique_ptr<uint32_t, void (*)(void*)>(memory, release) {}
    };
    std::vector<Chunk> chunks_;
    size_t chunk_ = 0;
    int64_t used_ = 0;
};

// One arena per thread. Those of earlier calls are used again.
class Arenas {
public:
    Arenas() {
        {
            std::lock_guard<std::mutex> lock(mutex());
            if (!spare().empty()) {
                arenas_ = std::move(spare().back());
                spare().pop_back();
            }
        }
        if (arenas_.size() < static_cast<size_t>(threads())) arenas_.resize(static_cast<size_t>(threads()));
    }
    ~Arenas() {
        for (Arena& arena : arenas_) arena.rewind();
        std::lock_guard<std::mutex> lock(mutex());
        spare().push_back(std::move(arenas_));
    }
    Arenas(const Arenas&) = delete;
    Arenas& operator=(const Arenas&) = delete;

    Arena& of(int thread) { return arenas_[static_cast<size_t>(thread)]; }

private:
    static std::mutex& mutex() {
        static std::mutex one;
        return one;
    }

    static std::vector<std::vector<Arena>>& spare() {
        static std::vector<std::vector<Arena>> kept;
        return kept;
    }

    std::vector<Arena> arenas_;
};

}  // namespace cpu
}  // namespace fastmerge
