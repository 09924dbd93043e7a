"""Tests beside the peers that do not fit into the environment of all others: each gets one of its own.

An environment borrows torch and the rest from the one that runs this, and adds a peer with what it needs, in versions
that are known to work together. It is kept in `build/peers/`.

    python -m checks.peers                 # all of them
    python -m checks.peers sd_mecha        # one
"""

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from checks import ROOT

PINNED = {
    "fusion_bench": (
        "fusion-bench==0.2.33",
        "antlr4-python3-runtime==4.9.3",
        "bidict==0.24.1",
        "h5py==3.16.0",
        "hydra-core==1.3.8",
        "joblib==1.6.0",
        "lightning==2.6.6",
        "lightning-utilities==0.15.3",
        "omegaconf==2.3.1",
        "pytorch-lightning==2.6.6",
        "torchmetrics==1.9.0",
    ),
    "mergekit_0.1.4": (
        "mergekit==0.1.4",
        "accelerate==1.6.0",
        "certifi==2026.10.18",
        "charset-normalizer==3.5.2",
        "click==8.2.1",
        "huggingface-hub==0.36.2",
        "peft==0.17.1",
        "pydantic==2.10.6",
        "pydantic-core==2.27.2",
        "requests==2.34.2",
        "safetensors==0.5.3",
        "tokenizers==0.21.4",
        "transformers==4.55.4",
        "urllib3==2.8.0",
    ),
    "peft_0.19": ("peft==0.19.1",),
    "peft_0.20": ("peft==0.20.0",),
    "sd_mecha": (
        "sd-mecha==1.1.8",
        "Levenshtein==0.27.5",
        "fuzzywuzzy==0.18.0",
        "python-Levenshtein==0.27.5",
        "rapidfuzz==3.14.6",
    ),
}
"""The peers, and what each needs besides what is here already; nothing else is fetched. What follows an underscore and
a digit is a version of a peer that the environment of all others has in another."""

_FILES = {"mergekit": "mergekit_inside"}
"""Peers whose tests are not in the file of their own name."""

_NOT_FOUND = re.compile(r"No matching distribution found|Could not find a version|Connection|Max retries|timed out")
"""What pip says where there is no package index, or one without these packages."""


_FOUND = """
import importlib.metadata, sys
print(*(f"{name}=={importlib.metadata.version(name)}" for name in sys.argv[1:]))
"""


class NotFetchedError(RuntimeError):
    """pip did not get the packages: no index is reached from here, or it lacks them."""


def environment(name: str, folder: Path) -> Path:
    """The Python of an environment with this peer, made where it is not there yet or was made for other versions.

    Raises:
        NotFetchedError: packages are not to be had from here.
        RuntimeError: a package could not be installed, or another version of it is found.
    """
    python, stamp = folder / "bin" / "python", folder / "holds.txt"
    holds = "\n".join(PINNED[name])
    if stamp.exists() and stamp.read_text() == holds:
        return python
    venv.create(folder, with_pip=False, clear=True)
    site = Path(_run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    # The packages of this environment come after its own; editable installs stay out of sight.
    (site / "borrowed.pth").write_text("".join(f"{sysconfig.get_path(path)}\n" for path in ("purelib", "platlib")))
    pip = [sys.executable, "-m", "pip", "--retries", "1", "--python", python]
    try:
        _run([*pip, "install", "--quiet", "--no-deps", "--ignore-installed", "--no-build-isolation", *PINNED[name]])
    except RuntimeError as error:
        if _NOT_FOUND.search(str(error)):
            raise NotFetchedError(str(error)) from error
        raise
    found = _run([python, "-c", _FOUND, *(pin.partition("==")[0] for pin in PINNED[name])])
    if found.split() != list(PINNED[name]):
        raise RuntimeError(f"the environment holds {', '.join(found.split())}, not {', '.join(PINNED[name])}")
    stamp.write_text(holds)
    return python


def tests_of(name: str) -> Path:
    """The file of tests beside the peer of this environment."""
    peer = re.sub(r"_\d.*", "", name)
    return ROOT / "tests" / "compat" / f"test_{_FILES.get(peer, peer)}.py"


def test(name: str, folder: Path, arguments: list[str]) -> int:
    """Run the tests beside this peer; pytest's exit status."""
    python = environment(name, folder / name)
    peer = re.sub(r"_\d.*", "", name)
    command = [str(python), "-m", "pytest", "-q", str(tests_of(name)), *arguments]
    # One thread: tensors are small, and other tests run beside these.
    added = {"PYTHONPATH": str(ROOT), "FASTMERGE_PEER": peer, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **added}, check=False).returncode


def _run(command: list[str | Path]) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout


def main(arguments: list[str] | None = None) -> int:
    """Test beside the peers that are named, or all; 1 if any test fails or an environment cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m checks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("peers", nargs="*", choices=[*PINNED, []], default=[], help="by default all")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "peers", help="where environments are kept")
    chosen, rest = parser.parse_known_args(arguments)
    failed = False
    for name in chosen.peers or PINNED:
        try:
            failed |= test(name, chosen.folder, rest) != 0
        except RuntimeError as error:
            print(f"no environment for {name}: {error}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
