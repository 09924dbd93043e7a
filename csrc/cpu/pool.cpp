#include "cpu/pool.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/api.h"

namespace fastmerge {
namespace cpu {
namespace {

// This thread does a share of some caller's work: what that divides further it does alone.
thread_local bool within = false;

class Pool {
public:
    explicit Pool(int size) : owner_(getpid()) {
        for (int i = 1; i < size; ++i) workers_.emplace_back([this, i] { serve(i); });
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stopping_ = true;
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    bool is_mine() const { return owner_ == getpid(); }
    int size() const { return static_cast<int>(workers_.size()) + 1; }

    void run(int64_t items, const std::function<void(int64_t, int)>& work) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            work_ = &work;
            items_ = items;
            next_.store(0);
            failure_ = nullptr;
            busy_ = static_cast<int>(workers_.size());
            ++round_;
        }
        wake_.notify_all();
        take(work, 0);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return busy_ == 0; });
        work_ = nullptr;
        if (failure_) std::rethrow_exception(failure_);
    }

private:
    void take(const std::function<void(int64_t, int)>& work, int thread) {
        try {
            for (int64_t item = next_.fetch_add(1); item < items_; item = next_.fetch_add(1)) work(item, thread);
        } catch (...) {
            std::lock_guard<std::mutex> lock(mutex_);
            if (!failure_) failure_ = std::current_exception();
            next_.store(items_);
        }
    }

    void serve(int thread) {
        within = true;
        uint64_t seen = 0;
        for (;;) {
            const std::function<void(int64_t, int)>* work = nullptr;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return stopping_ || round_ != seen; });
                if (stopping_) return;
                seen = round_;
                work = work_;
            }
            take(*work, thread);
            std::lock_guard<std::mutex> lock(mutex_);
            if (--busy_ == 0) done_.notify_one();
        }
    }

    pid_t owner_;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    const std::function<void(int64_t, int)>* work_ = nullptr;
    std::atomic<int64_t> next_{0};
    int64_t items_ = 0;
    int busy_ = 0;
    uint64_t round_ = 0;
    bool stopping_ = false;
    std::exception_ptr failure_;
};

std::atomic<int> wanted{1};
std::mutex in_use;
Pool* pool = nullptr;

// A forked child inherits the object but not its threads: it leaves the old one alone and makes its own.
Pool& ready_pool() {
    if (pool != nullptr && !pool->is_mine()) pool = nullptr;
    if (pool != nullptr && pool->size() != wanted.load()) {
        delete pool;
        pool = nullptr;
    }
    if (pool == nullptr) pool = new Pool(wanted.load());
    return *pool;
}

}  // namespace

int threads() { return wanted.load(); }

void set_threads(int count) { wanted.store(count < 1 ? 1 : count); }

void parallel(int64_t items, const std::function<void(int64_t, int)>& work) {
    if (items > 1 && wanted.load() > 1 && !within) {
        std::unique_lock<std::mutex> lock(in_use, std::try_to_lock);
        if (lock.owns_lock()) {
            struct Inside {
                Inside() { within = true; }
                ~Inside() { within = false; }
            } inside;
            ready_pool().run(items, work);
            return;
        }
    }
    for (int64_t item = 0; item < items; ++item) work(item, 0);
}

}  // namespace cpu
}  // namespace fastmerge
