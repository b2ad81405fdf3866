"""What an error says, for messages of a line."""

from __future__ import annotations


def in_a_line(error: BaseException) -> str:
    """Its text without line breaks; its type's name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
