"""The ops on a GPU: the reference's bits, huge tensors, odd addresses, graphs, streams, no waiting, compilation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastmerge import ops
from fastmerge.backends import filters, highpass_on_gpus
from fastmerge.errors import ArgumentError
from tests.golden.test_pcb import case
from tests.gpu import support
from tests.gpu.calls import CALLS
from tests.gpu.support import by_kernels, captured, each_device, few_models, moved, nobody_waits, only_cuda, same
from tests.ops.test_library import op, pcb_arguments, samples
from tests.strategies import DTYPES

f32 = torch.float32
SAMPLES = len(samples(0, 5, "reference"))


# -- the reference's bits ----------------------------------------------------------------------------------------------


@each_device
@pytest.mark.parametrize("name", CALLS)
@support.drawn
@given(data=st.data())
def test_equal_bits(name: str, device: str, data: st.DataObject) -> None:
    call = CALLS[name](data.draw)
    expected = call.run("cpu", "reference")
    if call.empty:
        same(call.run(device, support.BACKEND), expected)
        return
    with by_kernels():
        actual = call.run(device, support.BACKEND)
    same(actual, expected)
    if isinstance(actual, Tensor):
        assert actual.device.type == device


@each_device
@pytest.mark.parametrize("number", range(SAMPLES))
def test_every_registered_op_gives_the_references_bits(number: int, device: str) -> None:
    """One call of each op, on a few tiles: small enough for compute-sanitizer."""
    name, arguments = samples(0, 300, "reference")[number]
    on_cpu, elsewhere = moved(arguments, "cpu"), moved(arguments, device)
    elsewhere = tuple(support.BACKEND if each == "reference" else each for each in elsewhere)
    expected, actual = op(name)(*on_cpu), op(name)(*elsewhere)
    if name.startswith("highpass"):  # transforms are the libraries', and promise a tolerance
        found, wanted = (actual, expected) if name == "highpass" else (elsewhere[3], on_cpu[3])
        torch.testing.assert_close(found.cpu(), wanted, rtol=2.0**-8, atol=1e-5)
        return
    same(actual, expected)
    same([x for x in elsewhere if isinstance(x, Tensor)], [x for x in on_cpu if isinstance(x, Tensor)])


@each_device
@pytest.mark.parametrize("variant", ["script", "vision", "vision_es"])
def test_golden_cases_of_pcb(variant: str, device: str) -> None:
    parameters, golden = case(0)
    arguments = {
        "density": parameters["ratio"],
        "variant": variant,
        "weight": parameters["lambda_script" if variant == "script" else "lambda_vision"],
        "return_scale": True,
    }
    merged, scale = ops.pcb_merge(golden["task_vectors"].to(device), **arguments, backend=support.BACKEND)
    expected = golden[f"{variant}.scale"]
    assert ((scale.cpu() - expected).abs() <= 1e-5 * expected.abs().max()).all()
    same((merged, scale), ops.pcb_merge(golden["task_vectors"], **arguments, backend="reference"))


@each_device
@pytest.mark.parametrize(
    ("shape", "ratio", "mode"),
    [
        ((256, 300), 0.05, "ideal"),
        ((300, 256), 0.4, "ideal"),
        ((256, 700), 0.9, "official"),
        ((75, 51), 0.6, "official"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_frequency_filter_is_within_its_tolerance_by_every_route(
    shape: tuple[int, int], ratio: float, mode: str, dtype: torch.dtype, device: str
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = ops.highpass(x.float(), ratio, mode=mode, backend="reference")
    rounding = 0.0 if dtype == torch.float32 else 2.0**-8
    kernels = import_module(f"fastmerge.backends.{support.BACKEND}.highpass").KERNELS
    for plan in filters.candidates(*shape, ratio, mode, x.element_size(), "cuda"):
        out = torch.empty(shape, dtype=dtype, device=device)
        highpass_on_gpus.filtered(kernels, x.to(device), out, plan)
        torch.testing.assert_close(out.cpu().float(), exact, rtol=rounding, atol=1e-6 * float(x.abs().max()))
    given = ops.highpass(x.to(device), ratio, mode=mode, backend=support.BACKEND)
    torch.testing.assert_close(given.cpu().float(), exact, rtol=rounding, atol=1e-6 * float(x.abs().max()))


@each_device
def test_pcb_rows_that_are_sampled_rather_than_sorted(device: str) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(70_000, generator=generator).mul_(0.01).to(torch.bfloat16) for _ in range(3)]
    expected = ops.pcb_merge(rows, backend="reference")
    same(ops.pcb_merge(moved(rows, device), backend=support.BACKEND), expected)


@each_device
@pytest.mark.parametrize("shift", [1, 3, 7] if not support.HERE else range(1, 9))
def test_inputs_and_outputs_at_odd_addresses(shift: int, device: str) -> None:
    size = 1000 if device == "cpu" else 1_000_003
    tensors = few_models(shift, 3, size + 8, device)
    parts = [x[(shift + 3 * i) % 8 :][:size] for i, x in enumerate(tensors)]
    memory = support.poisoned_out((size + 8,), torch.bfloat16, device)
    out = memory[(shift + 5) % 8 :][:size]
    base, *models = parts
    ops.consensus_merge(base, models, [1.0, 0.7, 0.4], density=0.5, out=out, backend=support.BACKEND)
    host = [x.cpu() for x in parts]
    same(out, ops.consensus_merge(host[0], host[1:], [1.0, 0.7, 0.4], density=0.5, backend="reference"))
    assert int(memory.isnan().sum()) == 8
    same(ops.topk_mask(base, 0.3, backend=support.BACKEND), ops.topk_mask(host[0], 0.3, backend="reference"))


@each_device
def test_more_models_than_fit_a_launchs_arguments(device: str) -> None:
    base, *models = few_models(0, 19, 700, device)
    weights = [0.1 * i - 0.5 for i in range(19)]
    actual = ops.consensus_merge(base, models, weights, density=0.4, backend=support.BACKEND)
    expected = ops.consensus_merge(base.cpu(), [x.cpu() for x in models], weights, density=0.4, backend="reference")
    same(actual, expected)


@only_cuda
def test_tensors_of_two_devices_are_refused(device: str) -> None:
    base, *models = few_models(0, 2, 100, device)
    with pytest.raises(ArgumentError, match="cpu"):
        ops.consensus_merge(base, [models[0], models[1].cpu()], 1.0)
    with pytest.raises(ArgumentError, match="cpu"):
        ops.consensus_merge(base.cpu(), models, 1.0)


# -- more elements than 31 bits count ----------------------------------------------------------------------------------


HUGE = {"cuda": 2**31 + 65_537, "cpu": 65_536 + 17}


def huge(device: str, tensors: int) -> int:
    """Elements, of which so many bfloat16 tensors fit the device."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < tensors * 2 * HUGE[device] + (2 << 30):
        pytest.skip(
            f"needs {tensors * 2 * HUGE[device] / 1e9:.0f} GB of the GPU; tests/ops/test_huge.py needs only a CPU"
        )
    return HUGE[device]


