"""Where a peer is missing, nothing breaks before it is asked for, and then a sentence says what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest

CALLS = {
    "peft": ("enable()", "PEFT cannot be imported", "pip install peft"),
    "fusion_bench": ("Ties()", "FusionBench cannot be imported", "pip install fusion-bench"),
    "sd_mecha": ("ties_sum()", "sd-mecha cannot be imported", "pip install sd-mecha"),
}


@pytest.mark.parametrize("peer", CALLS)
def test_a_missing_peer_breaks_no_import_and_is_named_at_the_call(peer):
    call, says, advises = CALLS[peer]
    program = f"""
import sys
sys.modules["{peer}"] = None
import fastmerge
import fastmerge.integrations.{peer} as inside
try:
    inside.{call}
except fastmerge.FastmergeError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.startswith(says) and advises in run.stdout
