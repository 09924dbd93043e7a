"""Choosing a backend: by argument, by environment, and what is said when it cannot be had."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fastmerge import backends, ops
from fastmerge.backends import gpu
from fastmerge.backends.limits import TooManyModelsError
from fastmerge.errors import BackendError
from fastmerge.reference import random


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget which backends were found, for one test."""
    monkeypatch.setattr(backends, "_loaded", {})
    monkeypatch.setattr(backends, "_misconfigured", set())
    monkeypatch.delenv("FASTMERGE_BACKEND", raising=False)


def break_cpu(monkeypatch: pytest.MonkeyPatch, error: type[Exception] = ImportError) -> None:
    original = backends.importlib.import_module

    def import_module(name: str) -> object:
        if name.endswith(".cpu"):
            raise error("undefined symbol: kernels")
        return original(name)

    monkeypatch.setattr(backends.importlib, "import_module", import_module)


def test_reference_is_always_there() -> None:
    assert backends.available()["reference"] is None
    assert set(backends.available()) == set(backends.names())
    assert backends.name_of(backends.resolve("reference")) == "reference"


def test_a_broken_backend_gives_its_reason_and_auto_does_without(
    monkeypatch: pytest.MonkeyPatch, unloaded: None
) -> None:
    break_cpu(monkeypatch)
    assert "undefined symbol: kernels" in backends.available()["cpu"]
    assert "undefined symbol: kernels" in backends.reason("cpu")
    assert backends.name_of(backends.resolve()) == "reference"
    assert ops.kth_magnitude([torch.tensor([3.0, -4.0])], 1) == 4.0


def test_a_forced_backend_that_is_missing_raises_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, unloaded: None
) -> None:
    break_cpu(monkeypatch)
    with pytest.raises(BackendError, match=r"backend='cpu' was asked for but does not work here: .*undefined symbol"):
        backends.resolve("cpu")
    monkeypatch.setenv("FASTMERGE_BACKEND", "cpu")
    with pytest.raises(BackendError, match=r"FASTMERGE_BACKEND='cpu' was asked for"):
        ops.count_nonfinite(torch.ones(2))


def test_a_misconfigured_backend_is_not_replaced_in_silence(monkeypatch: pytest.MonkeyPatch, unloaded: None) -> None:
    break_cpu(monkeypatch, BackendError)
    with pytest.raises(BackendError, match="undefined symbol"):
        backends.resolve("auto")
    assert backends.name_of(backends.resolve("reference")) == "reference"


def test_the_environment_overrides_auto_but_not_an_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMERGE_BACKEND", "reference")
    assert backends.name_of(backends.resolve("auto")) == "reference"
    monkeypatch.setenv("FASTMERGE_BACKEND", "nonsense")
    assert backends.name_of(backends.resolve("reference")) == "reference"
    with pytest.raises(BackendError, match="FASTMERGE_BACKEND='nonsense' is not a backend"):
        backends.resolve("auto")


def test_an_unknown_name_gets_the_near_one_suggested() -> None:
    with pytest.raises(BackendError, match="did you mean 'reference'"):
        ops.abs_histogram(torch.ones(2), backend="referense")


def test_a_device_without_a_backend_is_refused() -> None:
    with pytest.raises(BackendError, match=r"'meta'.*\.cpu\(\)"):
        backends.resolve("auto", torch.device("meta"))
    with pytest.raises(BackendError, match="backend='cpu' does not work on device 'cuda'; move the tensors to cpu"):
        backends.resolve("cpu", "cuda:0")


def test_kernels_for_gpus_are_for_gpus_unless_they_are_named_and_interpreted() -> None:
    if backends.reason("triton") is None:
        assert backends.name_of(backends.resolve("auto", "cuda")) in ("cuda", "triton")
        assert backends.name_of(backends.resolve("triton", "cuda:1")) == "triton"
    assert backends.name_of(backends.resolve("auto", "cpu")) in ("cpu", "reference")


def test_measurements_choose_between_backends_function_by_function(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ModuleType("fastmerge.backends.cuda"), ModuleType("fastmerge.backends.triton")
    first.tie_counts, first.topk_mask = "cuda's", "cuda's"  # type: ignore[attr-defined]
    second.tie_counts, second.topk_mask = "triton's", "triton's"  # type: ignore[attr-defined]
    monkeypatch.setattr(backends, "_loaded", {"cuda": first, "triton": second})
    monkeypatch.setattr(backends, "_capability", lambda: "9.0")
    assert backends.resolve("auto", "cuda").topk_mask == "cuda's"
    measured = {"9.0": {"topk_mask": "triton", "tie_counts": "cuda"}, "8.0": {"tie_counts": "triton"}}
    monkeypatch.setattr(backends.preferences, "FASTER", measured)
    mixed = backends.resolve("auto", "cuda")
    assert (mixed.tie_counts, mixed.topk_mask) == ("cuda's", "triton's")
    assert backends.name_of(mixed) == "cuda"
    assert backends.resolve("cuda", "cuda") is first
    monkeypatch.setitem(backends._loaded, "triton", "no compiler")
    assert backends.resolve("auto", "cuda").topk_mask == "cuda's"


def test_auto_gives_more_models_than_a_backend_takes_to_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ModuleType("fastmerge.backends.cuda"), ModuleType("fastmerge.backends.triton")

    def few(models: int) -> str:
        if models > 2:
            raise TooManyModelsError("two at most")
        return "cuda's"

    first.kept_masks = first.only_here = few  # type: ignore[attr-defined]
    second.kept_masks = lambda models: "triton's"  # type: ignore[attr-defined]
    monkeypatch.setattr(backends, "_loaded", {"cuda": first, "triton": second})
    auto = backends.resolve("auto", "cuda")
    assert (auto.kept_masks(2), auto.kept_masks(3)) == ("cuda's", "triton's")
    assert not hasattr(auto, "no_such_function")
    with pytest.raises(BackendError, match="two at most"):
        auto.only_here(3)
    with pytest.raises(BackendError, match="two at most"):
        backends.resolve("cuda", "cuda").kept_masks(3)
    third = ModuleType("fastmerge.backends.reference")
    third.kept_masks = lambda models: "the reference's"  # type: ignore[attr-defined]
    monkeypatch.setattr(backends, "_loaded", {"cuda": first, "triton": "no compiler", "reference": third})
    assert backends.resolve("auto", "cuda").kept_masks(3) == "the reference's"


@given(probability=st.one_of(st.floats(-0.5, 1.5), st.sampled_from((0.0, 1.0, 5.75 / 2**32, 1 - 2.0**-33))))
@example(probability=1.0)
@example(probability=5.75 / 2**32)
def test_the_limit_of_random_words_is_the_references(probability: float) -> None:
    expected = random.threshold(torch.tensor([probability], dtype=torch.float64))
    assert gpu.keep_limit(probability) == int(expected)
