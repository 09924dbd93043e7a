// A program without Python or Torch that runs the kernels on small inputs: every instruction set of this processor must
// give the same bits as the first, and selection, rounding and random words must agree with plain code written here.
// Prints one line and ends with 0, or says what differs and ends with 1.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/api.h"
#include "fastmerge/consensus.h"
#include "fastmerge/evolve.h"
#include "fastmerge/geometry.h"
#include "fastmerge/pcb.h"
#include "fastmerge/philox.h"
#include "fastmerge/sparsify.h"

namespace {

using namespace fastmerge;
using namespace fastmerge::cpu;

int failures = 0;

void check(bool good, const std::string& what) {
    if (good) return;
    ++failures;
    std::fprintf(stderr, "wrong: %s (%s)\n", what.c_str(), isa().c_str());
}

uint64_t state = 1;
uint32_t draw() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state >> 32);
}

// Half-precision weights and fine-tunes near them, with equal deltas, zeros, a NaN and an infinity.
struct Family {
    int64_t numel;
    std::vector<uint16_t> base;
    std::vector<std::vector<uint16_t>> models;
    std::vector<Array> arrays;

    Family(int64_t count, int n) : numel(count), base(static_cast<size_t>(count)) {
        for (auto& value : base) value = round_bfloat16(static_cast<float>(static_cast<int32_t>(draw())) * 1e-11f);
        for (int m = 0; m < n; ++m) {
            models.push_back(base);
            for (auto& value : models.back())
                if (draw() % 3 != 0) value = static_cast<uint16_t>(value + draw() % 5 - 2);
        }
        if (count > 100) {
            models[0][50] = 0x7fc0;
            models[0][51] = 0xff80;
        }
        for (auto& model : models) arrays.push_back({model.data(), kBFloat16});
    }

    Models view() const {
        Models result;
        result.base = {base.data(), kBFloat16};
        result.models = arrays.data();
        result.count = static_cast<int32_t>(arrays.size());
        result.compute = kFloat32;
        result.numel = numel;
        return result;
    }

    float delta(size_t model, size_t i) const { return widen_bfloat16(models[model][i]) - widen_bfloat16(base[i]); }
};

void check_random_words() {
    uint32_t words[4];
    random_words({0, 0, 0, 0}, 0, 4, words);
    const uint32_t zeros[4] = {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u};
    check(std::equal(words, words + 4, zeros), "Philox with key and counter 0");
    PhiloxBlock block = philox4x32(0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u, 0xa4093822u, 0x299f31d0u);
    const uint32_t digits[4] = {0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u};
    check(std::equal(block.word, block.word + 4, digits), "Philox with the digits of pi");
    std::vector<uint32_t> many(3000);
    uint64_t first = (uint64_t{1} << 34) - 777;  // across a carry of the counter's low word
    random_words({1, 2, 3, 4}, first, 3000, many.data());
    for (uint64_t i = 0; i < many.size(); ++i) {
        PhiloxBlock one = philox_at({1, 2, 3, 4}, (first + i) >> 2);
        if (many[i] != one.word[(first + i) & 3]) return check(false, "random words at an offset");
    }
}

void check_rounding() {
    for (uint32_t high = 0; high < 0x10000u; ++high) {
        uint16_t bits = static_cast<uint16_t>(high);
        bool nan16 = (bits & 0x7fffu) > 0x7c00u, nan_b = (bits & 0x7fffu) > 0x7f80u;
        check(nan16 || round_float16(widen_float16(bits)) == bits, "float16 there and back");
        check(nan_b || round_bfloat16(widen_bfloat16(bits)) == bits, "bfloat16 there and back");
        if (failures) return;
    }
}

