"""``python -m checks``: the quick checks. The slow ones (symbols, portable, wheel) run with the test suite."""

import sys

from checks import flags, layers


def main() -> int:
    """Print what is wrong; 1 if anything is."""
    found = [*layers.problems(), *flags.problems()]
    for sentence in found:
        print(sentence, file=sys.stderr)
    if not found:
        print("checks: layers and flags are as promised")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
