"""Moves of an alias and their history, on which all agree who move it at the same moment.

MLflow sets an alias unconditionally: of two people who promote at once, each would believe to have won. So moves are
numbered, and those who want to make the same move agree on one (rounds of adopt-commit: Gafni, PODC 1998), in tags of
the registered model. That needs nothing of a server but that a read sees what was written before it, and no clock: one
who dies on the way blocks nobody, and what others can see that he may have decided is finished by them.

    propose.ALIAS.NUMBER.ROUND.ID   the move that somebody wishes
    vote.ALIAS.NUMBER.ROUND.ID      and whether he saw no other wish
    history.ALIAS.NUMBER            the move, for good; then the alias follows, and the other two are deleted
"""

from __future__ import annotations

import itertools
import json
import re
import uuid
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipelines.registry.versions import RegistryError, find_model, who_am_i

Move = dict[str, Any]
"""alias, action, to, from, when, who, reason, and what else is known: score, comparison, forced."""
PROPOSE, VOTE, HISTORY = "propose.", "vote.", "history."
ALIAS = re.compile(r"(?!latest$|v\d+$)[\w-]+", re.IGNORECASE)  # MLflow's own rule
TRIES = 20  # of setting an alias against others who set it too


class Overtaken(RegistryError):
    """Somebody else moved the alias first: a comparison with the version that had it no longer counts."""


@dataclass(frozen=True)
class Place:
    """Where an alias is: the version that has it, or None, and the moves that it has made."""

    holder: str | None
    moves: tuple[Move, ...]

    @property
    def held(self) -> list[str]:
        """The versions that had the alias, the present one last, each with what preceded it before it."""
        held: list[str] = []
        for move in self.moves:
            held = _cut(held, move["from"])
            held = held[:-1] if move["action"] == "rollback" else [*held, move["to"]]
        return _cut(held, self.holder)


def moves_of(tags: Mapping[str, str], alias: str) -> list[Move]:
    """The history of an alias in a registered model's tags, oldest first."""
    found = [(key, json.loads(text)) for key, text in tags.items() if key.startswith(HISTORY)]
    return [
        move
        for _, move in sorted(found, key=lambda entry: (entry[1].get("number", -1), entry[0]))
        if move["alias"] == alias
    ]


def every_move(tags: Mapping[str, str]) -> list[Move]:
    """The history of all aliases, oldest first."""
    aliases = dict.fromkeys(json.loads(tags[key])["alias"] for key in tags if key.startswith(HISTORY))
    return sorted(
        [move for alias in aliases for move in moves_of(tags, alias)], key=lambda move: move["when"]
    )


def place(client: MlflowClient, name: str, alias: str) -> Place:
    """Where the alias is, after finishing what somebody decided and died over.

    RegistryError: no such model, or what cannot be an alias.
    """
    if not ALIAS.fullmatch(alias):
        raise RegistryError(
            f"{alias!r} cannot be an alias: letters, digits, '_' and '-' can, but 'latest' and v1 cannot"
        )
    model = find_model(client, name)
    moves = moves_of(model.tags, alias)
    if _leftovers(model.tags, alias, len(moves)):
        _follow(client, name, alias)
        model = find_model(client, name)
    return Place(_holder(model.aliases, alias), tuple(moves_of(model.tags, alias)))


def move(
    client: MlflowClient, name: str, alias: str, action: str, version: str, at: Place, **more: Any
) -> Move:
    """Move the alias from where it was `at` to `version`; the move as it stands in the history.

    Overtaken: somebody else's move won. RegistryError: the version was deleted meanwhile.
    """
    wish = {
        "id": uuid.uuid4().hex[:12],
        "number": len(at.moves),
        "alias": alias,
        "action": action,
        "to": version,
        "from": at.holder,
        "when": datetime.now(UTC).isoformat(timespec="microseconds"),
        "who": who_am_i(),
        **more,
    }
    decided = agree(
        lambda: find_model(client, name).tags, lambda key, text: _write(client, name, key, text), wish
    )
    there = _follow(client, name, alias)
    if decided["to"] != version:
        raise overtaken(name, version, decided)
    if not there:
        raise RegistryError(
            f"{name} version {version} was deleted at the same moment: {alias} stays where it was"
        )
    return decided


