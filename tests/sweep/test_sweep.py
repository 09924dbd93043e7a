"""`fastmerge sweep`: what it merges and says, what it refuses, how it ends, and how it goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastmerge
from fastmerge import cli
from fastmerge.errors import ArgumentError, CheckpointError, ConfigError, EvaluationError, FastmergeError
from fastmerge.sweep import config as configs
from fastmerge.sweep import picture
from fastmerge.sweep.job import Sweep
from tests.cli.support import command, process_environment, save_model
from tests.numeric import assert_bitwise_equal

SHAPES = {
    "model.embed_tokens.weight": (64, 40),
    "model.layers.0.mlp.up_proj.weight": (50, 40),
    "model.layers.1.mlp.up_proj.weight": (50, 40),
    "model.norm.weight": (40,),
}
MERGE = """\
merge_method: ties
base_model: base
models:
  - model: math
    parameters: {weight: 0.5, density: 0.9}
  - model: code
parameters: {weight: 1.0}
"""
SWEEP = """\
sweep:
  grid:
    density: [0.2, 0.4, 0.8]
    lambda: [0.5, 1]
  score: sweep_judge:development
"""
JUDGE = """\
import os, signal
import torch
seen, behave = [], []
def development(model):
    tensors = model.state_dict() if isinstance(model, torch.nn.Module) else model
    seen.append({name: x.clone() for name, x in tensors.items()})
    if str(len(seen)) == os.environ.get("STOP_AT"):
        os.kill(os.getpid(), signal.SIGINT)
    if behave:
        how = behave.pop(0)
        if isinstance(how, Exception):
            raise how
        if how is not None:
            return how
    return -float(sum((x.double() ** 2).sum() for x in tensors.values()))
def test(model):
    print("noise")
    return 2 * development(model)
def net(path):
    return torch.nn.ParameterDict({"a": torch.zeros(3, 5)})
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=generator).bfloat16() for n, s in SHAPES.items()}
    save_model(tmp_path / "base", base)
    for name in ("math", "code"):
        tuned = {n: (x + 0.1 * torch.randn(x.shape, generator=generator)).bfloat16() for n, x in base.items()}
        save_model(tmp_path / name, tuned)
    (tmp_path / "sweep_judge.py").write_text(JUDGE)
    (tmp_path / "sweep.yml").write_text(MERGE + SWEEP)
    monkeypatch.delitem(sys.modules, "sweep_judge", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(text: str, merge: str = MERGE) -> configs.SweepConfig:
    Path("sweep.yml").write_text(merge + text)
    return configs.load("sweep.yml")


def judge() -> Any:
    sys.path.insert(0, str(Path.cwd()))
    try:
        import sweep_judge  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    return sweep_judge


def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = process_environment() | variables
    return subprocess.run(command("sweep", *arguments), env=environment, capture_output=True, text=True, timeout=120)


def test_a_sweep_that_ctrl_c_stopped_goes_on(place: Path) -> None:
    stopped = run("sweep.yml", "out", STOP_AT="4")
    assert stopped.returncode == 128 + signal.SIGINT
    assert stopped.stderr.splitlines()[-1] == (
        "fastmerge: Interrupted; the results are kept, and the same command goes on from there."
    )
    assert [path.name for path in (place / "out").iterdir()] == ["results.jsonl"]

    again = run("sweep.yml", "out", "--write-best")
    assert again.returncode == 0, again.stderr
    told = again.stderr.splitlines()
    assert [line.endswith("(scored before)") for line in told] == [True] * 3 + [False] * 3
    assert told[0].startswith("candidate 1 of 6: density 0.2; lambda 0.5: -")
    lines = again.stdout.splitlines()
    assert lines[0].split() == ["density", "lambda", "score"]
    assert lines[1].split()[:2] == ["0.2", "0.5"] and lines[1].endswith("best  ")
    assert [line.split()[:2] for line in lines[2:7]] == [
        [d, x] for d, x in (("0.2", "1"), ("0.4", "0.5"), ("0.4", "1"), ("0.8", "0.5"), ("0.8", "1"))
    ]
    assert "resumed      3 of 6 were scored before" in lines
    assert (place / "out/scores.png").read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in (place / "out/results.jsonl").read_text().splitlines()]
    assert [record["number"] for record in records[1:]] == [1, 2, 3, 4, 5, 6]
    assert not [path for path in (place / "out").iterdir() if path.name.startswith(".")]

    # The model is what the best candidate's config makes of the files.
    models = [load_file(place / name / "model.safetensors") for name in ("math", "code")]
    base = load_file(place / "base/model.safetensors")
    best = fastmerge.merge(models, base=base, method="ties", weight=[0.5, 1.0], density=0.2, lambda_=0.5)
    for name, tensor in load_file(place / "out/best/model.safetensors").items():
        assert_bitwise_equal(tensor, best[name])
    plan = fastmerge.plan_checkpoints(place / "out/best.yml")
    assert plan.method.name == "ties"

    assert cli.run(["sweep", "sweep.yml", "out", "--write-best"]) == 2  # it is there already


