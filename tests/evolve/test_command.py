"""`fastmerge evolve`: what it writes and says, how it ends, and how it goes on."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastmerge import cli
from fastmerge.errors import ConfigError, FastmergeError
from fastmerge.evolve import config as configs
from fastmerge.evolve import evolve, job, objects
from fastmerge.evolve.lock import Occupied
from tests.cli.support import command, process_environment, save_model

SHAPES = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,)}
CONFIG = """\
models: [one, two, three, four]
strategy: cade
generations: 3
parameters: {F: [0.5, 0.2], CR: 0.5}
score: judge:development
final: judge:test
"""
JUDGE = """\
import os, signal
calls = 0
def _norm(model):
    return -float(sum((x.double() ** 2).sum() for x in model.values()))
def development(model):
    global calls
    calls += 1
    if str(calls) == os.environ.get("STOP_AT"):
        os.kill(os.getpid(), signal.SIGINT)
    return _norm(model)
def test(model):
    print("noise")
    return 2 * _norm(model)
"""
WIDE = """\
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.embed_tokens, self.model.norm = torch.nn.Embedding(8, 4), torch.nn.LayerNorm(4, bias=False)
def net(path):
    return Net()
def development(net):
    assert net.model.norm.weight.dtype == torch.float32
    return -float(sum((x.detach().double() ** 2).sum() for x in net.parameters()))
def test(net):
    return 0.0
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for name in ("one", "two", "three", "four"):
        save_model(tmp_path / name, {n: torch.randn(s, generator=generator).bfloat16() for n, s in SHAPES.items()})
    (tmp_path / "judge.py").write_text(JUDGE)
    (tmp_path / "evolve.yml").write_text(CONFIG)
    return tmp_path


def run(place: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("evolve", *arguments),
        cwd=place,
        env=process_environment() | variables,
        capture_output=True,
        text=True,
        timeout=600,
    )


def norm(model: dict[str, torch.Tensor]) -> float:
    return -float(sum((x.double() ** 2).sum() for x in model.values()))


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The place as this process's own directory; what its config imports is forgotten afterwards."""
    monkeypatch.chdir(place)
    yield place
    sys.modules.pop("judge", None)


def test_a_search_that_ctrl_c_stopped_goes_on_to_the_same_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = here
    stopped = run(place, "evolve.yml", "out", STOP_AT="7")
    assert stopped.returncode == 128 + signal.SIGINT
    assert stopped.stderr.splitlines()[-1] == (
        "fastmerge: Interrupted; the history is kept, and the same command goes on from there."
    )
    assert sorted(path.name for path in (place / "out").iterdir()) == ["history.jsonl"]

    assert cli.run(["evolve", "evolve.yml", "out"]) == 0
    result = capsys.readouterr()
    expected = evolve(
        [place / name for name in ("one", "two", "three", "four")],
        norm, strategy="cade", generations=3, F=(0.5, 0.2), CR=0.5, final_score=lambda model: 2 * norm(model),
        state=place / "state",
    )  # fmt: skip
    assert (place / "out/history.jsonl").read_bytes() == (place / "state/history.jsonl").read_bytes()
    written = load_file(place / "out/best/model.safetensors")
    assert {n: torch.equal(x, expected.state[n]) for n, x in written.items()} == dict.fromkeys(SHAPES, True)
    manifest = json.loads((place / "out/best/manifest.json").read_text())
    assert manifest["digest"] == expected.digest and len(manifest["inputs"]) == 4
    assert manifest["scores"] == {"development": expected.score, "final": expected.final}
    assert (place / "out/best/tokenizer.json").exists()
    assert "fastmerge evolve evolve.yml out" in (place / "out/best/README.md").read_text()
    assert (place / "out/scores.png").read_bytes().startswith(b"\x89PNG")
    told = result.err.splitlines()
    assert told[0].endswith("(from the history)") and told[-1].startswith("noise")
    assert [line.partition(":")[0] for line in told[:4]] == [f"generation {g} of 3" for g in range(4)]
    assert "evaluations  16, 6 of them from the history" in result.out and expected.digest in result.out


def test_a_directory_is_one_runs_alone_and_done_with_when_its_model_is_there(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*options: str) -> tuple[int, str]:
        code = cli.run(["evolve", "evolve.yml", "out", *options])
        return code, json.loads(capsys.readouterr().out)["error"] if "--json" in options else ""

    with Occupied(here / "out"):
        assert said("--json") == (
            2, "Another run is at work in out: wait until it has ended, or choose another directory.",
        )  # fmt: skip
    assert not (here / "out").exists()  # nothing was written
    assert said("--quiet") == (0, "") and (here / "out/best/model.safetensors").exists()
    code, sentence = said("--json")
    assert code == 2 and "is finished" in sentence


def test_a_module_of_another_dtype_does_not_show_in_the_files(here: Path) -> None:
    """The model that is scored may be wider than the members; what is written is as they are."""
    (here / "judge.py").write_text(WIDE)
    (here / "evolve.yml").write_text(CONFIG + "model: judge:net\n")
    report = job.run(configs.load(here / "evolve.yml"), here / "out")
    written = load_file(here / "out/best/model.safetensors")
    assert {x.dtype for x in written.values()} == {torch.bfloat16} and norm(written) == report["score"]
    assert json.loads((here / "out/best/manifest.json").read_text())["digest"] == report["digest"]


