"""Mutations of the family `evolve`: of its definition, of its ops, of its kernels for CPUs and GPUs."""

from __future__ import annotations

from checks.mutation_list.mutation import in_file

DEFINITION = ("tests/reference/test_evolve.py",)
DRAWN = ("trials", "in_place", "lists", "chunks_join", "what_does_not_cross_over_is_not_touched")
TRITON = ("tests/triton/test_evolve.py", *(f"tests/ops/test_evolve.py::test_{name}[triton]" for name in DRAWN))
CUDA = ("tests/cuda/test_evolve.py", *(f"tests/ops/test_evolve.py::test_{name}[cuda]" for name in DRAWN))

MUTATIONS = [
    *in_file(
        "fastmerge/reference/evolve.py",
        DEFINITION,
        ("words below the limit cross over", "(words < rule.limit)", "(words >= rule.limit)"),
        ("one element always crosses over", " | (places == forced)", ""),
        ("it is counted in the whole tensor", "torch.arange(rule.offset, rule.offset + numel,", "torch.arange(numel,"),
        ("blend: x has 1 - F", "(factors[0] * values[0]) + (factors[1] *", "(factors[1] * values[0]) + (factors[0] *"),
        ("de: the difference", "factor * (plus - minus)", "factor * (minus - plus)"),
        ("de: each difference has its factor", "zip(factors, pairs[::2]", "zip(factors[:1] * 3, pairs[::2]"),
        ("de: every second one is taken off", "pairs[1::2]", "pairs[::2]"),
    ),
    *in_file(
        "fastmerge/backends/rule.py",
        DEFINITION,
        ("both kinds have words of their own", 'BLEND_TRIAL if self.kind == "blend" else DE_TRIAL', "BLEND_TRIAL"),
        ("generations have", "stream_id(purpose, self.member, self.generation)", "stream_id(purpose, self.member)"),
        ("members have", "stream_id(purpose, self.member, self", "stream_id(purpose, 0, self"),
    ),
    *in_file(
        "fastmerge/ops/evolve.py",
        ("tests/reference/test_evolve.py::test_one_minus_f_is_rounded_once", *DEFINITION),
        ("1 - F", "[1.0 - factors[0], factors[0]]", "[factors[0], 1.0 - factors[0]]"),
    ),
    *in_file(
        "fastmerge/ops/evolve.py",
        ("tests/ops/test_evolve.py",),
        ("what comes again is read once", "        if key not in known:", "        if True:"),
        ("results may be their inputs alone", "if not _is_same(x, target)])", "if x is not target])"),
        ("results overlap nothing", "    if found is not None:\n        raise", "    if False:\n        raise"),
        ("at most one element is forced", "sum(place >= 0 for place in places) > 1", "False"),
        ("lists are of whole tensors", "if tensors > 1 and offset:", "if False:"),
        ("integers never evolve", "not value.is_floating_point() and not value.is_complex()", "False"),
    ),
    *in_file(
        "triton_kernels/evolve.py",
        TRITON,
        ("x has 1 - F", "(factors[0] * values[0]) + (factors[1] *", "(factors[1] * values[0]) + (factors[0] *"),
        ("the difference", "factors[i] * (plus - minus)", "factors[i] * (minus - plus)"),
        ("the second place of a difference", "(PLACES >> (8 * i + 8)) & 15", "(PLACES >> (8 * i + 4)) & 15"),
        ("words are those of the chunk", "sparsify.drawn(offset + start, key", "sparsify.drawn(start, key"),
        (
            "one element always crosses over",
            "crosses = crosses | (place == forced - start)",
            "crosses = crosses | False",
        ),
        ("it is one of its tile", "(place == forced - start)", "(place == forced)"),
        ("x keeps its bits", "old = bits_of(loaded[0])", "old = bits_of(numbers.narrowed(values[0], dtype))"),
        ("tensors end", "mask=place < n - start)", "mask=place < BLOCK)"),
        ("programs are counted from the tensor's first", "(program - tl.load(row)).to(", "(program).to("),
        ("each has its dtype", "(DTYPES >> (2 * i)) & 3", "DTYPES & 3"),
    ),
    *in_file(
        "fastmerge/backends/triton/evolve.py",
        TRITON,
        (
            "each tensor has its key",
            "[_key(rule.seed, tensor_ids[t]) for t in group]",
            "[rule.seed % 3 for t in group]",
        ),
        ("a counter serves four", "FOURS=rule.offset % 4 == 0", "FOURS=True"),
        ("a copy is put back", "out[first].copy_(target)", "pass"),
        ("of lists, too", "out[t].copy_(target)", "pass"),
    ),
    *in_file(
        "fastmerge/backends/gpu.py",
        (*TRITON, *CUDA),
        ("tensors of other dtypes are launched apart", "(target.dtype, *(model[t].dtype for model in models))", "(0,)"),
        ("forced elements are counted from the chunk", "max(place - rule.offset, -1)", "place"),
    ),
    *in_file(
        "csrc/cuda/evolve.cu",
        CUDA,
        ("tiles are counted from the tensor's first", "(block() - own.first) * kTile", "block() * kTile"),
        ("words are those of the chunk", "trial.offset + static_cast<uint64_t>(at)", "static_cast<uint64_t>(at)"),
        ("three blocks of words where they begin within one", "lead == 0 ? 2 : 3", "2"),
        ("words begin within a block", "bits = (bits >> lead) & 0xffu;", "bits = bits & 0xffu;"),
        ("all cross over", "        bits = 0xffu;", "        bits = 0x7fu;"),
        ("one element always crosses over", "bits | 1u << place : bits", "bits : bits"),
        ("x may come again", "raw[i] = raw[0];", "raw[i] = raw[1];"),
        ("each parent has its dtype", "trial.tensors[trial.places[i]].dtype, minus", "x_dtype, minus"),
        ("each difference has its factor", "trial.factors[i / 2 - 1]", "trial.factors[0]"),
        ("x keeps its bits", "    if (x_dtype == dtype) {", "    if (x_dtype == dtype + 9) {"),
        ("halves are chosen apart", "(bits >> (2 * i + 1)) & 1u)) << 16", "(bits >> (2 * i)) & 1u)) << 16"),
        ("tables have tensors", "kTrialRow + trial.count", "kTrialRow + trial.count - 1"),
    ),
]