void check_functions() {
    std::vector<float> x, exps, tanhs, logs;
    for (uint64_t bits = 0; bits < 0x100000000ull; bits += 65521)
        x.push_back(bit_cast<float>(static_cast<uint32_t>(bits)));
    int64_t count = static_cast<int64_t>(x.size());
    exps.resize(x.size());
    tanhs.resize(x.size());
    logs.resize(x.size());
    function(0, x.data(), count, exps.data());
    function(1, x.data(), count, tanhs.data());
    function(2, x.data(), count, logs.data());
    auto same = [](float a, float b) { return bit_cast<uint32_t>(canonical(a)) == bit_cast<uint32_t>(canonical(b)); };
    for (size_t i = 0; i < x.size(); ++i) {
        if (!same(exps[i], exp_of(x[i])) || !same(tanhs[i], tanh_of(x[i])) || !same(logs[i], log_of(x[i])))
            return check(false, "exp, tanh or log gives other bits than plain code");
        double exact = std::tanh(static_cast<double>(x[i]));
        if (!(std::fabs(tanhs[i] - exact) <= 4e-7 * std::fabs(exact)) && x[i] == x[i]) return check(false, "tanh");
    }
}

void check_selection(const Family& family) {
    Models models = family.view();
    size_t n = static_cast<size_t>(models.count);
    std::vector<int64_t> first(n, 0), last(n, models.numel / 3), bounds(4 * n);
    std::vector<int64_t> ties(2 * n * static_cast<size_t>(tie_blocks(models.numel)));
    magnitude_bounds(models, first.data(), last.data(), bounds.data(), ties.data());
    for (size_t m = 0; m < n; ++m) {
        std::vector<uint32_t> keys;
        for (size_t i = 0; i < static_cast<size_t>(models.numel); ++i)
            keys.push_back(magnitude_key(family.delta(m, i)));
        std::sort(keys.rbegin(), keys.rend());
        uint32_t expected = keys[static_cast<size_t>(last[m] - 1)];
        check(bounds[4 * m + 2] == static_cast<int64_t>(expected), "the threshold of a selection");
        int64_t greater = std::upper_bound(keys.begin(), keys.end(), expected, std::greater<uint32_t>()) - keys.begin();
        int64_t equal = std::count(keys.begin(), keys.end(), expected);
        greater -= equal;
        check(bounds[4 * m + 3] == (last[m] - greater == equal ? 0 : last[m] - greater), "the ties of a selection");
    }
}

// Every kind of merge; what it wrote, byte after byte.
std::vector<uint8_t> merges(const Family& family) {
    Models models = family.view();
    size_t n = static_cast<size_t>(models.count);
    std::vector<uint8_t> all;
    std::vector<float> weights(n, 0.4f), scales(n, 1.0f);
    scales[0] = 1.25f;
    std::vector<double> density(n, 0.5), epsilon(n, 0.15);
    std::vector<Stream> streams(n, Stream{1, 2, 3, 4});
    std::vector<int64_t> first(n, 5), last(n, models.numel / 2), bounds(4 * n);
    std::vector<int64_t> ties(2 * n * static_cast<size_t>(tie_blocks(models.numel)));
    magnitude_bounds(models, first.data(), last.data(), bounds.data(), ties.data());
    for (int32_t method : {kKeepAll, kBand, kBernoulli, kDella}) {
        for (int32_t election : {kElectNone, kElectWeighted, kElectTotal, kElectFrequency}) {
            ConsensusArgs args{};
            args.models = models;
            args.rule.method = method;
            args.rule.bounds = bounds.data();
            args.rule.ties_before = ties.data();
            args.rule.blocks = tie_blocks(models.numel);
            args.rule.density = density.data();
            args.rule.epsilon = epsilon.data();
            args.rule.streams = streams.data();
            args.rule.row_length = models.numel % 100 == 0 ? 100 : models.numel;
            args.base = models.base;
            args.weights = weights.data();
            args.scales = scales.data();
            args.election = election;
            args.zero_sign = 1.0f;
            args.divisor = kDivideWeights;
            args.divisor_value = 1.2f;
            args.lambda = 0.9f;
            args.out_dtype = election % 2 ? kFloat16 : kFloat32;
            std::vector<uint8_t> out(static_cast<size_t>(models.numel * dtype_size(args.out_dtype)), 0xcd);
            args.out = out.data();
            consensus_apply(args);
            all.insert(all.end(), out.begin(), out.end());
            std::vector<int64_t> sums(2 * 12 * n);
            l1_sums(models, args.rule, sums.data());
            const uint8_t* bytes = reinterpret_cast<const uint8_t*>(sums.data());
            all.insert(all.end(), bytes, bytes + sums.size() * sizeof(int64_t));
        }
    }
    std::vector<float> total(static_cast<size_t>(models.numel));
    fused_sum(models, weights.data(), total.data());
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(total.data());
    all.insert(all.end(), bytes, bytes + total.size() * sizeof(float));
    return all;
}

