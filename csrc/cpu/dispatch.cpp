// Which copy of the kernels runs: the fastest that this processor has, unless one is asked for.
#include <atomic>

#include "cpu/api.h"

#define FASTMERGE_DECLARE(name) extern "C" const fastmerge::cpu::Kernels* fastmerge_kernels_##name();

#if defined(__x86_64__) || defined(_M_X64)
FASTMERGE_DECLARE(avx512)
FASTMERGE_DECLARE(avx2)
FASTMERGE_DECLARE(baseline)
#elif defined(__aarch64__)
FASTMERGE_DECLARE(neon)
#else
FASTMERGE_DECLARE(baseline)
#endif

namespace fastmerge {
namespace cpu {
namespace {

struct Choice {
    const char* name;
    const Kernels* (*table)();
};

std::vector<Choice> choices() {
    std::vector<Choice> found;
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2"))
        found.push_back({"avx512", fastmerge_kernels_avx512});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2"))
        found.push_back({"avx2", fastmerge_kernels_avx2});
    found.push_back({"baseline", fastmerge_kernels_baseline});
#elif defined(__aarch64__)
    found.push_back({"neon", fastmerge_kernels_neon});
#else
    found.push_back({"baseline", fastmerge_kernels_baseline});
#endif
    return found;
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const Choice& choice : choices()) names.push_back(choice.name);
    return names;
}

const Kernels& kernels() {
    const Kernels* table = current.load();
    if (table == nullptr) {
        table = choices().front().table();
        current.store(table);
    }
    return *table;
}

std::string isa() { return kernels().name; }

bool set_isa(const std::string& name) {
    for (const Choice& choice : choices()) {
        if (name == choice.name) {
            current.store(choice.table());
            return true;
        }
    }
    return false;
}

}  // namespace cpu
}  // namespace fastmerge