def test_coefficients_are_searched_from_a_config_too(here: Path) -> None:
    (here / "evolve.yml").write_text(
        "models: [two, three]\nbase_model: one\nstrategy: cma\nmerge_method: task_arithmetic\nevaluations: 5\n"
        "parameters: {weight: 0.5}\nspace: {lambda: [0.1, 0.9]}\nscore: judge:development\n"
    )
    report = job.run(configs.load(here / "evolve.yml"), here / "out")
    assert report["evaluations"] == 5 and 0.1 <= report["parameters"]["lambda_"] <= 0.9
    written = load_file(here / "out/best/model.safetensors")
    assert norm(written) == report["score"]
    assert json.loads((here / "out/best/manifest.json").read_text())["digest"] == report["digest"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("score: judge:test", "line 1: `models` lists the first members"),
        ("models: [a, b]", "the key `score` is missing"),
        ("models: [a, b]\nscore: judge", "line 2: `score` names a function as `package.module:function`, not 'judge'"),
        ("models: [a, b]\nscore: j:a\nfinal: j:a", "line 3: `final` looks at what `score` has looked at"),
        ("models: [a, b]\nscore: {tasks: [x, y]}\nfinal: {tasks: [y]}", "line 3: `final` looks at what"),
        ("models: [a, b]\nscore: j:a\nstrategy: dee", "line 3: `strategy` is one of evolver, de, cade, cma, optuna"),
        ("models: [a, b]\nscore: j:a\ngeneration: 3", "line 3: the key `generation` is not understood; did you mean"),
        ("models: [a, b]\nscore: j:a\nseed: x", "line 3: `seed` must be a whole number"),
        ("models: [a, b]\nscore: j:a\nstrategy: cma", "`space` names what is searched"),
        ("models: [a, {b: c}]\nscore: j:a", "a model is a path or a hub name"),
        ("models: [a, b]\nscore: {task: [x]}", "line 2: `task` is not understood here"),
        ("- a", "a config is a mapping"),
    ],
)
def test_what_a_config_refuses(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "evolve.yml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        configs.load(path)
    assert sentence in str(raised.value)


def test_a_picture_on_a_full_disk_is_one_sentence_and_not_half_there(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(records: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fastmerge.evolve.picture.draw", full)
    assert cli.run(["evolve", "evolve.yml", "out"]) == 1
    assert "fastmerge: Writing out/scores.png failed: the disk is full" in capsys.readouterr().err
    assert [path.name for path in (here / "out").iterdir()] == ["history.jsonl"]


def test_names_that_lead_nowhere_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_of_test.py").write_text("value = 3\n")
    with objects.importable(tmp_path):
        for spec, sentence in (
            ("nowhere_at_all:score", "the module nowhere_at_all cannot be imported"),
            ("mine_of_test:score", "has no function score"),
            ("mine_of_test:value", "has no function value"),
        ):
            with pytest.raises(ConfigError, match=sentence):
                objects.function(spec)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(FastmergeError, match="install lm-eval, or name a function"):
        objects.score({"tasks": ["arc_easy"]}, "one")


def test_lm_evals_tasks_are_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a stand-in for lm-eval: what it is asked, and what of its answer counts."""
    asked: list[dict[str, Any]] = []

    def simple_evaluate(**named: Any) -> dict[str, Any]:
        asked.append(named)
        return {"results": {"a": {"acc,none": 0.5, "acc_norm,none": 0.25}, "b": {"alias": "b", "acc,none": 0.75}}}

    class HFLM:
        def __init__(self, pretrained: Any, tokenizer: str) -> None:
            self.held = pretrained, tokenizer

    harness, models, huggingface = (types.ModuleType(n) for n in ("lm_eval", "models", "huggingface"))
    harness.simple_evaluate, huggingface.HFLM = simple_evaluate, HFLM  # type: ignore[attr-defined]
    for name, module in (("", harness), (".models", models), (".models.huggingface", huggingface)):
        monkeypatch.setitem(sys.modules, f"lm_eval{name}", module)
    model = torch.nn.Linear(2, 2)
    score = objects.score({"tasks": ["a", "b"], "limit": 10}, "first")
    assert score(model) == (0.25 + 0.75) / 2
    assert asked[0]["model"].held == (model, "first") and (asked[0]["tasks"], asked[0]["limit"]) == (["a", "b"], 10)
    assert objects.score({"tasks": ["a"], "metric": "acc,none"}, "first")(model) == 0.5
    with pytest.raises(FastmergeError, match="has no metric f1"):
        objects.score({"tasks": ["a"], "metric": "f1"}, "first")(model)
    with pytest.raises(FastmergeError, match="need a live model"):
        score({})


def test_a_live_model_is_made_by_a_function(tmp_path: Path) -> None:
    (tmp_path / "made_of_test.py").write_text(
        "import torch\ndef net(path):\n    return torch.nn.Linear(len(path), 1)\ndef no(path):\n    return path\n"
    )
    with objects.importable(tmp_path):
        made = objects.live_model("made_of_test:net", "abc")
        assert isinstance(made, torch.nn.Linear) and made.in_features == 3 and not made.training
        with pytest.raises(ConfigError, match=r"must return a torch.nn.Module, not str"):
            objects.live_model("made_of_test:no", "abc")
    assert objects.live_model(None, "abc") is None