@pytest.mark.parametrize(
    ("merge", "sweep"),
    [
        (MERGE, "grid: {density: [0.3, [0.2, 0.7]], weight: [1.0, [0.5, 0.25]]}"),
        (MERGE, "grid: {method: [ties, dare_ties, task_arithmetic], lambda_: [0.5, 1.0]}"),
        (MERGE.replace("{weight: 1.0}", "{weight: [0.0, 1.0], rescale: true}"), "grid: {density: [0.3, 0.6]}"),
        (MERGE, "candidates: [{}, {density: 0.3, scope: model, weight: 0.2}, {density: 0.3, scope: model}]"),
        # A base is one model more to linear, and to slerp it is an end.
        (
            "merge_method: linear\nbase_model: base\nmodels: [{model: math}]\n",
            "candidates: [{weight: 0.3}, {weight: 2}, {method: slerp, t: 0.5}, {method: nearswap, t: 1}]",
        ),
    ],
)
def test_each_is_the_merge_of_its_config(place: Path, merge: str, sweep: str) -> None:
    config = written(f"sweep:\n  score: sweep_judge:development\n  seed: 3\n  {sweep}\n", merge)
    report = Sweep(config).run(place / "out")
    seen = judge().seen
    assert len(seen) == len(config.candidates) == len(report["scores"])
    for number, (plain, merged) in enumerate(zip(config.contents, seen, strict=True)):
        fastmerge.merge_checkpoints(plain, place / str(number), seed=3)
        expected = load_file(place / str(number) / "model.safetensors")
        assert merged.keys() == expected.keys()
        for name, tensor in expected.items():
            assert_bitwise_equal(merged[name], tensor)
        assert -report["scores"][number] == float(sum((x.double() ** 2).sum() for x in merged.values()))
    assert report["best"] == report["scores"].index(max(report["scores"]))


