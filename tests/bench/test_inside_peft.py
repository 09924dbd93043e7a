"""The benchmark of fastmerge inside PEFT: what it checks, and what it says."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("peft", reason="no PEFT (the extra `peers`)")

import inside_peft


def pair(seed: int, rank: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(8, rank, generator=generator))
    u, _ = torch.linalg.qr(torch.randn(10, rank, generator=generator))
    return q.T, u * torch.tensor([5.0, 2.0, 1.0])


def test_differences_are_those_of_elements_products_and_singular_values():
    a, b = pair(0)
    other = {"q": (a.clone(), b.clone())}
    assert inside_peft.difference_of_factors({"q": (a, b)}, other) == 0
    other["q"][1][0, 0] += 0.5
    assert inside_peft.difference_of_factors({"q": (a, b)}, other) == pytest.approx(0.5 / float(b.abs().max()))
    turned = {"q": (-a, -b)}
    assert inside_peft.difference_of_products({"q": (a, b)}, turned) < 1e-6
    assert inside_peft.difference_of_products({"q": (a, b)}, {"q": (-a, b)}) == pytest.approx(2)
    assert inside_peft.difference_of_values({"q": (a, b)}, {"q": pair(1)}) < 1e-6
    assert inside_peft.difference_of_values({"q": (a, b)}, {"q": (a, 1.1 * b)}) == pytest.approx(0.1, rel=1e-5)


def test_a_wrong_merge_has_no_ratio(capsys):
    row = {"route": "ties", "matrices": 7, "medians": {"peft": 2.0, "fastmerge": 0.1}, "ratio": 20.0}
    inside_peft.show({**row, "check": 1e-3, "limit": 1e-6, "right": False})
    assert "WRONG" in capsys.readouterr().out
    inside_peft.show({**row, "check": 1e-7, "limit": 1e-6, "right": True})
    assert "20.0" in capsys.readouterr().out


def test_a_tiny_model_is_measured(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    arguments = [
        "--shape",
        "tiny",
        "--layers",
        "1",
        "--rank",
        "4",
        "--repeats",
        "1",
        "--svd-projections",
        "q_proj",
        "k_proj",
    ]
    # Not dare_ties_svd: the singular values of tiny matrices depend on which elements are dropped.
    routes = ["ties", "magnitude_prune", "dare_linear", "svd", "ties_svd"]
    assert inside_peft.main([*arguments, "--routes", *routes, "--json", str(figures)]) == 0
    rows = {row["route"]: row for row in json.loads(figures.read_text())["rows"]}
    assert rows.keys() == set(routes)
    assert rows["ties"]["matrices"] == 7 and rows["svd"]["matrices"] == 2
    assert not inside_peft.inside.enabled()
    assert "around the merge" in capsys.readouterr().out
