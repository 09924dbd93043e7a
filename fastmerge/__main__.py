"""``python -m fastmerge``: the command line."""

from fastmerge.cli import main

if __name__ == "__main__":
    main()