def test_the_models_are_read_once_and_not_at_all_where_all_is_scored(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    from fastmerge.engine import loading

    real = loading.read_all
    monkeypatch.setattr(loading, "read_all", lambda opened: (read.append(opened.ref), real(opened))[1])
    config = configs.load("sweep.yml")
    first = Sweep(config).run(place / "out")
    assert sorted(read) == ["base", "code", "math"]
    again = Sweep(config).run(place / "out")
    assert len(read) == 3 and again["resumed"] == 6 and again["scores"] == first["scores"]
    with pytest.raises(ArgumentError, match=r"results.jsonl is the history of another run: candidates was"):
        Sweep(written(SWEEP.replace("0.8", "0.7"))).run(place / "out")


def test_failures_are_told_and_three_in_a_row_end_it(place: Path) -> None:
    config = configs.load("sweep.yml")
    judge().behave.extend([-3.0, ValueError("no such task"), float("nan"), -2.0, float("inf"), -9.0])
    told: list[str] = []
    report = Sweep(config).run(place / "out", tell=lambda scored: told.append(scored.line()))
    assert report["scores"] == [-3.0, None, None, -2.0, None, -9.0] and report["best"] == 3 and report["failures"] == 3
    assert told[1].endswith("failed: ValueError: no such task") and "the score is nan" in report["errors"][2]

    judge().behave.extend([-1.0, *[RuntimeError("out of tokens")] * 3])
    with pytest.raises(EvaluationError, match=r"3 evaluations in a row failed, .*candidate 4 .*out of tokens"):
        Sweep(config).run(place / "other")
    judge().behave.extend([-0.5])
    mended = Sweep(config).run(place / "other")
    assert mended["resumed"] == 1 and mended["scores"][:2] == [-1.0, -0.5] and mended["failures"] == 0

    judge().behave.extend([RuntimeError("never")] * 2)
    with pytest.raises(EvaluationError, match="no candidate has a score; the last one failed: RuntimeError: never"):
        Sweep(written(SWEEP.replace("[0.2, 0.4, 0.8]", "[0.2]"))).run(place / "third")


def test_a_merge_that_fails_is_a_failed_candidate(place: Path) -> None:
    tensors = load_file(place / "math/model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_model(place / "math", tensors)
    with pytest.raises(EvaluationError, match="candidate 3 .*'model.norm.weight' of math holds 1 NaN"):
        Sweep(configs.load("sweep.yml")).run(place / "out")


def test_the_final_score_is_of_the_best_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = written(SWEEP + "  final: sweep_judge:test\n")
    judge().behave.extend([-5.0, -4.0, -1.0, -4.0, -1.0, -9.0])
    report = Sweep(config).run(place / "out")
    seen = judge().seen
    assert len(seen) == 7 and report["best"] == 2  # of equals the first
    for name, tensor in seen[2].items():
        assert_bitwise_equal(seen[6][name], tensor)
    assert report["final"] == -2 * float(sum((x.double() ** 2).sum() for x in seen[2].values()))
    assert Sweep(config).run(place / "out")["final"] == report["final"] and len(seen) == 7
    assert capsys.readouterr().out == "noise\n"


def test_a_live_model_takes_the_values(place: Path) -> None:
    """A module of the models' names is scored; one of others is refused."""
    (place / "sweep_judge.py").write_text(
        JUDGE.replace(
            '{"a": torch.zeros(3, 5)}', "{n: torch.zeros(s) for n, s in " + str(SHAPES) + ".items()}"
        ).replace("def net(path):\n    return torch.nn.ParameterDict(", "def net(path):\n    return Net(")
        + "class Net(torch.nn.Module):\n"
        "    def __init__(self, tensors):\n"
        "        super().__init__()\n"
        "        self.tensors = tensors\n"
        "    def state_dict(self, *a, **k):\n"
        "        return self.tensors\n"
        "    def load_state_dict(self, state, strict=True):\n"
        "        for n, x in state.items():\n"
        "            self.tensors[n].copy_(x)\n"
        "        from torch.nn.modules.module import _IncompatibleKeys\n"
        "        return _IncompatibleKeys([], [])\n"
    )
    report = Sweep(written(SWEEP + "  model: sweep_judge:net\n")).run(place / "out")
    plain = Sweep(written(SWEEP)).run(place / "plain")
    assert report["scores"] == plain["scores"]
    (place / "sweep_judge.py").write_text(JUDGE)
    del sys.modules["sweep_judge"]
    with pytest.raises(ArgumentError, match="has no tensor .* of two architectures"):
        Sweep(written(SWEEP + "  model: sweep_judge:net\n")).run(place / "wrong")


def test_a_dry_run_reads_and_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["sweep", "sweep.yml", "out", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "candidate 1    density 0.2; lambda 0.5" and lines[5] == "candidate 6    density 0.8; lambda 1"
    size = 2 * sum(torch.Size(shape).numel() for shape in SHAPES.values())
    assert lines[6].endswith("once for all 6") and lines[7].startswith("memory ")
    assert cli.run(["sweep", "sweep.yml", "out", "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["bytes_read"], said["memory"], len(said["candidates"])) == (3 * size, 4 * size, 6)
    assert not (place / "out").exists() and "sweep_judge" not in sys.modules


SCORE = "  score: j:a\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "a sweep is a merge config with a part `sweep:`"),
        ("sweep: 3", "line 8: `sweep` is a mapping"),
        ("sweep:\n  grid: {density: [1]}", "line 8: the key `score` is missing"),
        (f"sweep:\n{SCORE}", "line 8: `sweep` holds either `grid:`"),
        (f"sweep:\n{SCORE}  grid: {{density: [1]}}\n  candidates: [{{}}]", "line 8: `sweep` holds either `grid:`"),
        (f"sweep:\n{SCORE}  gird: {{density: [1]}}", "line 10: the key `gird` is not understood in a sweep; did you"),
        (f"sweep:\n{SCORE}  grid: {{}}", "line 10: `grid` names what varies"),
        (f"sweep:\n{SCORE}  grid:\n    density: []", "line 11: `density` lists the values to try"),
        (f"sweep:\n{SCORE}  grid:\n    density: 0.3", "line 11: `density` lists the values to try"),
        (f"sweep:\n{SCORE}  grid:\n    density: [0.3, {{a: 1}}]", "line 11: a value of `density` is a number"),
        (f"sweep:\n{SCORE}  grid:\n    method: [3]", "line 11: `method` is the name of a merge method"),
        (f"sweep:\n{SCORE}  grid:\n    density: [0.3, 0.3]", "line 11: candidates 1 and 2 are the same"),
        (f"sweep:\n{SCORE}  grid:\n    weight: [[1, 2, 3]]", "line 11: `weight` has 3 values for 2 models"),
        (f"sweep:\n{SCORE}  candidates: []", "line 10: `candidates` lists mappings"),
        (f"sweep:\n{SCORE}  candidates:\n    - 3", "line 11: a candidate is a mapping"),
        (f"sweep:\n{SCORE}  candidates: [{{}}]\n  seed: x", "line 11: `seed` must be a whole number"),
        (f"sweep:\n{SCORE}  candidates: [{{}}]\n  write_best: 1", "line 11: `write_best` must be true or false"),
        (f"sweep:\n{SCORE}  candidates: [{{}}]\n  model: 3", "line 11: `model` names a function"),
        (f"sweep:\n{SCORE}  candidates: [{{}}]\n  final: j:a", "line 11: `final` looks at what `score` has looked at"),
        (f"modles: 3\nsweep:\n{SCORE}  candidates: [{{}}]", "line 8: the key `modles` is not understood"),
    ],
)
def test_what_a_config_refuses(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "sweep.yml"
    path.write_text(MERGE + text)
    with pytest.raises(ConfigError) as raised:
        configs.load(path)
    assert sentence in str(raised.value)


def test_a_grid_has_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yml"
    values = ", ".join(map(str, range(101)))
    path.write_text(f"{MERGE}sweep:\n{SCORE}  grid:\n    lambda: [{values}]\n    weight: [{values}]\n")
    with pytest.raises(ConfigError, match="the grid has 10,201 candidates; list fewer"):
        configs.load(path)


@pytest.mark.parametrize(
    ("sweep", "sentence"),
    [
        (
            "grid:\n    densty: [0.3]",
            "sweep.yml, line 11: candidate 1: ties has no parameter densty; did you mean dens",
        ),
        ("grid:\n    density: [0.3,\n       1.3]", "sweep.yml, line 12: density = 1.3 for .* is not usable"),
        ("candidates:\n    - {}\n    - {weight: [1, x]}", "a value of `weight` is a number"),
        ("candidates:\n    - {}\n    - {lambda: [1, 2]}", "line 12: candidate 2: lambda is one number for all models"),
        ("candidates:\n    - {}\n    - {density: [1, 2]}", "line 12: density = 2.0 for .* of code is not usable"),
        ("grid:\n    method: [tie]", "line 11: .*did you mean ties"),
        ("grid:\n    method: [ties, linear]", "linear has no parameter density"),
        ("grid:\n    method: [ties, slerp]", "line 7: slerp has no parameter weight"),
    ],
)
def test_what_headers_tell_is_refused_before_anything_is_read(place: Path, sweep: str, sentence: str) -> None:
    with pytest.raises(FastmergeError, match=sentence):
        Sweep(written(f"sweep:\n{SCORE}  {sweep}\n"))
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ("score: sweep_jugde:development", "the module sweep_jugde cannot be imported"),
        ("score: sweep_judge:developmnt", "the module sweep_judge has no function developmnt"),
        ("score: sweep_judge:development\n  final: sweep_judge:tset", "has no function tset"),
        ("score: sweep_judge:development\n  model: sweep_judge:nett", "has no function nett"),
    ],
)
def test_names_that_lead_nowhere_are_refused_before_anything_is_made(place: Path, names: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Sweep(written(f"sweep:\n  {names}\n  grid: {{density: [0.3]}}\n")).run(place / "out")
    assert not (place / "out").exists()


def test_models_that_do_not_fit_are_refused(place: Path) -> None:
    save_model(place / "code", {name: torch.zeros(3, 3).bfloat16() for name in SHAPES})
    with pytest.raises(CheckpointError, match="is 64 x 40 in base but 3 x 3 in code"):
        Sweep(configs.load("sweep.yml"))


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = [{"density": d, "lambda": x} for d in (0.8, 0.2) for x in (0.5, 1.0)]
    assert picture.draw(two[:1], [1.0], tmp_path / "no.png") == "no picture: there are no two scores to compare."
    from matplotlib.axes import Axes

    drawn: list[tuple[list[Any], list[Any], Any]] = []
    real = Axes.plot

    def plot(self: Axes, x: Any, y: Any, *arguments: Any, **style: Any) -> Any:
        drawn.append((x, y, style.get("label")))
        return real(self, x, y, *arguments, **style)

    monkeypatch.setattr(Axes, "plot", plot)

    def of(candidates: list[Any], scores: list[float | None]) -> list[tuple[list[Any], list[Any], Any]]:
        drawn.clear()
        assert picture.draw(candidates, scores, tmp_path / "drawn.png") is None
        assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
        return drawn

    assert of([{"t": 0.8, "seed": 1}, {"t": 0.2, "seed": 1}, {"t": 0.5, "seed": 1}], [3.0, 1.0, None]) == [
        ([0.2, 0.8], [1.0, 3.0], "")
    ]
    assert of(two, [4.0, 3.0, 2.0, None]) == [([0.2, 0.8], [2.0, 4.0], "0.5"), ([0.8], [3.0], "1")]
    words = [{"method": "ties", "weight": [1, 0.5]}, {"method": "linear", "weight": [1, 0.5]}, {"method": "ties"}]
    assert of(words, [1.0, 2.0, 3.0])[0] == ([0.0, 1.0], [1.0, 2.0], "1, 0.5")
    three = [{**one, "gamma": g} for g in (0.0, 0.1) for one in two]
    panels = of(three, [float(n) for n in range(8)])
    assert len(panels) == 6 and panels[1][:2] == ([0.2, 0.8], [7.0, 5.0]) and panels[5][:2] == ([0.0, 0.1], [3.0, 7.0])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "install fastmerge[plot]" in str(picture.draw(two, [1.0, 2.0, 3.0, 4.0], tmp_path / "none.png"))
    assert not (tmp_path / "none.png").exists()
