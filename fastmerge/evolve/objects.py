"""What a config names: functions of the user's modules, live models, and lm-eval's tasks."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastmerge.errors import ArgumentError, ConfigError

METRICS = ("acc_norm,none", "acc,none", "exact_match,strict-match", "exact_match,none", "f1,none")
"""Of a task's results the first of these that there is, if no metric is named."""


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Within it, modules that lie in this folder can be imported."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def function(spec: str) -> Callable[..., Any]:
    """The function that `package.module:function` names. ConfigError: there is none."""
    module, _, name = spec.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{spec}: the module {module} cannot be imported ({error}).") from error
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ConfigError(f"{spec}: the module {module} has no function {name}.")
    result: Callable[..., Any] = found
    return result


def check_model(spec: str | None) -> None:
    """ConfigError: there is no such function to make a live model. Nothing is made."""
    if spec not in (None, "transformers"):
        function(spec)


def live_model(spec: str | None, first: str) -> torch.nn.Module | None:
    """The module that takes the trials' values. first: the first checkpoint, of which it is made."""
    if spec is None:
        return None
    if spec == "transformers":
        try:
            from transformers import AutoModelForCausalLM
        except ImportError as error:
            raise ConfigError(f"model: transformers needs the package transformers ({error}).") from None
        model: Any = AutoModelForCausalLM.from_pretrained(first, dtype="auto")
    else:
        model = function(spec)(first)
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"{spec} must return a torch.nn.Module, not {type(model).__name__}.")
    return model.eval()


def score(spec: str | dict[str, Any], first: str) -> Callable[[Any], float]:
    """A score by its name or by lm-eval's tasks."""
    if isinstance(spec, str):
        return function(spec)
    return TaskScore(spec["tasks"], first, limit=spec.get("limit"), metric=spec.get("metric"))


class TaskScore:
    """The mean over lm-eval tasks. tokenizer: the checkpoint that has it. limit: examples of each task; None for all.

    metric: as lm-eval calls it, such as "acc,none"; None for the first of METRICS that a task has.
    """

    def __init__(self, tasks: Sequence[str], tokenizer: str, *, limit: int | None, metric: str | None) -> None:
        try:
            self._harness: Any = importlib.import_module("lm_eval")
            self._wrapper: Any = importlib.import_module("lm_eval.models.huggingface").HFLM
        except ImportError as error:
            raise ArgumentError(
                f"tasks need the package lm-eval, which cannot be imported here ({error}); install lm-eval, or name "
                "a function of your own as the score."
            ) from None
        self.tasks, self.tokenizer, self.limit, self.metric = list(tasks), tokenizer, limit, metric

    def __call__(self, model: Any) -> float:
        """Evaluate a module of transformers."""
        if not isinstance(model, torch.nn.Module):
            raise ArgumentError("lm-eval's tasks need a live model: add `model: transformers` to the config.")
        wrapped = self._wrapper(pretrained=model, tokenizer=self.tokenizer)
        results = self._harness.simple_evaluate(model=wrapped, tasks=self.tasks, limit=self.limit)["results"]
        return sum(self._of(task, results[task]) for task in self.tasks) / len(self.tasks)

    def _of(self, task: str, result: dict[str, Any]) -> float:
        for metric in METRICS if self.metric is None else (self.metric,):
            if metric in result:
                return float(result[metric])
        raise ArgumentError(f"the task {task} has no metric {self.metric or METRICS}; it has {', '.join(result)}.")
