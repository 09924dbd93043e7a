"""Markdown pages as the reader and the tests see them: fenced blocks, in order, each with its language and place."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
RUN = ("python", "pycon", "yaml", "console")
"""Languages of blocks that the tests run. Of YAML only what names itself: `# ties.yml` in the first line."""
TOOLS = {"mergekit": "mergekit", "migration": "mergekit"}
"""Pages about a tool that fastmerge plugs into, and the package without which their blocks cannot run."""
SHOWN = ("sh", "text")
"""Languages of blocks that are only shown: commands that need a network, an installation or minutes."""

_FENCE = re.compile(r"^(?P<marks>```+)(?P<language>\w*)\s*$")
_FILE_NAME = re.compile(r"^# (?P<name>[\w.-]+\.yml)$")


@dataclass(frozen=True)
class Block:
    """One fenced block: what is in it, and where its first line stands (from 1)."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        """Page and line, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def file_name(self) -> str | None:
        """The name that a YAML block gives itself in its first line, or None for a fragment."""
        match = _FILE_NAME.match(self.text.partition("\n")[0])
        return match["name"] if match and self.language == "yaml" else None


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found: list[Block] = []
    marks, language, start = "", "", 0
    body: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if marks:
            if line.strip() == marks:
                found.append(Block(page, start, language, "".join(f"{one}\n" for one in body)))
                marks = ""
            else:
                body.append(line)
        elif match := _FENCE.match(line):
            marks, language, start, body = match["marks"], match["language"], number + 1, []
    assert not marks, f"{page.name}: the block of line {start} is never closed"
    return found


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    kept, marks = [], ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if marks:
            marks = "" if line.strip() == marks else marks
        elif match := _FENCE.match(line):
            marks = match["marks"]
        else:
            kept.append(line)
    return "\n".join(kept)