template <class T>
void append(std::vector<uint8_t>& all, const std::vector<T>& values) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(values.data());
    all.insert(all.end(), bytes, bytes + values.size() * sizeof(T));
}

// The window's counts and the histogram's, against keys made here.
void check_score_counts(const PcbArgs& args, const std::vector<float>& scores, int64_t low, int64_t width) {
    size_t n = static_cast<size_t>(args.models.count), numel = static_cast<size_t>(args.models.numel);
    size_t columns = static_cast<size_t>(width) + 1;
    std::vector<int64_t> lows(n, low), counts(n * columns, 0), highest(n, 0), prefix(n, -1), bins(n << 16, 0);
    std::vector<int64_t> wanted(counts), wanted_highest(highest), wanted_bins(bins);
    pcb_window(args, lows.data(), width, counts.data(), highest.data());
    pcb_histogram(args, prefix.data(), bins.data());
    for (size_t i = 0; i < n; ++i) {
        for (size_t t = 0; t < numel; ++t) {
            int64_t key = score_key(scores[i * numel + t]);
            wanted_highest[i] = std::max(wanted_highest[i], key);
            ++wanted_bins[(i << 16) + static_cast<size_t>(key >> 16)];
            if (key >= low) ++wanted[i * columns + (key - low < width ? static_cast<size_t>(key - low) + 1 : 0)];
        }
    }
    check(counts == wanted && highest == wanted_highest, "a window of scores");
    check(bins == wanted_bins, "a histogram of scores");
}

// Every kind of PCB-Merging: scores, sums and extremes, what was merged and by which shares, byte after byte.
std::vector<uint8_t> competitions(const Family& family) {
    Models models = family.view();
    size_t n = static_cast<size_t>(models.count), numel = static_cast<size_t>(models.numel);
    size_t pairs = static_cast<size_t>(pcb_pairs(models.count));
    std::vector<uint8_t> all;
    std::vector<float> clip, extremes(2 * pairs), means(n + pairs, 1.25f), thresholds, weights(n, 0.7f);
    for (size_t i = 0; i < n; ++i) {
        clip.insert(clip.end(), {1e-6f, i == 1 ? 1e-6f : 1e-4f});
        thresholds.insert(thresholds.end(), {1e-4f, 0.5f});
    }
    pcb_extremes(models, extremes.data());
    append(all, extremes);
    for (int32_t variant : {kPcbScript, kPcbVision, kPcbVisionEs, kPcbPaper}) {
        PcbArgs args = {models, variant, clip.data(), extremes.data(), means.data(), thresholds.data()};
        std::vector<float> scores(n * numel), scale(n * numel);
        pcb_scores(args, scores.data());
        append(all, scores);
        int64_t middle = score_key(scores[numel / 2]);
        check_score_counts(args, scores, middle > 500 ? middle - 500 : 0, 1000);
        if (variant == kPcbPaper) {
            std::vector<int64_t> sums((n + pairs) * 12);
            pcb_sums(args, sums.data());
            append(all, sums);
        }
        for (int32_t dtype : {kFloat32, kBFloat16, kFloat16}) {
            std::vector<uint8_t> out(numel * static_cast<size_t>(dtype_size(dtype)), 0xcd);
            pcb_apply({args, weights.data(), out.data(), dtype, dtype == kFloat32 ? scale.data() : nullptr});
            append(all, out);
        }
        append(all, scale);
    }
    return all;
}

