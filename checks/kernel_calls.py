"""Calls of the Triton backend's functions that between them make every kernel, and each form of it, be launched.

Nothing runs: the launches are intercepted, with tensors of the CPU in the place of a GPU's. What matters of a tensor is
its dtype and whether it begins at a multiple of 16 bytes, what matters of the models is their number.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch

from fastmerge.backends.lists import Lists
from fastmerge.backends.rule import TIE_BLOCK, ExpertPart, PcbRule, SparsifyRule, TrialRule, saved_layout

NUMEL = 2 * TIE_BLOCK
"""Elements of each model's tensor here."""

ROW = 1024
MODELS = (1, 3, 8, 12)
"""How many models: one, some, as many as are handed to a kernel by value, more than that (a table of addresses)."""

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", F16: "fp16", F32: "fp32"}


@dataclass(frozen=True)
class Call:
    """A call of a backend's function. everywhere: its kernels are compiled for each target, and not for one alone.

    wide: tensors are aligned, and the kernel passes over them once: its loads and stores must be as wide as they can.
    """

    function: str
    variant: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any] = field(default_factory=dict)
    everywhere: bool = False
    wide: bool = False


@cache
def tensor(dtype: torch.dtype, *, aligned: bool = True, numel: int = NUMEL) -> torch.Tensor:
    """One tensor of so many zeros, at a multiple of 16 bytes or one element past it; always the same one."""
    whole = torch.zeros(numel + 16, dtype=dtype)
    start = -whole.data_ptr() % 16 // whole.element_size()
    return whole[start + (not aligned) :][:numel]


def models(count: int, dtype: torch.dtype = BF16, *, aligned: bool = True) -> list[torch.Tensor]:
    """So many tensors of one dtype."""
    return [tensor(dtype, aligned=aligned) for _ in range(count)]


def mixed(count: int) -> list[torch.Tensor]:
    """So many tensors of all three dtypes by turns."""
    return [tensor((BF16, F32, F16)[i % 3]) for i in range(count)]


