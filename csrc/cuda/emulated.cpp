#include "cuda/device.h"

#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <mutex>
#include <vector>

namespace fastmerge {
namespace emulated {

Context context;

namespace {

constexpr size_t kStack = 128 << 10;

// --- fibers: a stack each, and the registers that a called function must keep

#if defined(__x86_64__)
extern "C" void fastmerge_switch(void** from, void* to);
asm(".text\n"
    ".type fastmerge_switch, @function\n"
    "fastmerge_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n");

struct Fiber {
    void* at = nullptr;
    std::vector<unsigned char> stack;

    void start(void (*entry)()) {
        stack.resize(kStack);
        uintptr_t top = (reinterpret_cast<uintptr_t>(stack.data()) + kStack) & ~static_cast<uintptr_t>(15);
        void** place = reinterpret_cast<void**>(top) - 8;
        for (int i = 0; i < 8; ++i) place[i] = nullptr;
        place[6] = reinterpret_cast<void*>(entry);  // after six registers, what `ret` returns to
        at = place;
    }
};

Fiber scheduler;
void go(Fiber& from, Fiber& to) { fastmerge_switch(&from.at, to.at); }
#else
struct Fiber {
    ucontext_t at;
    std::vector<unsigned char> stack;

    void start(void (*entry)()) {
        stack.resize(kStack);
        getcontext(&at);
        at.uc_stack.ss_sp = stack.data();
        at.uc_stack.ss_size = kStack;
        at.uc_link = nullptr;
        makecontext(&at, entry, 0);
    }
};

Fiber scheduler;
void go(Fiber& from, Fiber& to) { swapcontext(&from.at, &to.at); }
#endif

// --- a block
// ----------------------------------------------------------------------------------------------------------

struct Thread {
    Fiber fiber;
    Wait waits = Wait::kNothing;
};

std::vector<Thread> threads;
std::vector<uint64_t> said;      // by each thread, at the barrier that it waits for
std::vector<uint64_t> answered;  // of all threads, after whether any of them is not 0
const std::function<void()>* body;

[[noreturn]] void refuse(const char* why) {
    fprintf(stderr, "fastmerge: the emulated kernel is wrong: block %lld, thread %d: %s\n",
            static_cast<long long>(context.block), context.thread, why);
    abort();
}

void enter() {
    (*body)();
    int self = context.thread;
    threads[static_cast<size_t>(self)].waits = Wait::kEnded;
    for (;;) go(threads[static_cast<size_t>(self)].fiber, scheduler);
}

// Runs a thread until it waits.
void advance(int number) {
    Thread& one = threads[static_cast<size_t>(number)];
    context.thread = number;
    one.waits = Wait::kNothing;
    go(scheduler, one.fiber);
}

// What all threads from `first` on wait for, if it is the same.
Wait agreed(int first, int count) {
    Wait wait = threads[static_cast<size_t>(first)].waits;
    for (int i = first; i < first + count; ++i) {
        if (threads[static_cast<size_t>(i)].waits != wait) {
            context.thread = i;
            refuse("it waits for something else than the thread before, or has ended while that one waits");
        }
    }
    return wait;
}

bool backwards() {
    const char* order = getenv("FASTMERGE_EMULATED_ORDER");
    return order != nullptr && order[0] == 'r';
}

void run_block(int count, bool reverse) {
    auto each = [&](int size, auto&& work) {
        for (int i = 0; i < size; ++i) work(reverse ? size - 1 - i : i);
    };
    for (int i = 0; i < count; ++i) {
        threads[static_cast<size_t>(i)].fiber.start(enter);
        threads[static_cast<size_t>(i)].waits = Wait::kBlock;
    }
    for (;;) {
        // Each warp goes on until all of it waits for the block, or has ended.
        each(count / 32, [&](int warp) {
            do {
                uint64_t* copy = answered.data() + 1 + 32 * warp;
                if (threads[static_cast<size_t>(32 * warp)].waits == Wait::kWarp) {
                    for (int i = 0; i < 32; ++i) copy[i] = said[static_cast<size_t>(32 * warp + i)];
                }
                each(32, [&](int i) { advance(32 * warp + i); });
            } while (agreed(32 * warp, 32) == Wait::kWarp);
        });
        if (agreed(0, count) == Wait::kEnded) return;
        answered[0] = 0;
        for (int i = 0; i < count; ++i) {
            answered[static_cast<size_t>(i) + 1] = said[static_cast<size_t>(i)];
            answered[0] |= said[static_cast<size_t>(i)];
        }
    }
}

}  // namespace

const uint64_t* meet(Wait wait, uint64_t value) {
    int self = context.thread;
    Thread& one = threads[static_cast<size_t>(self)];
    said[static_cast<size_t>(self)] = value;
    one.waits = wait;
    go(one.fiber, scheduler);
    return answered.data() + 1 + (wait == Wait::kWarp ? self / 32 * 32 : 0);
}

namespace {

int device = 0;

struct Range {
    uintptr_t begin, end;
};
std::vector<Range> forbidden;

void read_forbidden() {
    forbidden.clear();
    const char* text = getenv("FASTMERGE_EMULATED_FORBIDDEN");
    while (text != nullptr && *text != 0) {
        char* rest;
        uintptr_t begin = strtoull(text, &rest, 10), end = *rest == '-' ? strtoull(rest + 1, &rest, 10) : 0;
        if (end <= begin) refuse("FASTMERGE_EMULATED_FORBIDDEN is no list of ranges");
        forbidden.push_back({begin, end});
        text = *rest == ',' ? rest + 1 : rest;
    }
}

}  // namespace

void enter_device(int wanted) {
    if (device != 0) refuse("the launch before has not given the host its device back");
    device = wanted;
}

void leave_device() { device = 0; }

void touch(const void* address, size_t bytes) {
    uintptr_t begin = reinterpret_cast<uintptr_t>(address);
    if (begin % bytes != 0) refuse("a load or store at an address that is no multiple of its width");
    for (const Range& range : forbidden) {
        if (begin < range.end && begin + bytes > range.begin) refuse("a load or store of what is no tensor's");
    }
}

int64_t shared_limit() {
    const char* forced = getenv("FASTMERGE_EMULATED_SHARED");
    return forced != nullptr ? atoll(forced) : 227 << 10;
}

void run(int64_t grid, int count, size_t shared, const std::function<void()>& work) {
    static std::mutex mutex;
    std::lock_guard<std::mutex> lock(mutex);
    if (static_cast<int64_t>(shared) > shared_limit()) refuse("more shared memory than a block may have");
    if (count % 32 != 0 || count > 1024) refuse("a block has whole warps, and at most 1024 threads");
    threads.resize(static_cast<size_t>(count));
    said.assign(static_cast<size_t>(count), 0);
    answered.assign(static_cast<size_t>(count) + 1, 0);
    body = &work;
    read_forbidden();
    std::vector<uint64_t> memory(shared / 8 + 2);
    bool reverse = backwards();
    for (int64_t i = 0; i < grid; ++i) {
        for (uint64_t& word : memory) word = 0xa5c3a5c3a5c3a5c3ull;
        unsigned char* start = reinterpret_cast<unsigned char*>(memory.data());
        context = {0, reverse ? grid - 1 - i : i, grid, start + reinterpret_cast<uintptr_t>(start) % 16};
        run_block(count, reverse);
    }
}

}  // namespace emulated

}  // namespace fastmerge
