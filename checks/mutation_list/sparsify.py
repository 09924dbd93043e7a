"""Mutations of the family `sparsify` in Triton and in CUDA C++."""

from __future__ import annotations

from checks.mutation_list.mutation import cuda, equal_bits, in_file

MUTATIONS = [
    *in_file(
        "triton_kernels/sparsify.py",
        (
            "tests/triton/test_consensus.py",
            "tests/triton/test_sparsify.py",
            *equal_bits("a_word_equal_to_the_limit_is_dropped", "consensus_apply", "kept_masks"),
        ),
        (
            "all ties of earlier blocks are past",
            "passed = tied & (before >= ties)",
            "passed = tied & (before + 1 >= ties)",
        ),
        (
            "a cut goes through a block before the last tie",
            "tied & (before < ties) & (last | (after > ties))",
            "tied & (before < ties) & (last | (after >= ties + 2))",
        ),
        (
            "of the last block nothing is known",
            "tied & (before < ties) & (last | (after > ties))",
            "tied & (before < ties) & (after > ties)",
        ),
        (
            "NaN has one key in a band",
            "tl.where(limit > numbers.NAN_KEY, 0x80000000,",
            "tl.where(limit > numbers.NAN_KEY, limit,",
        ),
        ("NaNs with small payloads are above infinity", "tl.where(limit > least_nan, least_nan, limit)", "limit"),
        ("an empty band keeps nothing", "some = low < high", "some = low <= high"),
        (
            "the second bound ends a band",
            "low, low_split = cut(bound + 2, at + stride, last)",
            "low, low_split = cut(bound + 2, at, last)",
        ),
        ("ties are counted up to the tile", "there = group < end - at", "there = group < end - at - 16"),
        (
            "ties in the tile are in order",
            "tl.sum((so_far <= left).to(tl.int32), axis=0)",
            "tl.sum((so_far < left).to(tl.int32), axis=0)",
        ),
        ("ties before the tile count", "left -= ties_between(", "left -= 0 * ties_between("),
        ("ties of pieces add up", "                left -= count\n", ""),
        (
            "where the first bound turns",
            "first = key < turns[0] + (place >= turns[1])",
            "first = key < turns[0] + (place > turns[1])",
        ),
        (
            "where the second bound turns",
            "last = key < turns[2] + (place >= turns[3])",
            "last = key < turns[2] + (place > turns[3])",
        ),
        (
            "a word that equals the limit drops",
            "return (word <= greatest) & (draw >= 0)",
            "return (word < greatest) & (draw >= 0)",
        ),
        ("a density of 0 keeps nothing", "return (word <= greatest) & (draw >= 0)", "return word <= greatest"),
        ("a model has its stream", "draw >> 32, BLOCK, FOURS)", "(draw >> 32) * 0, BLOCK, FOURS)"),
        (
            "masks have their low bit first",
            "kept = (byte.to(tl.int32)[:, None] >> bit[None, :]) & 1",
            "kept = (byte.to(tl.int32)[:, None] >> (7 - bit[None, :])) & 1",
        ),
        (
            "masks are packed low bit first",
            "tl.sum(byte << tl.arange(0, 8)[None, :], axis=1)",
            "tl.sum(byte << (7 - tl.arange(0, 8))[None, :], axis=1)",
        ),
        (
            "the last byte of a mask counts",
            "mask=at * 8 < n - start, other=0)",
            "mask=at * 8 + 7 < n - start, other=0)",
        ),
        ("a chunk's place in its tensor counts", "return drawn(offset + start, key", "return drawn(start, key"),
        ("a model has its mask", "return masked(given[0] + model * stride, start", "return masked(given[0], start"),
    ),
    *in_file(
        "fastmerge/backends/triton/sparsify.py",
        equal_bits("a_word_equal_to_the_limit_is_dropped", "consensus_apply"),
        ("the seed's high word counts", "(rule.seed >> 32 ^ rule.tensor_id >> 32)", "(rule.tensor_id >> 32)"),
        ("the tensor's high word counts", "(rule.seed >> 32 ^ rule.tensor_id >> 32)", "(rule.seed >> 32)"),
        (
            "four share a counter only where they begin at one",
            "return self.offset % 4 == 0",
            "return self.offset % 2 == 0",
        ),
        ("a model has its place", "random.stream_id(purpose, position)", "random.stream_id(purpose, 0)"),
    ),
    *in_file(
        "fastmerge/backends/gpu.py",
        ("tests/ops/test_backends.py::test_the_limit_of_random_words_is_the_references",),
        (
            "a density of 1 keeps all",
            "min(max(math.floor(probability * 4294967296.0), 0), 1 << 32)",
            "min(max(math.floor(probability * 4294967296.0), 0), (1 << 32) - 1)",
        ),
        ("density is rounded down", "math.floor(probability * 4294967296.0)", "round(probability * 4294967296.0)"),
    ),
    *in_file(
        "triton_kernels/sparsify.py",
        (
            "tests/triton/test_sparsify.py",
            *equal_bits(
                "a_word_equal_to_the_limit_of_its_rank_is_dropped", "count_nonfinite", "zero_nonfinite", "kept_masks"
            ),
        ),
        ("infinity is no NaN", "nans += (bits > numbers.INF_KEY)", "nans += (bits >= numbers.INF_KEY)"),
        ("a NaN is no infinity", "infinities += (bits == numbers.INF_KEY)", "infinities += (bits >= numbers.INF_KEY)"),
        (
            "infinity is noticed in a whole tile",
            "most = tl.maximum(most, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)",
            "most = tl.maximum(most, value.to(tl.int32, bitcast=True) & 0x7F7FFFFF)",
        ),
        (
            "infinity is noticed in the rest",
            "rest = tl.maximum(rest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)",
            "rest = tl.maximum(rest, value.to(tl.int32, bitcast=True) & 0x7F7FFFFF)",
        ),
        (
            "infinity is cleared",
            "wrong = (value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= numbers.INF_KEY",
            "wrong = (value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) > numbers.INF_KEY",
        ),
        (
            "negative infinity is cleared",
            "wrong = (value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >=",
            "wrong = value.to(tl.int32, bitcast=True) >=",
        ),
        (
            "keys behind a row's end are above all",
            "tl.sort(tl.where(there, key, 0x7FFFFFFF), dim=1)",
            "tl.sort(tl.where(there, key, 0), dim=1)",
        ),
        ("equal keys are not below", "inside & (found < key)", "inside & (found <= key)"),
        (
            "all keys of a chunk are looked at",
            "inside = sought & (probe <= length)",
            "inside = sought & (probe < length)",
        ),
        ("a row has its keys", "// length) * row_keys", "// length) * 0"),
        (
            "all chunks count",
            "for number_of_chunk in range(0, chunks):",
            "for number_of_chunk in range(0, tl.minimum(chunks, 1)):",
        ),
        (
            "equals share the middle of their ranks",
            "at_most += smaller(sorted_keys, chunk, highest, magnitude + 1, sought)",
            "at_most += smaller(sorted_keys, chunk, highest, magnitude, sought) + (number_of_chunk == 0).to(tl.int32)",
        ),
        ("ranks are scaled to 1", "2.0 * (length - 1).to(tl.float64)", "2.0 * length.to(tl.float64)"),
        (
            "the rank spreads the probability",
            "probability = least + spread * rank",
            "probability = least + spread * 0.5",
        ),
        (
            "what is always kept",
            "always = word < tl.minimum(one_end, other_end)",
            "always = word <= tl.maximum(one_end, other_end)",
        ),
        (
            "what is never kept",
            "never = word >= tl.maximum(one_end, other_end)",
            "never = word >= tl.minimum(one_end, other_end)",
        ),
        ("a word that equals its limit drops", "(word < keep_limit(probability))", "(word <= keep_limit(probability))"),
        ("a model's row of the mask", "out + number * ((n + 7) // 8) + first // 8", "out + first // 8"),
    ),
    *in_file(
        "csrc/cuda/sparsify.cu",
        cuda("sparsify", "l1_sums", "kept_masks", "count_nonfinite"),
        ("what is not finite has no mass", "key < kInfBits ? magnitude_mantissa(key) : 0u", "magnitude_mantissa(key)"),
        ("masses of other sizes go elsewhere", "if (mantissa != 0 && place >> 5 != group) {", "if (false) {"),
        ("high halves are carried", "atomic_add(limb + 1,", "atomic_add(limb,"),
        ("bits past the end are 0", "if (at + kEach > own.length) bits &=", "if (false) bits &="),
        (
            "tied ranks are averaged where rows are sorted",
            "return 2 * first + count_below(own + first, rows.length - first, key + 1) - 1;",
            "return 2 * first;",
        ),
        (
            "tied ranks are averaged in short rows",
            "twice += (own[i] < key ? 1 : 0) + (own[i] <= key ? 1 : 0);",
            "twice += own[i] < key ? 2 : 0;",
        ),
        (
            "tied ranks are averaged in a bin",
            "int64_t rank = 2 * static_cast<int64_t>(span & 0xffffu) + (span >> 16) - 1;",
            "int64_t rank = 2 * static_cast<int64_t>(span & 0xffffu);",
        ),
        (
            "zeros have a bin of their own",
            "((1u << width) - 1u)) + (key != 0 ? apart : 0u);",
            "((1u << width) - 1u));",
        ),
        (
            "keys of a bin differ as long as there are bits",
            "whole = (mine.bits & ((1u << mine.digit.shift) - 1u)) == 0;",
            "whole = true;",
        ),
        (
            "a bin spans all ranks of its keys",
            "static_cast<float>(twice + (equal ? more : 2 * more))",
            "static_cast<float>(twice + more)",
        ),
        (
            "what lies between open bins is below the later one, for warps",
            "sum += mine.count[bin] + between(bin);",
            "sum += mine.count[bin];",
        ),
        (
            "what lies between open bins is below the later one, in a warp",
            "uint32_t upto = count + between(bin);",
            "uint32_t upto = count;",
        ),
        ("single precision may be wrong", "constexpr float kSlack = 1e-6f;", "constexpr float kSlack = 1e-9f;"),
        (
            "no more bins are refined than there is room for",
            "found = (word & bit) != 0 && number < allowed ? number : kNoBin;",
            "found = (word & bit) != 0 ? number % allowed : kNoBin;",
        ),
        ("what there was no room for comes later", "> allowed || again;", "> allowed && again;"),
        (
            "rows meet in a byte",
            "if (byte * kEach < mine.row.begin) kept |= mine.carried[number % 2];",
            "",
        ),
        ("infinities are no NaN", "magnitude > kInfBits ? 1u : 0u", "magnitude >= kInfBits ? 1u : 0u"),
    ),
]
