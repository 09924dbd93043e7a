"""``python -m checks``: the quick checks. The slow ones (symbols, portable, wheel, kernels) run with the test suite.

Mutations are only looked at here: whether each can still be made. ``python -m checks.mutations`` tries them, for hours.
"""

import sys

from checks import flags, layers, mutations, triton_sources


def main() -> int:
    """Print what is wrong; 1 if anything is."""
    found = [*layers.problems(), *flags.problems(), *triton_sources.problems(), *mutations.problems()]
    for sentence in found:
        print(sentence, file=sys.stderr)
    if not found:
        print("checks: layers, flags and kernels are as promised, and every mutation can be made")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