def rule(method: str, count: int, **changes: Any) -> SparsifyRule:
    """A rule of this method for so many models, with what it needs."""
    made = SparsifyRule(method="none")
    if method == "band":
        made = SparsifyRule(
            method="band",
            bounds=torch.tensor([[[1 << 31, 0], [0x3F800000, 5]]] * count),
            ties_before=torch.zeros(count, 2, NUMEL // TIE_BLOCK, dtype=torch.int64),
        )
    elif method in ("bernoulli", "della"):
        made = SparsifyRule(
            method=method,  # type: ignore[arg-type]
            density=[0.5] * count,
            epsilon=[0.1] * count,
            row_length=ROW,
            seed=1,
            tensor_id=2,
            positions=list(range(count)),
        )
    elif method == "mask":
        made = SparsifyRule(method="mask", masks=torch.zeros(count, NUMEL // 8, dtype=torch.uint8))
    return replace(made, **changes)


def pcb_rule(variant: str, count: int) -> PcbRule:
    """A PCB rule of this variant for so many rows, with everything that any sweep needs."""
    pairs = count * (count + 1) // 2
    return PcbRule(
        variant=variant,  # type: ignore[arg-type]
        clip=torch.zeros(count, 2),
        extremes=torch.zeros(pairs, 2),
        means=torch.ones(count + pairs),
        thresholds=torch.zeros(count, 2),
    )


def calls() -> Iterator[Call]:
    """All of them."""
    yield from _select()
    yield from _sparsify()
    yield from _consensus()
    yield from _many()
    yield from _pcb()
    yield from _expert()
    yield from _geometry()
    yield from _importance()
    yield from _evolve()
    yield from _highpass()


def _select() -> Iterator[Call]:
    for dtype in (BF16, F16, F32):
        name = NAMES[dtype]
        for bins in (32768, 256):
            typical = bins == 32768 and dtype is not F16
            arguments = ([tensor(dtype), tensor(dtype)], bins)
            yield Call("abs_histogram", f"{name}, {bins} bins", arguments, everywhere=typical, wide=True)
        yield Call("abs_histogram", f"{name}, 32768 bins, unaligned", (models(1, dtype, aligned=False), 32768))
        yield Call("abs_histogram", f"{name}, 32768 bins, 20 shards", (models(20, dtype), 32768))
        yield Call("kth_magnitude", name, (models(2, dtype), 1000), everywhere=dtype is BF16)
        yield Call("kth_magnitude", f"{name}, unaligned", (models(2, dtype, aligned=False), 1000))
        bounds = rule("band", 1)
        yield Call("topk_mask", name, (tensor(dtype), bounds.bounds, bounds.ties_before), everywhere=dtype is BF16)
        arguments = (tensor(dtype), bounds.bounds)
        hashed = {"seed": 1, "tensor_id": 2, "position": 3, "offset": 4}
        yield Call("hashed_mask", name, arguments, hashed, everywhere=dtype is BF16)
    for base, xs, compute, everywhere, variant in _deltas():
        count = len(xs)
        bounds = rule("band", count).bounds
        aligned = "unaligned" not in variant
        arguments = (base, xs, [10] * count, [1000] * count, compute)
        yield Call("magnitude_bounds", variant, arguments, everywhere=everywhere)
        arguments = (base, xs, [-1] * count, compute)
        yield Call("key_histogram", f"{variant}, high", arguments, everywhere=everywhere, wide=aligned)
        arguments = (base, xs, [127] * count, compute)
        yield Call("key_histogram", f"{variant}, low", arguments, wide=aligned)
        for width in (1 << 12, 1 << 20):
            counts = torch.empty(count, width + 1, dtype=torch.int64)
            arguments = (base, xs, [0x3F000000] * count, compute, counts)
            typical = everywhere and width == 1 << 12
            yield Call("key_window_", f"{variant}, {width}", arguments, everywhere=typical, wide=aligned)
        yield Call("tie_counts", variant, (base, xs, bounds, compute), everywhere=everywhere, wide=aligned)
    for dtype in (BF16, F32):
        lists = Lists(models(2, dtype), [models(2, dtype), models(2, dtype)])
        ranks = torch.tensor([[[10, 10]] * 2, [[20, 20]] * 2])
        arguments = (lists, ranks, [True] * 4, F32)
        name = f"2 tensors of 2 x {NAMES[dtype]}"
        yield Call("magnitude_bounds_many", name, arguments, {"subtract": True}, everywhere=dtype is BF16)


def _deltas() -> Iterator[tuple[torch.Tensor | None, list[torch.Tensor], torch.dtype, bool, str]]:
    """Base, models, compute dtype, whether for every target, and a name, of what works on each model's delta."""
    yield tensor(BF16), models(3), F32, True, "bf16"
    yield tensor(F32), models(3, F32), F32, False, "fp32"
    yield tensor(F16), models(3, F16), F32, False, "fp16"
    yield None, models(1), F32, False, "bf16 without base"
    yield None, models(2, F32), F32, False, "fp32 without base"
    yield tensor(F32), mixed(3), F32, False, "mixed"
    yield tensor(BF16), models(12), F32, False, "12 x bf16"
    yield tensor(BF16), models(3), BF16, False, "bf16 in bf16"
    yield tensor(F16), models(3, F16), F16, False, "fp16 in fp16"
    yield tensor(BF16), models(3, aligned=False), F32, False, "bf16 unaligned"


def _sparsify() -> Iterator[Call]:
    for base, xs, compute, everywhere, variant in _deltas():
        count = len(xs)
        aligned = "unaligned" not in variant
        for method in ("none", "band", "bernoulli", "della", "mask"):
            chosen = rule(method, count)
            typical = everywhere and method != "none"
            arguments = (base, xs, chosen, compute)
            wide = aligned and method != "della"
            yield Call("l1_sums", f"{variant}, {method}", arguments, everywhere=typical, wide=wide)
            if method in ("band", "bernoulli", "della"):
                # Only the ranks of bands and DELLA depend on values; DELLA's rows are sorted, which is not streaming.
                wide = aligned and method == "band"
                yield Call("kept_masks", f"{variant}, {method}", arguments, everywhere=typical, wide=wide)
    for length in (1, 7, 64, 4096, 16384, 65536):
        chosen = rule("della", 1, row_length=length)
        rows = tensor(BF16, numel=max(1, NUMEL // length) * length)
        arguments = (rows, [rows], chosen, F32)
        yield Call("kept_masks", f"bf16, della, rows of {length}", arguments, everywhere=length >= 16384)
    for offset in (1, 4):
        arguments = (tensor(BF16), models(1), rule("bernoulli", 1, offset=offset), F32)
        yield Call("l1_sums", f"bf16, bernoulli, offset {offset}", arguments)
    for dtype in (BF16, F16, F32):
        yield Call("count_nonfinite", NAMES[dtype], (tensor(dtype),), everywhere=True, wide=True)
        yield Call("zero_nonfinite_", NAMES[dtype], (tensor(dtype),), everywhere=True, wide=True)
        yield Call("count_nonfinite", f"{NAMES[dtype]}, unaligned", (tensor(dtype, aligned=False),))
        yield Call("zero_nonfinite_", f"{NAMES[dtype]}, unaligned", (tensor(dtype, aligned=False),))


def _consensus() -> Iterator[Call]:
    # What the methods ask for: linear, task_arithmetic, dare_linear, dare_ties, ties, della.
    methods = {
        "linear": ("none", "none", "weights"),
        "task_arithmetic": ("none", "none", "none"),
        "dare_linear": ("bernoulli", "none", "none"),
        "ties": ("band", "weighted", "weights"),
        "dare_ties": ("bernoulli", "weighted", "none"),
        "della": ("mask", "weighted", "weights"),
    }
    typical = {
        ("ties", 3, BF16),
        ("ties", 12, BF16),
        ("dare_linear", 3, BF16),
        ("dare_linear", 12, BF16),
        ("task_arithmetic", 3, BF16),
        ("task_arithmetic", 8, BF16),
        ("task_arithmetic", 3, F32),
        ("della", 3, BF16),
    }
    for name, (method, election, divisor) in methods.items():
        for count, dtype in ((1, BF16), (3, BF16), (8, BF16), (12, BF16), (3, F32)):
            yield _merge(
                f"{name}, {count} x {NAMES[dtype]}",
                tensor(dtype),
                models(count, dtype),
                tensor(dtype),
                rule=rule(method, count),
                election=election,
                divisor=divisor,
                everywhere=(name, count, dtype) in typical,
                wide=True,
            )
    # Every election with every divisor, and with one rule after the other. Bands compile for long.
    rules = itertools.cycle(("none", "bernoulli", "mask"))
    for (election, divisor), method in zip(
        itertools.product(("none", "weighted", "total", "frequency"), ("none", "weights", "count", "value")), rules
    ):
        name = f"{method}, {election}, {divisor}, 2 x bf16"
        arguments = (tensor(BF16), models(2), tensor(BF16))
        yield _merge(name, *arguments, rule=rule(method, 2), election=election, divisor=divisor)
    for election in ("none", "total", "frequency"):
        arguments = (tensor(BF16), models(2), tensor(BF16))
        yield _merge(f"band, {election}, 2 x bf16", *arguments, rule=rule("band", 2), election=election)
    for zero_sign in ("negative", "zero"):
        arguments = (tensor(BF16), models(2), tensor(BF16))
        yield _merge(f"{zero_sign} where votes cancel", *arguments, election="total", zero_sign=zero_sign)
    for base, count, dtype, out, method in (
        (F32, 3, None, BF16, "band"),
        (BF16, 3, BF16, F32, "none"),
        (F16, 3, F16, F16, "bernoulli"),
        (F32, 12, None, F16, "none"),
    ):
        xs = mixed(count) if dtype is None else models(count, dtype)
        name = f"{method}, {count} x {'mixed' if dtype is None else NAMES[dtype]} to {NAMES[out]}"
        yield _merge(name, tensor(base), xs, tensor(out), rule=rule(method, count), election="weighted")
    for compute, method, election in ((BF16, "band", "weighted"), (BF16, "bernoulli", "none"), (F16, "mask", "total")):
        name = f"mergekit's numbers, {method}, 3 x {NAMES[compute]}"
        arguments = (tensor(compute), models(3, compute), tensor(compute))
        changes = {"rule": rule(method, 3), "election": election, "compute": compute, "scales": [2.0] * 3}
        yield _merge(name, *arguments, **changes, wide=True)
    for inputs in ("models", "deltas"):
        for base in (None, tensor(BF16)):
            name = f"{inputs} {'without' if base is None else 'with'} base, scaled, 3 x bf16"
            arguments = (base, models(3), tensor(BF16))
            yield _merge(name, *arguments, inputs=inputs, scales=[1.5] * 3, lambda_=0.7, rule=rule("bernoulli", 3))
    arguments = (tensor(BF16), models(3, aligned=False), tensor(BF16))
    yield _merge("ties, 3 x bf16, unaligned", *arguments, rule=rule("band", 3), election="weighted")
    arguments = (tensor(BF16), models(12, aligned=False), tensor(BF16))
    yield _merge("ties, 12 x bf16, unaligned", *arguments, rule=rule("band", 12), election="weighted")
    arguments = (tensor(BF16), models(3), tensor(BF16, aligned=False))
    yield _merge("dare_linear, 3 x bf16, offset 1, unaligned", *arguments, rule=rule("bernoulli", 3, offset=1))


def _many() -> Iterator[Call]:
    """Calls that merge all tensors of models in one launch."""
    for dtype in (BF16, F32):
        for method, election in (("band", "weighted"), ("bernoulli", "none"), ("none", "none")):
            for count in (3, 12):
                chosen = rule(method, count)
                if method == "band":
                    chosen = replace(
                        chosen,
                        bounds=torch.stack([chosen.bounds] * 2),
                        ties_before=torch.zeros(count, 2, 2 * NUMEL // TIE_BLOCK, dtype=torch.int64),
                    )
                keywords = _merge("", None, [], tensor(dtype), rule=chosen, election=election).keywords
                del keywords["out"]
                keywords["scales"] = [1.0] * count
                inputs = models(2, dtype), [models(2, dtype) for _ in range(count)]
                arguments = (Lists(*inputs, models(2, dtype), [1, 2]), [0.5] * count)
                name = f"{method}, {election}, 2 tensors of {count} x {NAMES[dtype]}"
                everywhere = (count, dtype, method) == (3, BF16, "band")
                yield Call("consensus_apply_many", name, arguments, keywords, everywhere)


def _merge(
    variant: str,
    base: torch.Tensor | None,
    xs: list[torch.Tensor],
    out: torch.Tensor,
    *,
    everywhere: bool = False,
    wide: bool = False,
    **changes: Any,
) -> Call:
    """One call of consensus_apply; what `changes` do not name is as task_arithmetic has it."""
    keywords: dict[str, Any] = {
        "inputs": "models",
        "rule": rule("none", len(xs)),
        "scales": [1.0] * len(xs),
        "election": "none",
        "zero_sign": "positive",
        "divisor": "none",
        "divisor_value": 1.0,
        "lambda_": 1.0,
        "compute": F32,
        "out": out,
    }
    keywords.update(changes)
    arguments = (base, xs, [0.5] * len(xs))
    return Call("consensus_apply", variant, arguments, keywords, everywhere, wide)


def _pcb() -> Iterator[Call]:
    for variant in ("script", "vision", "vision_es", "paper"):
        for count in MODELS:
            everywhere = (variant, count) in (("vision_es", 3), ("paper", 3), ("vision_es", 12))
            chosen = pcb_rule(variant, count)
            yield from _pcb_of(f"{variant}, {count} x bf16", tensor(BF16), models(count), chosen, BF16, everywhere)
    for count in (3, 12):
        chosen = pcb_rule("vision_es", count)
        yield from _pcb_of(f"vision_es, {count} x fp32", tensor(F32), models(count, F32), chosen, F32)
    chosen = pcb_rule("vision_es", 3)
    yield from _pcb_of("vision_es, 3 x mixed", tensor(F32), mixed(3), chosen, F16)
    yield from _pcb_of("vision_es, 12 x mixed", tensor(F32), mixed(12), pcb_rule("vision_es", 12), F16)
    yield from _pcb_of("vision_es, 3 x fp16 without base", None, models(3, F16), chosen, F16)
    yield from _pcb_of("vision_es, 3 x bf16, unaligned", tensor(BF16), models(3, aligned=False), chosen, BF16)
    # Rows that are long enough to be sampled first.
    for variant, count in (("vision_es", 3), ("paper", 3), ("vision_es", 12)):
        long = [tensor(BF16, numel=1 << 22) for _ in range(count)]
        chunks = [(tensor(BF16, numel=1 << 22), long)]
        for pieces, name in ((chunks, "sampled"), ([(tensor(BF16), models(count))], "short")):
            arguments = (pieces, pcb_rule(variant, count), [1000] * count)
            everywhere = (variant, count, name) == ("vision_es", 3, "sampled")
            yield Call("pcb_score_bounds", f"{variant}, {count} x bf16, {name}", arguments, everywhere=everywhere)
    yield Call("score_keys", "fp32", (tensor(F32),))
    for which in ("exp", "tanh"):
        yield Call("functions", which, (tensor(F32), which), everywhere=True)


def _pcb_of(
    name: str,
    base: torch.Tensor | None,
    xs: list[torch.Tensor],
    chosen: PcbRule,
    dtype: torch.dtype,
    everywhere: bool = False,
) -> Iterator[Call]:
    """All functions of the family for one rule and these models.

    None is held to wide loads: these kernels wait for arithmetic, and give each thread one element at a time.
    """
    count = len(xs)
    flags = {"everywhere": everywhere}
    out, weights = tensor(dtype), [1.0] * count
    yield Call("pcb_apply", name, (base, xs, chosen, weights, out, None), **flags)
    if count == 3:
        scale = torch.empty(count, NUMEL)
        yield Call("pcb_apply", f"{name}, shares", (base, xs, chosen, weights, out, scale))
        yield Call("pcb_scores", name, (base, xs, chosen))
    yield Call("pcb_histogram", f"{name}, high", (base, xs, chosen, [-1] * count), **flags)
    yield Call("pcb_histogram", f"{name}, low", (base, xs, chosen, [40000] * count))
    counts, highest = torch.zeros(count, 4097, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    yield Call("pcb_window_", name, (base, xs, chosen, [1 << 31] * count, counts, highest), **flags)
    if chosen.variant == "paper":
        yield Call("pcb_extremes", name, (base, xs), **flags)
        yield Call("pcb_sums", name, (base, xs, chosen), **flags)


def _expert() -> Iterator[Call]:
    """Parts of all dtypes: which they are is said in the table. There are so many that the table is copied."""
    for aligned in (True, False):
        for each in (1, 2):
            xs = [tensor(dtype).view(-1, ROW) for dtype in (BF16, F16, F32, BF16)]
            parts = []
            for of, x in enumerate(xs):
                kept = [tensor(dtype, aligned=aligned, numel=len(x) * 8) for dtype in (torch.uint16, BF16)]
                columns, values = (part.view(len(x), 8) for part in kept)
                parts += [ExpertPart(of, columns, values, 1.0)] * each
            saved = torch.zeros(saved_layout(xs, parts)[-1][1], dtype=torch.uint8)
            name = ("one part each", "two parts each")[each - 1] + ("" if aligned else ", unaligned")
            yield Call("expert_apply_", name, (xs, parts), everywhere=True)
            yield Call("expert_revert_", name, (xs, parts, saved), everywhere=True)


def _geometry() -> Iterator[Call]:
    for count in (1, 2, 3, 4, 8):
        for name, row_length in (("one row", NUMEL), ("rows", ROW)):
            everywhere = count in (2, 4)
            yield Call("gram", f"{count} x bf16, {name}", (tensor(BF16), models(count), row_length), {}, everywhere)
    for dtype in (F16, F32):
        yield Call("gram", f"2 x {NAMES[dtype]} without base", (None, models(2, dtype), NUMEL))
    yield Call("gram", "7 x mixed", (tensor(F32), mixed(7), NUMEL))
    yield Call("gram", "2 x bf16, unaligned", (tensor(BF16), models(2, aligned=False), NUMEL))


def _importance() -> Iterator[Call]:
    for name, base, count, xs in (
        ("1 x bf16", tensor(BF16), 1, models(1)),
        ("3 x bf16", tensor(BF16), 3, models(3)),
        ("8 x fp32", tensor(F32), 8, models(8, F32)),
        ("3 x mixed", tensor(F32), 3, mixed(3)),
        ("12 x bf16", tensor(BF16), 12, models(12)),
        ("3 x bf16, unaligned", tensor(BF16), 3, models(3, aligned=False)),
    ):
        # More models than are handed over by value are read again from the cache.
        everywhere, wide = name in ("3 x bf16", "12 x bf16"), "unaligned" not in name and count <= 8
        flags = {"everywhere": everywhere, "wide": wide}
        yield Call("ram_apply", name, (base, xs, [1.0] * count, 1e-5, tensor(base.dtype)), {}, **flags)
        yield Call("ram_counts", name, (base, xs, 1e-5), {}, **flags)
        yield Call("model_variance", name, (base, xs), {}, **flags)
        mask = torch.zeros(NUMEL // 8, dtype=torch.uint8)
        wide = "unaligned" not in name
        yield Call("energy_sums", name, (base, xs, None), {}, everywhere, wide)
        yield Call("energy_sums", f"{name}, masked", (base, xs, mask), {}, everywhere, wide)
    for dtype in (BF16, F16, F32):
        for aligned in (True, False):
            name = NAMES[dtype] + ("" if aligned else ", unaligned")
            flags = {"everywhere": aligned and dtype is not F16, "wide": aligned}
            arguments = (tensor(dtype), models(1, dtype, aligned=aligned))
            yield Call("nearswap", name, (*arguments, 1e-4, tensor(dtype)), {}, **flags)
            for length in (ROW, 64):
                rows = torch.zeros(NUMEL // length)
                yield Call("importance", f"{name}, rows of {length}", (*arguments, rows, length), {}, **flags)
    for length in (1, 64, 4096, 8192, 16384):
        arguments = (tensor(BF16), models(1), length)
        yield Call("divergences", f"bf16, rows of {length}", arguments, everywhere=length >= 4096)
    yield Call("divergences", "fp32, rows of 4096", (tensor(F32), models(1, F32), 4096))


def trial_rule(kind: str, differences: int = 1, offset: int = 0) -> TrialRule:
    """A rule of this kind, of distinct tensors."""
    places = [1] if kind == "blend" else list(range(1, 2 + 2 * differences))
    factors = [0.5, 0.5] if kind == "blend" else [0.5] * differences
    return TrialRule(kind, places, factors, 1 << 31, 1, 2, 3, offset)  # type: ignore[arg-type]


def _evolve() -> Iterator[Call]:
    for name, xs, rule in (
        ("blend, bf16", models(2), trial_rule("blend")),
        ("blend, fp32", models(2, F32), trial_rule("blend")),
        ("blend, fp16", models(2, F16), trial_rule("blend")),
        ("de, bf16", models(4), trial_rule("de")),
        ("de, 3 differences, bf16", models(8), trial_rule("de", 3)),
        ("de, mixed", mixed(4), trial_rule("de")),
        ("blend, bf16, unaligned", models(2, aligned=False), trial_rule("blend")),
        ("blend, bf16, at an odd offset", models(2), trial_rule("blend", offset=3)),
    ):
        everywhere, wide = name in ("blend, bf16", "de, bf16"), "unaligned" not in name
        for many in (False, True):
            if many and rule.offset:
                continue
            count = 2 if many else 1
            lists = [[x] * count for x in xs]
            out = [tensor(xs[0].dtype, aligned=wide)] * count
            variant = f"2 tensors, {name}" if many else name
            yield Call("trials", variant, (lists, rule, [5] * count, [-1] * count, out), {}, everywhere, wide)


def _highpass() -> Iterator[Call]:
    """Matrices that take every route, with few vectors and with many.

    Their transforms do run, here, on zeros; so they are small.
    """
    shapes = {
        "some": ((512, 512), 0.2, "ideal"),
        "few": ((512, 512), 0.01, "ideal"),
        "odd height": ((255, 512), 0.1, "ideal"),
        "odd width": ((512, 255), 0.1, "ideal"),
        "one column": ((2048, 1), 0.1, "ideal"),
        "transformed, odd": ((1025, 1024), 1.0, "ideal"),
        "official": ((512, 1376), 0.9, "official"),
        "official, odd": ((255, 511), 0.7, "official"),
    }
    for dtype in (BF16, F32, F16):
        for name, (shape, ratio, mode) in shapes.items():
            everywhere = dtype is not F16 and name in ("some", "few", "official")
            yield _filter(f"{name}, {NAMES[dtype]}", shape, dtype, ratio, mode, everywhere)
    yield _filter("transformed", (3072, 3072), F32, 1.0, "ideal", everywhere=True)


def _filter(
    variant: str, shape: tuple[int, int], dtype: torch.dtype, ratio: float, mode: str, everywhere: bool
) -> Call:
    """One call of highpass."""
    x = torch.zeros(shape, dtype=dtype)
    return Call("highpass", variant, (x, ratio, mode, torch.empty_like(x)), {}, everywhere)
