"""The environments of peers: what is pinned has tests, which pass there, and is made once."""

from __future__ import annotations

import re

import pytest

from checks import ROOT, peers


@pytest.mark.parametrize("name", peers.PINNED)
def test_each_environment_pins_one_version_of_everything_and_has_tests(name):
    peer = re.sub(r"_\d.*", "", name)
    assert peers.tests_of(name).exists()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in peers.PINNED[name])
    assert peers.PINNED[name][0].partition("==")[0] == peer.replace("_", "-")


# Of other versions of a peer, the tests of what can differ between versions; `python -m checks.peers` runs all.
VERSIONED = {
    "mergekit": "(replaced_method and (ties or linear)) or sparsify_gives or added_methods or slerp or sce or disable",
    "peft": "looks_as or equal_peft or svd_forms or sources or frozen or condensed or plain_layer",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in peers.PINNED if name != "peft_0.20"])  # as 0.19 in what is replaced
def test_the_tests_beside_a_peer_pass_in_its_own_environment(name):
    folder = ROOT / "build" / "peers"
    try:
        peers.environment(name, folder / name)
    except peers.NotFetchedError as error:
        pytest.skip(f"{name} is not to be had here: {str(error).splitlines()[-1]}")
    chosen = ["-k", VERSIONED[re.sub(r"_\d.*", "", name)]] if re.search(r"_\d", name) else []
    assert peers.test(name, folder, ["-p", "no:cacheprovider", *chosen]) == 0


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """Commands that would have run, for an environment `one`; nothing is made."""
    commands = []

    def run(command):
        commands.append([str(part) for part in command])
        return peers.PINNED["one"][0] if peers._FOUND in command else str(tmp_path)

    monkeypatch.setattr(peers, "PINNED", {"one": ("one==1",)})
    monkeypatch.setattr(peers, "_run", run)
    monkeypatch.setattr(peers.venv, "create", lambda folder, **options: folder.mkdir(parents=True, exist_ok=True))
    return commands


def test_an_environment_is_made_once_and_again_where_its_pins_change(ran, tmp_path, monkeypatch):
    folder = tmp_path / "one"
    python = peers.environment("one", folder)
    assert python == folder / "bin" / "python"
    assert len(ran) == 3 and ran[1][-1] == "one==1" and "--no-deps" in ran[1]
    peers.environment("one", folder)
    assert len(ran) == 3
    monkeypatch.setattr(peers, "PINNED", {"one": ("one==2",)})
    peers.environment("one", folder)
    assert len(ran) == 6 and ran[4][-1] == "one==2"


@pytest.mark.parametrize(
    ("says", "kind"),
    [
        ("ERROR: No matching distribution found for one==1", peers.NotFetchedError),
        ("error: subprocess-exited-with-error", RuntimeError),
    ],
)
def test_what_is_not_to_be_had_is_told_from_what_cannot_be_installed(says, kind, ran, tmp_path, monkeypatch):
    run = peers._run

    def fail(command):
        if "pip" in command:
            raise RuntimeError(says)
        return run(command)

    monkeypatch.setattr(peers, "_run", fail)
    with pytest.raises(RuntimeError, match="one==1|subprocess") as caught:
        peers.environment("one", tmp_path / "one")
    assert type(caught.value) is kind
    assert not (tmp_path / "one" / "holds.txt").exists()


def test_another_version_than_the_pinned_one_is_no_environment(ran, tmp_path, monkeypatch):
    run = peers._run
    monkeypatch.setattr(peers, "_run", lambda command: "one==3" if peers._FOUND in command else run(command))
    with pytest.raises(RuntimeError, match="holds one==3, not one==1"):
        peers.environment("one", tmp_path / "one")
