"""The environments of peers: what is pinned has tests, and is made once."""

from __future__ import annotations

import re

import pytest

from checks import ROOT, peers


@pytest.mark.parametrize("name", peers.PINNED)
def test_each_environment_pins_one_version_of_everything_and_has_tests(name):
    peer = re.sub(r"_\d.*", "", name)
    assert (ROOT / "tests" / "compat" / f"test_{peer}.py").exists()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in peers.PINNED[name])
    assert peers.PINNED[name][0].partition("==")[0] == peer.replace("_", "-")


def test_an_environment_is_made_once_and_again_where_its_pins_change(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(peers, "PINNED", {"one": ("one==1",)})
    monkeypatch.setattr(peers, "_run", lambda command: ran.append([str(part) for part in command]) or str(tmp_path))
    monkeypatch.setattr(peers.venv, "create", lambda folder, **options: folder.mkdir(parents=True, exist_ok=True))
    folder = tmp_path / "one"
    python = peers.environment("one", folder)
    assert python == folder / "bin" / "python"
    assert len(ran) == 2 and ran[1][-1] == "one==1" and "--no-deps" in ran[1]
    peers.environment("one", folder)
    assert len(ran) == 2
    monkeypatch.setattr(peers, "PINNED", {"one": ("one==2",)})
    peers.environment("one", folder)
    assert len(ran) == 4 and ran[3][-1] == "one==2"