@pytest.fixture
def emptied() -> Any:
    """Gives the memory of a huge test back."""
    yield
    if support.HERE:
        torch.cuda.empty_cache()


@each_device
@pytest.mark.usefixtures("emptied")
def test_huge_selection(device: str) -> None:
    size = huge(device, 2)
    x = torch.zeros(size, dtype=torch.bfloat16, device=device)
    x[5], x[size - 9], x[size - 1] = -3.0, 2.0, 1.0
    counts = ops.abs_histogram(x, backend=support.BACKEND)
    assert int(counts.sum()) == size and int(counts[0]) == size - 3
    assert [ops.kth_magnitude(x, k, backend=support.BACKEND) for k in (1, 2, 3, 4, size)] == [3.0, 2.0, 1.0, 0.0, 0.0]
    bounds, before = ops.magnitude_bounds(None, [x], [0], [size - 10], backend=support.BACKEND)
    # All but ten of the zeros lie before the cut.
    assert bounds.tolist() == [[[2**31, 0], [0, size - 13]]]
    blocks = (size - 1) // ops.TIE_BLOCK * ops.TIE_BLOCK
    assert int(before[0, 1, -1]) == blocks - 1 - (1 if size - 9 < blocks else 0)
    x[:] = 1.0
    x[size - 4] = float("nan")
    assert ops.count_nonfinite(x, backend=support.BACKEND).tolist() == [1, 0]


@each_device
@pytest.mark.usefixtures("emptied")
def test_huge_mask_of_equal_magnitudes_marks_the_first_ones(device: str) -> None:
    size = huge(device, 2)
    x = torch.full((size,), 0.5, dtype=torch.bfloat16, device=device)
    kept = size - 11
    mask = ops.topk_mask(x, (kept + 0.5) / size, backend=support.BACKEND)
    assert bool(mask[:kept].all()) and not bool(mask[kept:].any())


