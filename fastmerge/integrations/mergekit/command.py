"""`fastmerge-yaml`: mergekit's own command `mergekit-yaml` with fastmerge inside. Its arguments are mergekit's."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fastmerge.errors import FastmergeError

NAME = "fastmerge-yaml"
WRONG = 2
"""The exit code where mergekit is missing or unknown. Nothing was read then."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run mergekit's command on these arguments (None: those of the process), and say on stderr what merged what.

    --random-seed is the seed of the random methods, 0 where it is not given, as in `fastmerge merge`. Exits as
    mergekit's command does, or with 2 where there is no mergekit that fastmerge knows.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    from fastmerge.integrations import mergekit

    try:
        mergekit.enable()
    except FastmergeError as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        sys.exit(WRONG)
    from mergekit.scripts.run_yaml import main as peer

    # Read as far as it can be: mergekit itself tells what is wrong with it.
    asked = peer.make_context(NAME, list(given), resilient_parsing=True).params
    mergekit.enable(seed=asked.get("random_seed") or 0)
    if asked.get("num_threads"):
        _use_threads(int(asked["num_threads"]))
    mergekit.reset_tally()
    try:
        peer.main(given, prog_name=NAME)
    except SystemExit as end:
        counted = mergekit.tally()
        if not end.code and not asked.get("quiet") and (counted.merged or counted.left):
            print(*(f"{NAME}: {line}" for line in counted.lines()), sep="\n", file=sys.stderr)
        raise


def _use_threads(count: int) -> None:
    """Let mergekit's --num-threads hold for the kernels, too."""
    from fastmerge import backends

    set_threads = getattr(backends.resolve("auto", "cpu"), "set_threads", None)
    if set_threads is not None:
        set_threads(count)


if __name__ == "__main__":
    main()