// Two experts in rows of a third of a tensor or so: found as a stable sort finds them, put on together and taken off.
std::vector<uint8_t> experts(const Family& family) {
    size_t rows = 3, width = static_cast<size_t>(family.numel) / rows, kept = width / 50 + 1;
    bool wide = width > 65536;
    std::vector<uint8_t> all;
    if (width < 2) return all;
    std::vector<std::vector<uint16_t>> narrow(2, std::vector<uint16_t>(rows * kept)), values(narrow);
    std::vector<std::vector<int32_t>> columns(2, std::vector<int32_t>(rows * kept));
    std::vector<std::vector<uint16_t>> saved(narrow);
    std::vector<ExpertPart> parts;
    for (size_t e = 0; e < 2; ++e) {
        size_t model = e % family.models.size();
        Models one = family.view();
        one.models = &family.arrays[model];
        one.count = 1;
        void* out = wide ? static_cast<void*>(columns[e].data()) : narrow[e].data();
        int64_t k = static_cast<int64_t>(kept);
        expert_extract(one, static_cast<int64_t>(rows), static_cast<int64_t>(width), k, out, wide ? 4 : 2,
                       values[e].data(), kBFloat16);
        for (size_t row = 0; row < rows; ++row) {
            std::vector<size_t> order(width);
            for (size_t i = 0; i < width; ++i) order[i] = i;
            auto key = [&](size_t i) { return magnitude_key(family.delta(model, row * width + i)); };
            std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return key(a) > key(b); });
            std::sort(order.begin(), order.begin() + k);
            for (size_t j = 0; j < kept; ++j) {
                size_t entry = row * kept + j;
                size_t found = wide ? static_cast<size_t>(columns[e][entry]) : narrow[e][entry];
                if (found != order[j]) {
                    check(false, "which elements an expert keeps");
                    return all;
                }
            }
        }
        parts.push_back({out, wide ? 4 : 2, {values[e].data(), kBFloat16}, {nullptr, 0}, saved[e].data(), k, 1.5f});
        append(all, values[e]);
    }
    std::vector<uint16_t> theta(family.base), before(theta);
    ExpertArgs worn = {theta.data(), kBFloat16, static_cast<int64_t>(rows), static_cast<int64_t>(width),
                       parts.data(), 2};
    for (int32_t count : {1, 2}) {
        worn.count = count;
        expert_apply({worn});
        append(all, theta);
        check(theta != before, "an expert that is put on");
        int64_t changed = -1;
        expert_revert({worn}, &changed);
        check(changed == 0 && theta == before, "an expert that is taken off");
    }
    return all;
}

// Inner products of whole tensors and of rows; the first block of the last model with itself against plain code.
std::vector<uint8_t> inner_products(const Family& family) {
    Models models = family.view();
    size_t n = static_cast<size_t>(models.count), pairs = static_cast<size_t>(gram_pairs(models.count));
    std::vector<uint8_t> all;
    for (int64_t length : {family.numel, family.numel % 7 == 0 ? family.numel / 7 : int64_t{1}}) {
        size_t blocks = static_cast<size_t>(family.numel / length * gram_blocks(length));
        std::vector<double> sums(pairs * blocks, -1.0);
        gram(models, length, sums.data());
        double lanes[kGramLanes] = {};
        for (int64_t i = 0; i < std::min<int64_t>(length, kGramBlock); ++i) {
            double delta = static_cast<double>(family.delta(n - 1, static_cast<size_t>(i)));
            lanes[i % kGramLanes] += delta * delta;
        }
        for (int half = kGramLanes / 2; half > 0; half /= 2)
            for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[half + lane];
        uint64_t expected = bit_cast<uint64_t>(canonical_double(lanes[0]));
        check(bit_cast<uint64_t>(sums[(pairs - 1) * blocks]) == expected, "an inner product");
        append(all, sums);
    }
    return all;
}