@each_device
@pytest.mark.usefixtures("emptied")
@pytest.mark.parametrize("method", [None, "bernoulli"])
def test_huge_merge_is_that_of_its_pieces(method: str | None, device: str) -> None:
    size = huge(device, 3)
    base = torch.empty(size, dtype=torch.bfloat16, device=device)
    model = torch.empty_like(base)
    for seed, x in enumerate((base, model)):
        generator = torch.Generator(device).manual_seed(seed)
        for part in x.split(1 << 26):
            part.copy_(torch.randn(part.numel(), generator=generator, device=device))
    arguments = {"method": method, "density": 0.5, "seed": 7, "tensor_id": 9, "divisor": "none"}
    out = support.poisoned_out((size,), torch.bfloat16, device)
    ops.consensus_merge(base, [model], [0.7], **arguments, out=out, backend=support.BACKEND)
    for start in (0, size // 2 - 500, size - 66_000 if device == "cuda" else size - 1000):
        piece = slice(start, min(start + (66_000 if device == "cuda" else 1000), size))
        given = base[piece].cpu(), [model[piece].cpu()], [0.7]
        same(out[piece], ops.consensus_merge(*given, **arguments, offset=start, backend="reference"))


# -- graphs, streams, waiting ------------------------------------------------------------------------------------------


def merging(base: Tensor, models: list[Tensor]) -> Tensor:
    return ops.consensus_merge(base, models, [1.0, -0.7, 0.4], density=0.5, backend=support.BACKEND)


def kth(base: Tensor, models: list[Tensor]) -> Tensor:
    return op("kth_magnitude")([base, *models], 100, support.BACKEND)


def masking(base: Tensor, models: list[Tensor]) -> Tensor:
    return ops.topk_mask(base, 0.3, backend=support.BACKEND)


def random_merging(base: Tensor, models: list[Tensor]) -> Tensor:
    return ops.consensus_merge(base, models, [1.0, -0.7, 0.4], method="bernoulli", density=0.5, backend=support.BACKEND)


def task_arithmetic(base: Tensor, models: list[Tensor]) -> Tensor:
    given = base, models, [1.0, -0.7, 0.4]
    return ops.consensus_merge(*given, method=None, election="none", divisor="none", backend=support.BACKEND)


def histogram(base: Tensor, models: list[Tensor]) -> Tensor:
    return ops.abs_histogram([base, *models], backend=support.BACKEND)


def histograms(base: Tensor, models: list[Tensor]) -> list[Tensor]:
    """The same kernel with more shared memory, and with less."""
    return [ops.abs_histogram([base.float()], bins=bins, backend=support.BACKEND) for bins in (1 << 15, 1 << 14)]


def many(base: Tensor, models: list[Tensor]) -> list[Tensor]:
    """Lists of more tensors than a launch can be told of by value."""
    most = 1400 if base.is_cuda else 21  # an interpreter takes seconds for hundreds
    lists = [list(x[:most].split(7)) for x in (base, *models)]
    return ops.consensus_merge_many(lists[0], lists[1:], [1.0, -0.7, 0.4], density=0.5, backend=support.BACKEND)


def competing(base: Tensor, models: list[Tensor]) -> list[Tensor]:
    """The ops of PCB-Merging, under a rule of given numbers."""
    rule = moved(pcb_arguments("vision_es", len(models)), base.device.type)
    paper = moved(pcb_arguments("paper", len(models)), base.device.type)
    return competing_under(base, models, rule, paper)


def competing_under(base: Tensor, models: list[Tensor], rule: Any, paper: Any) -> list[Tensor]:
    by, n = support.BACKEND, len(models)
    counts = torch.zeros(n, 1001, dtype=torch.int64, device=base.device)
    highest = torch.zeros(n, dtype=torch.int64, device=base.device)
    op("pcb_window_")(base, models, *rule, [0x80000000] * n, counts, highest, by)
    return [
        counts,
        highest,
        op("pcb_scores")(base, models, *rule, by),
        op("pcb_histogram")(base, models, *rule, [-1] * n, by),
        op("pcb_extremes")(base, models, by),
        op("pcb_sums")(base, models, *paper, by),
        op("pcb_apply")(base, models, *rule, [1.0] * n, torch.bfloat16, by),
    ]


RUNS: list[Callable[[Tensor, list[Tensor]], Any]] = [
    merging, kth, masking, random_merging, task_arithmetic, histogram, histograms, many,
]  # fmt: skip


def size_of(device: str) -> int:
    return 1_000_003 if device == "cuda" else 1_500


def by_reference(run: Callable[[Tensor, list[Tensor]], Any], tensors: list[Tensor], monkeypatch: Any) -> Any:
    """What a run gives by the reference, on copies of these tensors in the host's memory."""
    with monkeypatch.context() as patched:
        patched.setattr(support, "BACKEND", "reference")
        host = [x.cpu() for x in tensors]
        return run(host[0], host[1:])


@each_device
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_a_captured_graph_is_replayed_on_other_inputs(run: Any, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if run is many and (support.BACKEND, device) == ("triton", "cuda"):
        pytest.skip("with Triton's kernels long tables are copied from the host, which no graph captures (docs/gpu.md)")
    tensors = few_models(1, 3, size_of(device), device)
    replay = captured(device, lambda: run(tensors[0], tensors[1:]))
    for seed in (2, 3):
        for x, other in zip(tensors, few_models(seed, 3, size_of(device), device), strict=True):
            x.copy_(other)
        same(replay(), by_reference(run, tensors, monkeypatch))


@only_cuda
def test_a_refused_launch_leaves_no_error_behind_and_no_other_device(device: str) -> None:
    if support.BACKEND != "cuda":
        pytest.skip("Triton sees to its launches itself")
    from fastmerge.backends.cuda.launch import compiled

    x, current = torch.ones(1000, device=device), torch.cuda.current_device()
    with pytest.raises(RuntimeError, match="CUDA: "):
        compiled.write_numbers((torch.cuda.device_count(), 0), [1], 0)
    assert torch.cuda.current_device() == current
    assert ops.count_nonfinite(x, backend="cuda").tolist() == [0, 0]
    assert torch.cuda.current_device() == current


@each_device
@pytest.mark.parametrize("run", [*RUNS, competing], ids=lambda run: run.__name__)
def test_nobody_waits_for_the_gpu(run: Any, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = few_models(4, 3, size_of(device), device)
    if run is competing:
        rule = moved(pcb_arguments("vision_es", 3), device), moved(pcb_arguments("paper", 3), device)

        def work() -> Any:
            return competing_under(tensors[0], tensors[1:], *rule)
    else:

        def work() -> Any:
            return run(tensors[0], tensors[1:])

    work()  # compiles
    with nobody_waits(device):
        result = work()
    same(result, by_reference(run, tensors, monkeypatch))


@each_device
@pytest.mark.parametrize("each", [1, 2])
def test_experts_are_put_on_and_taken_off_and_nobody_waits(each: int, device: str) -> None:
    """Five tensors of three dtypes: what their kernels need to know is copied."""
    generator = torch.Generator().manual_seed(0)
    thetas = [torch.randn(9, 200, generator=generator).to(DTYPES[of % 3]) for of in range(5)]
    experts = [
        (of, ops.extract_expert(torch.randn(9, 200, generator=generator), 0.3, backend="reference"))
        for of in range(5)
        for _ in range(each)
    ]
    columns, values = [e.columns for _, e in experts], [e.values for _, e in experts]
    given = [of for of, _ in experts], columns, values, [0.5 + of for of, _ in experts], []
    expected = [x.clone() for x in thetas]
    wanted = op("expert_apply_")(expected, *given, "reference")
    tensors, there = moved(thetas, device), moved(given, device)
    for compiled in (False, True):
        with nobody_waits(device) if compiled else nullcontext():
            saved = op("expert_apply_")(tensors, *there, support.BACKEND)
        same([saved, *tensors], [wanted, *expected])
        with nobody_waits(device) if compiled else nullcontext():
            changed = op("expert_revert_")(tensors, *there, saved, support.BACKEND)
        same([changed, *tensors], [torch.zeros(5, dtype=torch.int64), *thetas])


@each_device
@pytest.mark.parametrize("method", [None, "magnitude", "magnitude_outliers", "bernoulli"])
def test_prepared_lists_are_captured_and_wait_for_nothing(method: str | None, device: str) -> None:
    def lists(tensors: list[Tensor]) -> list[list[Tensor]]:
        return [[x[:9], x[16:700], x[704:], x[:0]] for x in tensors]

    tensors = few_models(1, 3, size_of(device), device)
    base, *models = lists(tensors)
    weights, options = [1.0, -0.7, 0.4], {"density": [0.5, 0.5, 0.2], "method": method, "seed": 1 << 63 | 5}
    prepared = ops.prepare_merge_many(base, models, tensor_ids=[1, 1 << 40, 3, 4], backend=support.BACKEND)
    replay = captured(device, lambda: prepared.merge(weights, **options))
    prepared.merge([1.0, 1.0, 1.0], density=0.7, method=method)  # leaves what was captured alone
    for seed in (2, 3):
        for x, other in zip(tensors, few_models(seed, 3, size_of(device), device), strict=True):
            x.copy_(other)
        host, *others = lists([x.cpu() for x in tensors])
        ids = {"tensor_ids": [1, 1 << 40, 3, 4]}
        expected = ops.consensus_merge_many(host, others, weights, backend="reference", **ids, **options)
        same(replay(), expected)
        with nobody_waits(device):
            found = prepared.merge(weights, **options)
        same(found, expected)
    with pytest.raises(ArgumentError, match="was resized or moved since it was prepared"):
        models[0][1].data = torch.zeros_like(models[0][1])
        prepared.merge(weights)


@only_cuda
@pytest.mark.parametrize("run", [*RUNS, competing], ids=lambda run: run.__name__)
def test_a_side_stream_waits_for_nothing_and_for_its_own_inputs(
    run: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = few_models(5, 3, size_of(device), device)
    late = [torch.full_like(x, 1e30) for x in tensors]
    run(tensors[0], tensors[1:])  # compiles
    torch.cuda.synchronize()
    side, busy = torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda._sleep(1_500_000_000)  # most of a second on the default stream
    busy.record()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for x, source in zip(late, tensors, strict=True):
            x.copy_(source)
        result = run(late[0], late[1:])
    side.synchronize()
    assert not busy.query(), "the work on the side stream waited for the default stream"
    same(result, by_reference(run, tensors, monkeypatch))
    torch.cuda.synchronize()


@each_device
def test_two_streams_at_once(device: str) -> None:
    """Each with inputs of its own; in the interpreter one after the other."""
    first, second = (few_models(seed, 3, size_of(device), device) for seed in (6, 7))
    results = []
    streams = [torch.cuda.Stream() for _ in range(2)] if device == "cuda" else [None, None]
    if device == "cuda":
        torch.cuda.synchronize()
    for stream, tensors in zip(streams, (first, second), strict=True):
        with torch.cuda.stream(stream):
            results.append(merging(tensors[0], tensors[1:]))
    if device == "cuda":
        torch.cuda.synchronize()
    for result, tensors in zip(results, (first, second), strict=True):
        host = [x.cpu() for x in tensors]
        same(result, ops.consensus_merge(host[0], host[1:], [1.0, -0.7, 0.4], density=0.5, backend="reference"))


# -- torch -------------------------------------------------------------------------------------------------------------


@each_device
@pytest.mark.parametrize("number", range(SAMPLES))
def test_schemas_and_fakes(number: int, device: str) -> None:
    name, arguments = samples(0, 5, "reference")[number]
    given = tuple(support.BACKEND if each == "reference" else each for each in moved(arguments, device))
    torch.library.opcheck(op(name), given, test_utils=("test_schema", "test_faketensor"))


@each_device
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph_and_run_on_other_inputs(dynamic: bool, device: str) -> None:
    torch._dynamo.reset()
    rule = moved(pcb_arguments("vision_es", 2), device)

    def work(base: Tensor, models: list[Tensor]) -> list[Tensor]:
        by = support.BACKEND
        bounds, ties = op("magnitude_bounds")(base, models, [0, 1], [base.numel() // 2, 7], f32, by)
        given = [], [], 1, 0, 0, [], 0, None, [1.0, 1.0], "weighted", "positive", "weights", 1.0, 1.0, f32
        return [
            op("kth_magnitude")([base, *models], 7, by),
            op("abs_histogram")(models, 256, by),
            op("topk_mask")(base, bounds[:1], ties[:1], by),
            op("consensus_apply")(base, models, [1.0, 0.5], "models", "band", bounds, ties, *given, torch.bfloat16, by),
            op("pcb_apply")(base, models, *rule, [1.0, 0.5], torch.bfloat16, by),
        ]

    compiled = torch.compile(work, fullgraph=True, backend="aot_eager", dynamic=dynamic or None)
    for seed, size in ((1, 600), (2, 600), (3, 1111)):
        base, *models = few_models(seed, 2, size, device)
        same(compiled(base, models), work(base, models))