def overtaken(name: str, version: str, move: Move) -> Overtaken:
    return Overtaken(
        f"{move['who']} made version {move['to']} {move['alias']} of {name} at the same time, {move['when'][:19]} UTC: "
        f"version {version} is not; compare it with version {move['to']} and try again"
    )


def agree(read: Callable[[], Mapping[str, str]], write: Callable[[str, str], None], wish: Move) -> Move:
    """The move that all decide on who wish one of the same alias and number: one of their wishes.

    Two wishes are never both unopposed in a round: of two who each write theirs and then look, the later one sees both.
    Who finds only votes for an unopposed wish has decided; who finds one such vote makes it his wish, so that in the
    rounds after a decision there is no other wish. Two who run on side by side agree on the older wish.
    """
    slot, me = f"{wish['alias']}.{wish['number']:06d}", wish["id"]
    for turn in itertools.count():
        here = f"{slot}.{turn:03d}."
        write(f"{PROPOSE}{here}{me}", json.dumps(wish))
        tags = read()
        if HISTORY + slot in tags:
            break
        wishes = _under(tags, PROPOSE + here)
        opposed = len({other["id"] for other in wishes}) > 1
        write(f"{VOTE}{here}{me}", json.dumps({"wish": wish, "unopposed": not opposed}))
        tags = read()
        if HISTORY + slot in tags:
            break
        votes = _under(tags, VOTE + here)
        unopposed = [vote["wish"] for vote in votes if vote["unopposed"]]
        if unopposed:
            wish = unopposed[0]
        elif turn:  # not at once, lest the wish of one who died long ago come true
            wish = min(wishes, key=lambda other: (other["when"], other["id"]))
        if len(unopposed) == len(votes):
            write(HISTORY + slot, json.dumps(wish))
            return wish
    decided: Move = json.loads(tags[HISTORY + slot])
    return decided


def _under(tags: Mapping[str, str], prefix: str) -> list[dict[str, Any]]:
    return [json.loads(text) for key, text in sorted(tags.items()) if key.startswith(prefix)]


def _cut(held: list[str], holder: str | None) -> list[str]:
    """Up to the version that has the alias: it may have been moved without us, or not have followed its last move."""
    if holder in held:
        return held[: len(held) - held[::-1].index(holder)]
    return [holder] if holder else []


def _follow(client: MlflowClient, name: str, alias: str) -> bool:
    """Put the alias where its last move has it, then tidy up; False: that version is gone.

    Whoever sets it looks again afterwards, so that one who stood still for a while cannot leave it behind.
    """
    gone = ""
    for _ in range(TRIES):
        model = find_model(client, name)
        moves = moves_of(model.tags, alias)
        to = moves[-1]["to"]
        if to in (gone, _holder(model.aliases, alias)):
            break
        try:
            client.set_registered_model_alias(name, alias, to)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                gone = to
            elif error.error_code != "BAD_REQUEST":  # said when two make the same row
                raise
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what others tidied up
        for key in _leftovers(model.tags, alias, len(moves)):
            with suppress(MlflowException):
                client.delete_registered_model_tag(name, key)
    return to != gone


def _leftovers(tags: Mapping[str, str], alias: str, count: int) -> list[str]:
    """Proposals and votes of the first `count` moves."""
    return [
        key
        for key in tags
        if key.startswith((f"{PROPOSE}{alias}.", f"{VOTE}{alias}.")) and int(key.split(".")[2]) < count
    ]


def _write(client: MlflowClient, name: str, key: str, text: str) -> None:
    try:
        client.set_registered_model_tag(name, key, text)
    except MlflowException as error:
        # two who agree write the same row for the first time, and one of them hears of it
        if error.error_code != "BAD_REQUEST" or find_model(client, name).tags.get(key) != text:
            raise


def _holder(aliases: Mapping[str, str], alias: str) -> str | None:
    version = aliases.get(alias)
    return None if version is None else str(version)
