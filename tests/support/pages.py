"""The README and the pages of docs/: their code blocks, in page order, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NO_RUN = re.compile(r"<!-- no-run: (.+?) -->")
FENCE = re.compile(r"^(\s*)```(\w*)\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced code block."""

    page: str
    """path in the repository"""
    line: int
    """of the opening fence, from 1"""
    language: str
    text: str
    no_run: str
    """why it cannot run in a test; '': it runs"""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[str]:
        """The commands of a shell block: continued lines joined, comments and a trailing & removed."""
        text = self.text.replace("\\\n", " ")
        lines = (
            re.sub(r"(^|\s)#.*", "", line).strip().removesuffix("&").strip() for line in text.splitlines()
        )
        return [line for line in lines if line]


def pages() -> list[Path]:
    """README.md, then the pages of docs/ in the order of the site's table of contents."""
    index = DOCS / "index.md"
    names = re.findall(r"(?m)^([\w-]+)$", index.read_text()) if index.exists() else []
    ordered = [DOCS / f"{name}.md" for name in names if (DOCS / f"{name}.md").exists()]
    others = sorted(path for path in DOCS.glob("*.md") if path not in ordered and path != index)
    return [ROOT / "README.md", *ordered, *others]


def blocks(page: Path) -> Iterator[Block]:
    """The code blocks of a page. Raises ValueError if a block is not closed."""
    lines = page.read_text(encoding="utf-8").splitlines()
    name = page.relative_to(ROOT).as_posix()
    start, language, indent = 0, "", ""
    for number, line in enumerate(lines, 1):
        fence = FENCE.match(line)
        if not fence:
            continue
        if not start:
            start, indent, language = number, fence[1], fence[2]
        else:
            text = "\n".join(row.removeprefix(indent) for row in lines[start : number - 1]) + "\n"
            marker = NO_RUN.search(lines[start - 2]) if start > 1 else None
            yield Block(name, start, language, text, marker[1] if marker else "")
            start = 0
    if start:
        raise ValueError(f"{name}:{start}: the code block is not closed")


def inpaint_arguments(command: str) -> list[str] | None:
    """The arguments of an `inpaint` command, also of one after `--`; None if it is another command."""
    words = shlex.split(command)
    if "inpaint" not in words:
        return None
    arguments = words[words.index("inpaint") + 1 :]
    return arguments[: next((i for i, word in enumerate(arguments) if word in ("|", ">", "&&", ";")), None)]
