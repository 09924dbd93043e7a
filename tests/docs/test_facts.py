"""What the pages say about the code is what the code says: parameters, options, variables, links, layers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from checks.layers import LAYERS
from fastmerge import methods, ops
from fastmerge.engine import config as config_module
from fastmerge.evolve import config as evolve_config
from fastmerge.evolve import strategies
from fastmerge.reference import random
from fastmerge.sweep import config as sweep_config
from tests.docs.pages import PAGES, ROOT, RUN, blocks, prose

DOCS = ROOT / "docs"


def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, made as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}, which is not there"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}, which has no such heading"


def test_every_page_of_docs_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in DOCS.glob("*.md") if f"(docs/{page.name})" not in readme] == []


def test_paths_that_are_named_exist() -> None:
    """`fastmerge/...`, `csrc/...`, `bench/...`, `tests/...`, `checks/...`, `examples/...` and `demo/...` in prose."""
    made_later = ("bench/data", "demo/models", "demo/merged")
    pattern = re.compile(r"`((?:fastmerge|csrc|bench|tests|checks|examples|demo)/[\w./-]*)`")
    missing = [
        f"{page.name}: {path}"
        for page in PAGES
        for path in pattern.findall(prose(page))
        if not path.startswith(made_later) and not (ROOT / path).exists()
    ]
    assert not missing


def default(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize("name", methods.names())
def test_the_table_of_methods_has_each_methods_defaults(name: str) -> None:
    row = next(line for line in text("methods.md").splitlines() if line.startswith(f"| `{name}` "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    known = {each["name"]: each for each in methods.describe(name)["parameters"]}
    for cell, parameter in zip(cells[3:5], ("normalize", "rescale"), strict=True):
        assert cell == (default(known[parameter]["default"]) if parameter in known else "-"), (name, parameter)
    extra = [f"`{each}` {known[each]['default']}" for each in ("gamma", "epsilon") if each in known]
    assert cells[5] == (", ".join(extra) or "-")


def test_every_parameter_is_explained() -> None:
    explained = set(re.findall(r"^\| `(\w+)` \| (?:per model|once) \|", text("methods.md"), re.MULTILINE))
    assert explained == {parameter for name in methods.names() for parameter in methods.parameters(name)}


def test_every_option_of_merge_is_documented() -> None:
    import typer

    from fastmerge.cli import app

    command = typer.main.get_command(app).commands["merge"]  # type: ignore[attr-defined]
    options = [name for parameter in command.params for name in parameter.opts if name.startswith("--")]
    page = text("checkpoints.md")
    assert len(options) >= 11
    assert [name for name in options if f"`{name}" not in page] == []


def test_every_key_of_the_config_is_documented() -> None:
    page = text("config.md")
    keys = {*config_module.TOP_KEYS, *config_module.MODEL_KEYS, *config_module.CONDITION_KEYS, *config_module.NOT_YET}
    assert [key for key in keys if f"`{key}`" not in page] == []
    assert [dtype for dtype in config_module.DTYPES if f"`{dtype}`" not in page] == []


def test_every_key_of_a_searchs_config_is_documented() -> None:
    page = text("evolve.md")
    keys = {*evolve_config.COMMON_KEYS, *evolve_config.EVOLVE_KEYS, *evolve_config.SEARCH_KEYS}
    assert [key for key in keys if f"`{key}`" not in page] == []
    names = {*evolve_config.STRATEGIES, *evolve_config.SEARCHES}
    assert [name for name in names if f"`{name}`" not in page] == []
    assert set(strategies.STRATEGIES) == set(evolve_config.STRATEGIES)


def test_every_key_of_a_sweeps_config_is_documented() -> None:
    page = text("sweep.md")
    assert [key for key in sweep_config.KEYS if f"`{key}`" not in page] == []


def test_every_environment_variable_is_documented() -> None:
    sources = [*(ROOT / "fastmerge").rglob("*.py"), ROOT / "setup.py"]
    named = {found for path in sources for found in re.findall(r'"(FASTMERGE_[A-Z]+)"', path.read_text())}
    # Macros that the build passes to the compiler, and no variables of the environment.
    variables = named - {"FASTMERGE_TARGET", "FASTMERGE_TABLE"}
    assert {"FASTMERGE_BACKEND", "FASTMERGE_CPU", "FASTMERGE_DEBUG", "FASTMERGE_THREADS"} <= variables
    page = text("building.md")
    assert [name for name in variables | {"FASTMERGE_ISA"} if f"`{name}`" not in page] == []


def test_every_public_op_is_documented() -> None:
    page = text("ops.md")
    functions = [name for name in ops.__all__ if callable(getattr(ops, name)) and name != "SparsifyRule"]
    assert [name for name in functions if f"`{name}" not in page] == []


def test_the_layers_are_those_that_the_check_knows() -> None:
    assert " <- ".join(LAYERS[1:]) in text("house.md")


@pytest.mark.parametrize("purpose", ["BERNOULLI", "DELLA", "HASHED_TIES", "BLEND_TRIAL", "DE_TRIAL"])
def test_the_stream_ids_are_those_of_the_code(purpose: str) -> None:
    value = getattr(random, purpose)
    assert re.search(rf"^\| {value} \| .*\| `0x{random.stream_id(value):08x}` \|", text("numbers.md"), re.MULTILINE)


def test_every_page_about_an_interface_shows_it_at_work() -> None:
    for name in (
        "checkpoints.md",
        "config.md",
        "evolve.md",
        "experts.md",
        "mergekit.md",
        "methods.md",
        "numbers.md",
        "ops.md",
        "sweep.md",
    ):
        assert any(one.language in RUN for one in blocks(DOCS / name)), name


class TestTheFourTies:
    """The flags that methods.md gives for each TIES, against each written out plainly."""

    def setup_method(self) -> None:
        generator = torch.Generator().manual_seed(0)
        # Few magnitudes, so that thresholds are tied, votes cancel and zeros abound.
        self.deltas = [torch.randint(-4, 5, (40, 30), generator=generator).float() / 8 for _ in range(3)]
        self.weights = [1.0, 0.5, 0.25]
        self.density = 0.3

    def test_mergekit(self) -> None:
        kept = [d * ops.topk_mask(d, self.density) for d in self.deltas]
        weighted = torch.stack([w * d for w, d in zip(self.weights, kept)])
        majority = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
        agree = weighted.sign() == majority
        weight = torch.tensor(self.weights)[:, None, None] * agree
        expected = (weighted * agree).sum(0) / torch.where(weight.sum(0) == 0, 1.0, weight.sum(0))
        actual = ops.consensus_merge(None, self.deltas, self.weights, inputs="deltas", density=self.density)
        assert torch.equal(actual, expected)

    @pytest.mark.parametrize("election", ["total", "frequency"])
    def test_peft(self, election: str) -> None:
        kept = torch.stack([d * ops.topk_mask(d, self.density) for d in self.deltas])
        votes = kept.sum(0) if election == "total" else kept.sign().sum(0)
        agree = kept.sign() == torch.where(votes >= 0, 1, -1)
        weighted = kept * torch.tensor(self.weights)[:, None, None]
        expected = (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)
        actual = ops.consensus_merge(
            None, self.deltas, self.weights, inputs="deltas", density=self.density,
            election=election, divisor="count",
        )  # fmt: skip
        assert torch.equal(actual, expected)

    def test_sd_mecha(self) -> None:
        """The threshold is counted from the smallest there: one rank lower, and ties stay."""
        rank = int((1 - self.density) * self.deltas[0].numel())
        kept = torch.stack([d * (d.abs() >= d.abs().flatten().kthvalue(rank).values) for d in self.deltas])
        votes = kept.sign().sum(0).sign()
        agree = (kept.sign() == votes) & (kept != 0)
        expected = (kept * agree).sum(0) / agree.sum(0).clamp(min=1)
        numel = self.deltas[0].numel()
        actual = ops.consensus_merge(
            None, self.deltas, 1.0, inputs="deltas", density=(numel - rank + 1) / numel, ties="keep",
            election="frequency", zero_sign="zero", divisor="count",
        )  # fmt: skip
        assert torch.equal(actual, expected)


def test_no_figure_is_left_to_be_filled_in() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert "@@" not in page.read_text(encoding="utf-8"), f"{page.name} holds a @@token@@"


def cells_of(page: str, heading: str) -> list[list[str]]:
    """The rows of the first table under a heading, without its head."""
    lines = text(page).split(f"\n## {heading}\n")[1].split("\n## ")[0].splitlines()
    rows = [re.split(r"(?<!\\)\|", line.strip("|")) for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_migration_page_has_each_flag_of_mergekits_command_and_a_counterpart_that_is_there() -> None:
    peer = pytest.importorskip("mergekit.scripts.run_yaml", reason="no mergekit (the extra `peers`)")
    import typer

    from fastmerge.cli import app

    theirs = {name for parameter in peer.main.params for name in parameter.opts if name.startswith("-")}
    command = typer.main.get_command(app).commands["merge"]  # type: ignore[attr-defined]
    ours = {name for parameter in command.params for name in parameter.opts}
    rows = cells_of("migration.md", "Flags")
    assert sorted(flag for row in rows for flag in code(row[0])) == sorted(theirs)
    assert {flag for row in rows for flag in code(row[1])} <= ours
    assert all(code(row[1]) or row[1] == "none" for row in rows)
    after = text("migration.md").split("\n## Methods\n")[0].splitlines()[-1]
    named = {flag for row in rows for flag in code(row[1])} | {*code(after)}
    assert ours - named == {"config", "out"}


def test_the_migration_page_has_each_method_with_the_parameters_of_both() -> None:
    registry = pytest.importorskip("mergekit.merge_methods.registry", reason="no mergekit (the extra `peers`)")
    rows = {code(row[0])[0]: row for row in cells_of("migration.md", "Methods")}
    theirs = {name: {each.name for each in method.spec.parameters} for name, method in registry._METHODS.items()}
    assert set(rows) == {*methods.names(), *theirs}
    for name, (_, both, only, why) in rows.items():
        known = list(methods.parameters(name))
        peers = theirs.get(name, set())
        assert both == (", ".join(each for each in known if each in peers) or "-"), name
        assert only == (", ".join(each for each in known if each not in peers) or "-"), name
        assert peers <= set(known), name
        assert (why == "mergekit has no such method") == (name not in theirs)


def test_the_migration_page_has_every_command_of_mergekit_and_every_option_of_verify() -> None:
    from importlib.metadata import PackageNotFoundError, distribution

    import typer

    from fastmerge.cli import app

    verify = typer.main.get_command(app).commands["verify"]  # type: ignore[attr-defined]
    options = {name for parameter in verify.params for name in parameter.opts if name.startswith("--")}
    rows = cells_of("migration.md", "verify")
    assert {flag.split()[0] for row in rows for flag in code(row[0])} == options
    try:
        scripts = distribution("mergekit").entry_points.select(group="console_scripts")
    except PackageNotFoundError:
        pytest.skip("no mergekit (the extra `peers`)")
    named = {name for row in cells_of("migration.md", "Commands") for name in code(row[0])}
    assert named == {script.name for script in scripts}
