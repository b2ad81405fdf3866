"""Markdown as MLflow's pages render it: tables have no space between their columns."""

from __future__ import annotations

import re

SPACES = "&nbsp;&nbsp;&nbsp;"


def spaced_columns(markdown: str) -> str:
    """The text with spaces in the headings of its tables."""
    lines = markdown.split("\n")
    for index, below in enumerate(lines[1:]):
        if below.startswith("|:--"):
            lines[index] = re.sub(r" \|(?=.|$)", f"{SPACES} |", lines[index])
    return "\n".join(lines)


def without_spaces(markdown: str) -> str:
    """The text as it was before `spaced_columns`, for a terminal."""
    return markdown.replace(SPACES, "")
