"""The registered ops: schemas, fakes and aliasing by opcheck, and compilation on inputs other than those traced."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmerge.ops
from fastmerge import backends
from tests.numeric import assert_bitwise_equal
from tests.ops.running import FAST

BACKENDS = ["reference", *FAST]
f32 = torch.float32

each_working_backend = pytest.mark.parametrize("backend", BACKENDS)


def op(name: str) -> Any:
    return getattr(torch.ops.fastmerge, name).default


def random_models(seed: int, rows: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 8, generator=generator).to(dtype) for _ in range(3)]


def rule_arguments(method: str, models: int, numel: int) -> tuple[Any, ...]:
    bounds = torch.tensor([[[1 << 31, 0], [0x3F000000, 0]]] * models) if method == "band" else None
    ties = torch.zeros(models, 2, 1, dtype=torch.int64) if method == "band" else None
    masks = torch.full((models, (numel + 7) // 8), 0x5A, dtype=torch.uint8) if method == "mask" else None
    return method, bounds, ties, [0.5] * models, [0.1] * models, 8, -5, 77, list(range(models)), 0, masks


def merge_arguments(models: list[Tensor], method: str = "band") -> tuple[Any, ...]:
    base, *others = models
    rule = rule_arguments(method, 2, base.numel())
    return (base, others, [0.5, 1.5], "models", *rule, [1.0, 2.0], "weighted", "positive", "weights", 1.0, 0.7, f32)


def pcb_arguments(variant: str, models: int) -> tuple[Any, ...]:
    """A rule of this variant with all its parts, flat."""
    pairs = models * (models + 1) // 2
    thresholds = torch.tensor([[0.01, 0.5]] * models)
    if variant != "paper":
        return variant, torch.tensor([[0.1, 2.0]] * models), None, None, thresholds
    return variant, None, torch.tensor([[-4.0, 4.0]] * pairs), torch.ones(models + pairs), thresholds


def samples(seed: int, rows: int, backend: str) -> list[tuple[str, tuple[Any, ...]]]:
    """One call of each op; all but the mutating ones come first."""
    models = random_models(seed, rows)
    base, *others = models
    bounds, ties = op("magnitude_bounds")(base, others, [0, 1], [2, 3], f32, backend)
    return [
        ("abs_histogram", (models, 256, backend)),
        ("kth_magnitude", (models, 3, backend)),
        ("magnitude_bounds", (base, others, [0, 1], [2, 3], f32, backend)),
        ("key_histogram", (base, others, [-1, -1], f32, backend)),
        ("key_histogram", (None, models, [100, 65535, 16000], torch.bfloat16, backend)),
        ("key_window_", (base, others, [0, 5], f32, torch.zeros(2, 9, dtype=torch.int64), backend)),
        ("tie_counts", (base, others, bounds, f32, backend)),
        ("topk_mask", (base, bounds[:1], ties[:1], backend)),
        ("hashed_mask", (base, bounds[:1], -3, 4, 2, 10)),
        ("l1_sums", (base, others, f32, *rule_arguments("bernoulli", 2, base.numel()), backend)),
        ("kept_masks", (base, others, f32, *rule_arguments("della", 2, base.numel()), backend)),
        ("count_nonfinite", (base, backend)),
        ("gram", (base, others, 4, backend)),
        ("gram", (None, models, base.numel(), backend)),
        ("consensus_apply", (*merge_arguments(models), torch.float16, backend)),
        ("consensus_apply", (*merge_arguments(models, "della"), torch.float32, backend)),
        ("consensus_apply", (*merge_arguments(models, "mask"), torch.float32, backend)),
        ("consensus_apply_out", (*merge_arguments(models), torch.empty(rows, 8), backend)),
        ("fused_sum", (models, [0.5, 0.25, -1.0], backend)),
        ("consensus_merge_many_", many_arguments(models, "magnitude_outliers", backend)),
        ("zero_nonfinite_", (base.clone(), backend)),
        ("pcb_scores", (base, others, *pcb_arguments("vision_es", 2), backend)),
        ("pcb_window_", (base, others, *pcb_arguments("nlp", 2), [0, 1 << 31], *pcb_counts(2, 9), backend)),
        ("pcb_histogram", (None, models, *pcb_arguments("paper", 3), [-1, 0x8012, 0xBF80], backend)),
        ("pcb_extremes", (base, others, backend)),
        ("pcb_sums", (base, others, *pcb_arguments("paper", 2), backend)),
        ("pcb_apply", (base, others, *pcb_arguments("script", 2), [1.0, 0.5], torch.bfloat16, backend)),
        ("pcb_apply_out", (base, others, *pcb_arguments("vision", 2), [1.0, 0.5], torch.empty(rows, 8), None, backend)),
        ("pcb_apply_out", (None, models, *pcb_arguments("paper", 3), [1.0] * 3, *pcb_targets(models), backend)),
        ("expert_extract", (base, others[0], 3, torch.bfloat16, backend)),
        ("expert_apply_", (*expert_arguments(models, backend), backend)),
        ("expert_revert_", worn(models, backend)),
        ("highpass", (base, 0.5, "ideal", backend)),
        ("highpass_out", (base, 0.5, "official", torch.empty_like(base), backend)),
        ("nearswap", (base, others[:1], 0.5, torch.bfloat16, backend)),
        ("nearswap_out", (base, others[:1], 0.5, torch.empty(rows, 8), backend)),
        ("ram_counts", (base, others, 0.1, backend)),
        ("ram_apply", (base, others, [1.0, 1.5], 0.1, torch.float16, backend)),
        ("ram_apply_out", (base, others, [1.0, 1.5], 0.1, torch.empty(rows, 8), backend)),
        ("model_variance", (base, others, backend)),
        ("energy_sums", (base, others, None, backend)),
        ("energy_sums", (base, others, torch.full((base.numel() // 8,), 0x5A, dtype=torch.uint8), backend)),
        ("divergences", (base, others[:1], 8, backend)),
        ("importance", (base, others[:1], torch.ones(rows), 8, backend)),
        ("blend_trial", (base, others[:1], *trial_arguments(), 77, 12, 13, torch.float32, backend)),
        ("de_trial", (base, [*others, base], *trial_arguments(), 77, 12, -1, torch.bfloat16, backend)),
        ("blend_trials_", trials_arguments(models, backend)),
        ("de_trials_", trials_arguments([base, *others, base], backend)),
    ]


def trial_arguments() -> tuple[Any, ...]:
    return [0.3], 0.5, -7, 65535, 4095


def trials_arguments(roles: list[Tensor], backend: str) -> tuple[Any, ...]:
    """Of each role two tensors; a blend has one other role."""
    x, *parents = roles if len(roles) == 4 else roles[:2]
    out = [torch.empty(x.shape), torch.empty(2, 8)]
    return pairs([x]), pairs(parents), *trial_arguments(), [-5, 1 << 40], 0, [-1, 9], out, backend


def expert_arguments(models: list[Tensor], backend: str) -> tuple[Any, ...]:
    """Two experts on the first of two tensors, one on the second: all arguments but the backend."""
    kept = [op("expert_extract")(None, x, 3, f32, backend) for x in models]
    columns, values = [columns for columns, _ in kept], [values for _, values in kept]
    return [models[0].clone(), models[1].clone()], [0, 0, 1], columns, values, [0.5, -1.0, 2.0], []


def worn(models: list[Tensor], backend: str) -> tuple[Any, ...]:
    """Experts that are on, as they are taken off."""
    arguments = expert_arguments(models, backend)
    return (*arguments, op("expert_apply_")(*arguments, backend), backend)


def pairs(models: list[Tensor]) -> list[Tensor]:
    """Of each model two tensors."""
    return [part for x in models for part in (x, x[:2])]


def many_arguments(models: list[Tensor], method: str, backend: str) -> tuple[Any, ...]:
    base, *others = models
    bases = [base, base[:2]]
    kept = method, [0.5, 0.25], [0.1, 0.01], False, 3, [0, 1]
    out = [torch.empty(x.shape) for x in bases]
    formula = [1.0, 0.5], "models", *kept, "weighted", "positive", "weights", 0.7
    return (bases, pairs(others), 2, [0, 1 << 40], *formula, out, backend)


def pcb_counts(models: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(models, width, dtype=torch.int64), torch.zeros(models, dtype=torch.int64)


def pcb_targets(models: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.empty(models[0].shape), torch.empty(len(models), models[0].numel())


SAMPLES = 48
"""How many calls there are to check."""


@each_working_backend
@pytest.mark.parametrize("number", range(SAMPLES))
def test_opcheck(number: int, backend: str) -> None:
    name, arguments = samples(0, 5, backend)[number]
    torch.library.opcheck(op(name), arguments)


def test_every_registered_op_is_checked() -> None:
    registered = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "fastmerge::" in name}
    checked = [name for name, _ in samples(0, 5, "reference")]
    assert registered == set(checked) and len(checked) == SAMPLES


def run_all(models: list[Tensor], backend: str) -> list[Tensor]:
    base, *others = models
    bounds, ties = op("magnitude_bounds")(base, others, [0, 1], [base.numel() // 2, base.numel() - 1], f32, backend)
    merged = op("consensus_apply")(
        base, others, [1.0, 0.5], "models", "band", bounds, ties, [], [], 1, 0, 0, [], 0, None, [1.0, 1.0],
        "weighted", "positive", "weights", 1.0, 1.0, f32, torch.bfloat16, backend,
    )  # fmt: skip
    random = op("consensus_apply")(*merge_arguments(models, "bernoulli"), torch.float32, backend)
    out = torch.empty(base.shape)
    op("consensus_apply_out")(*merge_arguments(models, "della"), out, backend)
    changed = base.clone()
    op("zero_nonfinite_")(changed, backend)
    counts = torch.zeros(2, 101, dtype=torch.int64)
    op("key_window_")(base, others, [1, 2], f32, counts, backend)
    pcb_rule = pcb_arguments("vision_es", 2)
    window, highest = pcb_counts(2, 100_001)
    op("pcb_window_")(base, others, *pcb_rule, [0x80000000 - 50_000, 0x3F000000], window, highest, backend)
    merged_by_pcb, scale = torch.empty(base.shape), torch.empty(2, base.numel())
    op("pcb_apply_out")(base, others, *pcb_rule, [1.0, 0.5], merged_by_pcb, scale, backend)
    many = [many_arguments(models, method, backend) for method in ("magnitude", "bernoulli")]
    for arguments in many:
        op("consensus_merge_many_")(*arguments)
    expert = expert_arguments(models, backend)
    saved = op("expert_apply_")(*expert, backend)
    put_on = [x.clone() for x in expert[0]]
    filtered = torch.empty_like(base)
    op("highpass_out")(base, 0.5, "official", filtered, backend)
    swapped, rammed = torch.empty_like(base), torch.empty(base.shape)
    op("nearswap_out")(base, others[:1], 0.5, swapped, backend)
    op("ram_apply_out")(base, others, [1.0, 1.5], 0.1, rammed, backend)
    rows = op("divergences")(base, others[:1], 8, backend)
    trials = [trials_arguments(roles, backend) for roles in (models, [base, *others, base])]
    op("blend_trials_")(*trials[0])
    op("de_trials_")(*trials[1])
    return [
        *trials[0][-2],
        *trials[1][-2],
        op("blend_trial")(base, others[:1], *trial_arguments(), 77, 0, 3, torch.float32, backend),
        op("de_trial")(base, [*others, base], *trial_arguments(), 77, 9, -1, torch.bfloat16, backend),
        fastmerge.ops.blend_trial(base, others[0], 0.3, 0.5, seed=5, forced=2, out=base.clone(), backend=backend),
        swapped,
        rammed,
        rows,
        op("importance")(base, others[:1], rows, 8, backend),
        op("nearswap")(base, others[:1], 0.5, torch.float32, backend),
        op("ram_counts")(base, others, 0.1, backend),
        op("ram_apply")(base, others, [1.0, 1.5], 0.1, torch.float16, backend),
        op("model_variance")(base, others, backend),
        op("fused_sum")(models, [0.5, 0.25, -1.0], backend),
        op("energy_sums")(base, others, None, backend),
        op("highpass")(base, 0.5, "ideal", backend),
        filtered,
        *put_on,
        saved,
        op("expert_revert_")(*expert, saved, backend),
        *expert[0],
        *op("expert_extract")(base, others[0], 3, f32, backend),
        *many[0][-2],
        *many[1][-2],
        window,
        highest,
        merged_by_pcb,
        scale,
        op("pcb_scores")(base, others, *pcb_rule, backend),
        op("pcb_histogram")(base, others, *pcb_rule, [-1, 0xBF80], backend),
        op("pcb_extremes")(base, others, backend),
        op("pcb_sums")(base, others, *pcb_arguments("paper", 2), backend),
        op("pcb_apply")(base, others, *pcb_arguments("script", 2), [1.0, 0.5], torch.bfloat16, backend),
        op("abs_histogram")(models, 256, backend),
        op("kth_magnitude")(models, 7, backend),
        op("key_histogram")(base, others, [-1, -1], f32, backend),
        op("tie_counts")(base, others, bounds, f32, backend),
        op("topk_mask")(base, bounds[:1], ties[:1], backend),
        op("hashed_mask")(base, bounds[:1], 1, 2, 3, 4),
        op("l1_sums")(base, others, f32, "band", bounds, ties, [], [], 1, 0, 0, [], 0, None, backend),
        op("kept_masks")(base, others, f32, *rule_arguments("bernoulli", 2, base.numel()), backend),
        op("count_nonfinite")(base, backend),
        op("gram")(base, others, 8, backend),
        op("gram")(None, models, base.numel(), backend),
        merged,
        random,
        out,
        changed,
        counts,
    ]


@each_working_backend
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph_and_run_on_other_inputs(backend: str, compiler: str, dynamic: bool) -> None:
    torch._dynamo.reset()

    compiled: Callable[..., list[Tensor]] = torch.compile(
        run_all, fullgraph=True, backend=compiler, dynamic=dynamic or None
    )
    compiled(random_models(1, 6), backend)
    for seed, rows in ((2, 6), (3, 11)):
        models = random_models(seed, rows)
        for actual, expected in zip(compiled(models, backend), run_all(models, backend)):
            assert_bitwise_equal(actual, expected)


@each_working_backend
def test_results_are_no_aliases_and_inputs_are_left_alone(backend: str) -> None:
    models = random_models(4, 5, torch.float32)
    before = [x.clone() for x in models]
    merged = fastmerge.ops.consensus_merge(None, models[:1], 1.0, method=None, election="none", backend=backend)
    sparse = fastmerge.ops.sparsify(models[0], 1.0, backend=backend)
    for x in (merged, sparse):
        assert_bitwise_equal(x, before[0])
        x.zero_()
    for x, kept in zip(models, before):
        assert_bitwise_equal(x, kept)


def test_parameters_that_require_grad_are_merged_as_numbers() -> None:
    base, x = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.full((3,), 2.0))
    merged = fastmerge.ops.consensus_merge(base, [x], 1.0)
    assert not merged.requires_grad
    assert merged.tolist() == [2.0, 2.0, 2.0]


def test_import_brings_in_neither_dynamo_nor_triton() -> None:
    program = "import fastmerge.ops, sys; print([m for m in ('torch._dynamo', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_meta_kernels_agree_with_real_ones_without_a_backend() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in random_models(0, 5)]
        with_fake = op("consensus_apply")(*merge_arguments(fake, "none"), torch.bfloat16, "auto")
    assert with_fake.shape == (5, 8)
    assert with_fake.dtype == torch.bfloat16


def test_auto_is_a_backend_that_works() -> None:
    assert backends.available()[backends.name_of(backends.resolve("auto"))] is None
