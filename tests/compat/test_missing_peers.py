"""Where a peer is missing, nothing breaks before it is asked for, and then a sentence says what to install."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest

from fastmerge import integrations
from fastmerge.errors import FastmergeError

CALLS = {
    "peft": ("enable()", "PEFT cannot be imported", "pip install peft"),
    "fusion_bench": ("Ties()", "FusionBench cannot be imported", "pip install fusion-bench"),
    "sd_mecha": ("ties_sum()", "sd-mecha cannot be imported", "pip install sd-mecha"),
}


def test_missing_peers_break_no_import_and_are_named_at_the_call():
    calls = {peer: call for peer, (call, _, _) in CALLS.items()}
    program = f"""
import importlib, sys
calls = {calls!r}
sys.modules.update(dict.fromkeys(calls))
import fastmerge
for peer, call in calls.items():
    inside = importlib.import_module("fastmerge.integrations." + peer)
    try:
        eval("inside." + call)
    except fastmerge.FastmergeError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for sentence, (_, says, advises) in zip(run.stdout.splitlines(), CALLS.values(), strict=True):
        assert sentence.startswith(says) and advises in sentence


@pytest.mark.parametrize("peer", CALLS)
def test_a_release_without_what_is_needed_is_named_at_the_call(peer, monkeypatch):
    call, says, advises = CALLS[peer]
    for name in [name for name in sys.modules if name.partition(".")[0] == peer]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, peer, types.ModuleType(peer))
    path = Path(integrations.__file__).parent / f"{peer}.py"
    spec = importlib.util.spec_from_file_location(f"another_{peer}", path)
    inside = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, inside)  # where its dataclasses look for their module
    spec.loader.exec_module(inside)
    with pytest.raises(FastmergeError, match=says) as caught:
        eval(call, vars(inside))
    assert advises in str(caught.value)
