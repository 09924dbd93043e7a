"""What the repository promises about itself: each check is a script, `python -m checks` runs the quick ones.

A check is a module with ``problems(...) -> list[str]``, one sentence for each broken promise.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