// What the importance family finds and merges, byte after byte; rows of seven elements, and one row of all.
std::vector<uint8_t> importances(const Family& family) {
    Models models = family.view();
    models.numel -= models.numel % 7;
    size_t n = static_cast<size_t>(models.count), numel = static_cast<size_t>(models.numel);
    std::vector<uint8_t> all, mask((numel + 7) / 8, 0x5a);
    std::vector<float> factors(n, 1.25f), values(numel);
    for (int32_t dtype : {kFloat32, kBFloat16, kFloat16}) {
        std::vector<uint8_t> out(numel * static_cast<size_t>(dtype_size(dtype)), 0xcd);
        nearswap(models, 1e-3f, out.data(), dtype);
        append(all, out);
        ram_apply(models, factors.data(), 1e-3f, out.data(), dtype);
        append(all, out);
    }
    std::vector<int64_t> counts(2 * n, -1), sums(12 * n, -1);
    ram_counts(models, 1e-3f, counts.data());
    append(all, counts);
    for (const uint8_t* kept : {static_cast<const uint8_t*>(nullptr), static_cast<const uint8_t*>(mask.data())}) {
        energy_sums(models, kept, sums.data());
        append(all, sums);
    }
    model_variance(models, values.data());
    append(all, values);
    for (int64_t width : {int64_t{7}, models.numel}) {
        if (width == 0) continue;
        std::vector<float> rows(numel / static_cast<size_t>(width));
        divergences(models, width, rows.data());
        append(all, rows);
        importance(models, rows.data(), width, values.data());
        append(all, values);
    }
    return all;
}

// Trials of both kinds, in place, too, across a carry of the counter's low word: byte after byte.
std::vector<uint8_t> trials_of(const Family& family) {
    std::vector<uint8_t> all;
    size_t last = family.models.size() - 1;
    for (int32_t dtype : {kFloat32, kBFloat16, kFloat16}) {
        for (int32_t kind : {kBlend, kDifferences}) {
            std::vector<uint8_t> out(static_cast<size_t>(family.numel * dtype_size(dtype)), 0xcd);
            TrialArgs args{};
            args.tensors[0] = {family.base.data(), kBFloat16};
            args.tensors[1] = family.arrays[0];
            args.tensors[2] = family.arrays[last];
            args.kind = kind;
            args.places[0] = args.places[1] = 1;
            args.places[2] = 2;
            args.differences = 1;
            args.factors[0] = 0.7f;
            args.factors[1] = 0.3f;
            PhiloxStream stream = philox_stream(7, 9, stream_id(kStreamBlendTrial, 65535, 3));
            args.stream = {stream.k0, stream.k1, stream.c2, stream.c3};
            args.limit = 0x60000000u;
            args.offset = (uint64_t{1} << 34) - (dtype == kBFloat16 ? 400 : 13);
            args.forced = family.numel / 2;
            args.numel = family.numel;
            args.out = out.data();
            args.out_dtype = dtype;
            trials({args});
            append(all, out);
            if (dtype == kBFloat16) {
                std::vector<uint8_t> own(out.size());
                std::memcpy(own.data(), family.base.data(), own.size());
                args.tensors[0].data = args.out = own.data();
                trials({args});
                check(own == out, "a trial in place");
            }
        }
    }
    return all;
}

}  // namespace

int main() {
    set_threads(2);
    check_rounding();
    std::vector<Family> families;
    families.emplace_back(1, 2);
    families.emplace_back(777, 1);
    families.emplace_back(70000, 3);
    families.emplace_back(200003, 2);
    std::vector<std::vector<uint8_t>> expected;
    std::string names;
    for (const std::string& name : supported_isas()) {
        check(set_isa(name), "choosing " + name);
        check_random_words();
        check_functions();
        for (size_t f = 0; f < families.size(); ++f) {
            if (families[f].numel > 3) check_selection(families[f]);
            std::vector<uint8_t> made = merges(families[f]);
            append(made, competitions(families[f]));
            append(made, experts(families[f]));
            append(made, inner_products(families[f]));
            append(made, importances(families[f]));
            append(made, trials_of(families[f]));
            if (expected.size() == f) expected.push_back(made);
            check(made == expected[f], "merging gives other bits than " + supported_isas().front());
        }
        names += (names.empty() ? "" : ", ") + name;
    }
    if (failures) return 1;
    std::printf("kernels agree: %s\n", names.c_str());
    return 0;
}
