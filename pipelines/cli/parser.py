"""The parser of `inpaint`: argparse with errors in one line that name the whole command and suggest the nearest word."""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any, NoReturn

from pipelines.names import did_you_mean
from pipelines.renamed import renamed_option

FIELD_PATTERN = re.compile(r"[A-Za-z_]\w*(\.[\w-]+)*=")
"""Start of a recipe's field with its value, as --set takes it."""
NUMBER_PATTERN = re.compile(r"-\.?\d")
MAX_PLACES = 3  # where a word that is no command is an action


class Parser(argparse.ArgumentParser):
    """Parses one command. Errors exit with status 2, with one line such as `inpaint run: there is no option ...`."""

    actions: Any = None
    """Its subparsers; None: it has no actions."""

    def add_subparsers(self, **options: Any) -> Any:
        self.actions = super().add_subparsers(**options)
        return self.actions

    def all_arguments(self) -> Iterator[Any]:
        """The arguments of this command and of all its actions."""
        yield from self._actions
        for parser in self.actions.choices.values() if self.actions is not None else ():
            yield from parser.all_arguments()

    def parse_known_args(  # type: ignore[override]  # argparse has overloads for other namespaces
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Like argparse's, but unknown arguments are an error of the innermost command."""
        self.words = list(sys.argv[1:] if args is None else args)
        parsed, unknown = super().parse_known_args(self.words, namespace)
        if unknown:
            self.error(self._explain_value(unknown[0]) or self._explain_argument(unknown[0]))
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """Print a misspelt command or option of the line, else argparse's message, and exit with status 2."""
        problem = self._explain_action() or self._explain_option() or message
        if not re.search(r"did you mean|give it as|is called", problem):
            problem += f"; see {self.prog} --help"
        self.exit(2, f"{self.prog}: {problem}\n")

    def _explain_action(self) -> str:
        """The word that should be a command or action, if it is none or there is no such word; else ""."""
        if self.actions is None:
            return ""
        known = self.actions.choices
        word = next((word for word in self.words if not word.startswith("-")), None)
        kind = self.actions.metavar.lower()
        if word is None:
            return "" if self._explain_option() else f"the {kind} is missing: {', '.join(known)}"
        if word in known:
            return ""
        places = [
            parser.prog for parser in known.values() if parser.actions and word in parser.actions.choices
        ]
        if places:
            meant = " or ".join(f"{place} {word}" for place in places[:MAX_PLACES])
            return f"there is no {kind} {word!r}; did you mean {meant}?"
        hint = did_you_mean(word, list(known)) or f"; there are {', '.join(known)}"
        return f"there is no {kind} {word!r}" + hint

    def _explain_option(self) -> str:
        """The first option of the line that this command does not have; "": all are known."""
        words = [word for word in takewhile(lambda word: word != "--", self.words) if " " not in word]
        if self.actions is not None:  # the action parses what follows it
            words = list(takewhile(lambda word: word.startswith("-"), words))
        for word in words:
            name = word.partition("=")[0]
            if (
                word.startswith("-")
                and word != "-"
                and not NUMBER_PATTERN.match(word)
                and not self._knows(name)
            ):
                return self._explain_argument(word)
        return ""

    def _explain_value(self, word: str) -> str:
        """That the word is the value of a --set without `=`; "": it is not."""
        before = self.words[: self.words.index(word)]
        if before[-2:-1] != ["--set"] or "=" in before[-1]:
            return ""
        return f"--set takes FIELD=VALUE: give it as --set {shlex.quote(f'{before[-1]}={word}')}"

    def _explain_argument(self, word: str) -> str:
        """What is wrong with an argument that the command does not take."""
        if renamed := renamed_option(self.prog.rpartition(" ")[2], [word]):
            return renamed
        name = word.partition("=")[0]
        options = [option[2:] for option in self._option_string_actions if option.startswith("--")]
        takes_fields = self._knows("--set")
        if takes_fields and FIELD_PATTERN.match(word):
            return f"{word!r} is a field of the recipe: give it as --set {shlex.quote(word)}"
        if takes_fields and name.startswith("--") and "." in name:
            field = name.removeprefix("--")
            value = word.partition("=")[2] or "VALUE"
            return f"there is no option {name}: {field} is a field of the recipe, give it as --set {field}={value}"
        if name.startswith("-"):
            return f"there is no option {name}" + _suggest_option(name.lstrip("-"), options)
        return f"unexpected argument {word!r}" + _suggest_option(word, options, cutoff=0.8)

    def _knows(self, name: str) -> bool:
        """Whether argparse takes the name, which may be the beginning of an option's."""
        known = self._option_string_actions
        return name in known or (name.startswith("--") and any(option.startswith(name) for option in known))


def _suggest_option(name: str, options: Sequence[str], cutoff: float = 0.5) -> str:
    """`; did you mean --OPTION?` with the option nearest to the name, both without dashes; "": none is near."""
    if len(name) == 1:
        near = next((option for option in options if option.startswith(name)), "")
    else:
        near = next(iter(difflib.get_close_matches(name, options, n=1, cutoff=cutoff)), "")
    return f"; did you mean --{near}?" if near else ""
