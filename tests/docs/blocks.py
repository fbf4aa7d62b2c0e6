"""The code blocks of a page of documentation, in order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))

_BLOCK = re.compile(r"^(?:<!-- not run: (?P<why>[^\n]+?) -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    kind: str  # bash or python
    text: str
    why_not: str | None  # reason for which it is not run
    line: int

    def commands(self) -> list[list[str]]:
        """Words of every command of a bash block, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("text")) + 1
        found.append(Block(match["kind"], match["text"], match["why"], line))
    assert len(found) == len(re.findall(r"^```\w*$", text, re.M)) / 2, f"{page.name}: a fence is not closed"
    return found
