"""Alias moves and their history, with agreement between concurrent writers.

MLflow sets an alias unconditionally: if two people promote at the same time, both would believe they succeeded. So the
moves of an alias are numbered, and the writers of one number agree on one move (rounds of adopt-commit: Gafni, PODC
1998) through tags of the registered model. The protocol needs no clock; of the server it needs only that a read returns
earlier writes. A process that dies blocks nobody: if others can see that it may have decided, they finish its move.

    propose.ALIAS.NUMBER.ROUND.ID   a proposed move
    vote.ALIAS.NUMBER.ROUND.ID      the proposal, and whether its writer saw no other one in that round
    history.ALIAS.NUMBER            the decided move; the alias is then set, and the tags of the first two kinds deleted
"""

from __future__ import annotations

import itertools
import json
import re
import uuid
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipelines.registry.alias_moves import (
    HISTORY_PREFIX,
    REJECTED_TAG,
    AliasMove,
    AliasState,
    Rejection,
    alias_history,
    full_history,
)
from pipelines.registry.client import (
    CHAMPION,
    RegistryError,
    current_user,
    find_model,
    find_version,
    list_versions,
    registry_client,
    utc_time,
)
from pipelines.registry.descriptions import describe_moves

PROPOSAL_PREFIX, VOTE_PREFIX = "propose.", "vote."
# MLflow's rule, restricted to characters that a models:/ URI allows
ALIAS_PATTERN = re.compile(r"(?!latest$|v\d+$)[A-Za-z0-9_-]{1,200}", re.IGNORECASE)
SET_ALIAS_ATTEMPTS = 20  # while other processes set the same alias


class ConcurrentPromotion(RegistryError):
    """Somebody else moved the alias first, so the comparison with its previous version no longer counts."""


def alias_state(name: str, alias: str = CHAMPION, tracking_uri: str | None = None) -> AliasState:
    """The alias's current state. Pass it to `promote` as `expected` to promote only if it has not changed since."""
    with registry_client(tracking_uri) as client:
        return find_alias_state(client, name, alias)


def promote(
    name: str,
    version: str,
    alias: str = CHAMPION,
    *,
    reason: str = "by hand",
    score: float | None = None,
    comparison: Mapping[str, Any] | None = None,
    forced: bool = False,
    expected: AliasState | None = None,
    tracking_uri: str | None = None,
) -> str | None:
    """Set `alias` on `version` and record who, when and why; returns the version that had it before, or None.

    Does not compare the versions: promotion.compare_and_promote does. Repeating the call changes nothing. Raises
    RegistryError if there is no such version or no permission, and ConcurrentPromotion if the alias is no longer in the
    `expected` state or somebody else moves it at the same time.
    """
    with registry_client(tracking_uri) as client:
        model_version = find_version(client, f"models:/{name}/{version}")
        current = find_alias_state(client, name, alias)
        if expected is not None and current != expected:
            new_moves = current.moves[len(expected.moves) :]
            if new_moves and new_moves[-1].to != version:
                raise concurrent_promotion_error(name, version, new_moves[-1])
            if not new_moves:
                raise _moved_elsewhere_error(name, alias, expected, current)
        number = str(model_version.version)
        if current.version == number:
            return number
        move_alias(
            client,
            name,
            alias,
            "promote",
            number,
            current,
            reason=reason,
            score=score,
            comparison=comparison or None,
            forced=forced,
        )
        return current.version


def rollback(
    name: str,
    alias: str = CHAMPION,
    *,
    reason: str = "by hand",
    expected: AliasState | None = None,
    tracking_uri: str | None = None,
) -> str:
    """Set `alias` back to the version that had it before, by the recorded history; returns that version.

    A second rollback goes back one version further. RegistryError: there is no earlier version, or it was deleted.
    ConcurrentPromotion: the alias is no longer in the `expected` state.
    """
    with registry_client(tracking_uri) as client:
        current = find_alias_state(client, name, alias)
        if expected is not None and current != expected:
            if new_moves := current.moves[len(expected.moves) :]:
                raise ConcurrentPromotion(
                    f"{alias} of {name} was moved meanwhile ({new_moves[-1].sentence}): it is version "
                    f"{current.version} now, and was not rolled back"
                )
            raise _moved_elsewhere_error(name, alias, expected, current)
        previous = current.previous_version
        if previous is None:
            raise RegistryError(
                f"{name} has no earlier {alias} on record to go back to: see inpaint models history {name}"
            )
        find_version(client, f"models:/{name}/{previous}")
        move_alias(client, name, alias, "rollback", previous, current, reason=reason)
        return previous


def history(name: str, tracking_uri: str | None = None) -> list[AliasMove]:
    """The moves of all aliases of a model, oldest first."""
    with registry_client(tracking_uri) as client:
        return full_history(find_model(client, name).tags)


def find_alias_state(client: MlflowClient, name: str, alias: str) -> AliasState:
    """The alias's state, after applying a decided move that a killed process left unfinished.

    RegistryError: no such model, or an invalid alias.
    """
    if not ALIAS_PATTERN.fullmatch(alias):
        raise RegistryError(
            f"{alias!r} cannot be an alias: up to 200 letters, digits, '_' and '-' can, but 'latest' and v1 cannot"
        )
    model = find_model(client, name)
    moves = alias_history(model.tags, alias)
    if _stale_proposals(model.tags, alias, len(moves)):
        _apply_last_move(client, name, alias)
        model = find_model(client, name)
    return AliasState(_alias_version(model.aliases, alias), tuple(alias_history(model.tags, alias)))


def move_alias(
    client: MlflowClient,
    name: str,
    alias: str,
    action: str,
    version: str,
    state: AliasState,
    *,
    reason: str,
    score: float | None = None,
    comparison: Mapping[str, Any] | None = None,
    forced: bool = False,
) -> AliasMove:
    """Move the alias from its `state` to `version`; returns the recorded move.

    ConcurrentPromotion: somebody else's move was decided on. RegistryError: the version was deleted meanwhile.
    """
    proposal = AliasMove(
        id=uuid.uuid4().hex[:12],
        number=len(state.moves),
        alias=alias,
        action=action,
        to=version,
        from_=state.version,
        when=datetime.now(UTC).isoformat(timespec="microseconds"),
        who=current_user(),
        reason=reason,
        score=score,
        comparison=comparison,
        forced=forced,
    )
    decided = reach_consensus(
        lambda: find_model(client, name).tags, lambda key, text: _set_tag(client, name, key, text), proposal
    )
    applied = _apply_last_move(client, name, alias)
    describe_moves(client, name)
    if decided.to != version:
        raise concurrent_promotion_error(name, version, decided)
    if not applied:
        raise RegistryError(f"{name} version {version} was deleted at the same moment: {alias} was not moved")
    return decided


def _moved_elsewhere_error(
    name: str, alias: str, expected: AliasState, current: AliasState
) -> ConcurrentPromotion:
    return ConcurrentPromotion(
        f"{alias} of {name} was moved from version {expected.version} to {current.version} meanwhile, "
        "not by inpaint: try again"
    )


def concurrent_promotion_error(name: str, version: str, move: AliasMove) -> ConcurrentPromotion:
    return ConcurrentPromotion(
        f"{move.who} made version {move.to} {move.alias} of {name} at the same time, {move.when[:19]} UTC: "
        f"version {version} is not; compare it with version {move.to} and try again"
    )


def reach_consensus(
    read_tags: Callable[[], Mapping[str, str]], write_tag: Callable[[str, str], None], proposal: AliasMove
) -> AliasMove:
    """The move on which all writers of this alias and number agree: one of their proposals.

    A round has at most one unopposed proposal: everyone writes a proposal before reading, so of any two writers the
    later one sees both. A writer that finds only votes for an unopposed proposal has decided. A writer that finds at
    least one such vote adopts that proposal, so no other proposal exists in the rounds after a decision. Writers that
    run in lockstep adopt the oldest proposal.
    """
    slot, own_id = f"{proposal.alias}.{proposal.number:06d}", proposal.id
    for round_number in itertools.count():
        prefix = f"{slot}.{round_number:03d}."
        write_tag(f"{PROPOSAL_PREFIX}{prefix}{own_id}", json.dumps(proposal.as_json()))
        tags = read_tags()
        if HISTORY_PREFIX + slot in tags:
            break
        proposals = [AliasMove.from_record(other) for other in _load_tags(tags, PROPOSAL_PREFIX + prefix)]
        opposed = len({other.id for other in proposals}) > 1
        vote = {"wish": proposal.as_json(), "unopposed": not opposed}
        write_tag(f"{VOTE_PREFIX}{prefix}{own_id}", json.dumps(vote))
        tags = read_tags()
        if HISTORY_PREFIX + slot in tags:
            break
        votes = _load_tags(tags, VOTE_PREFIX + prefix)
        unopposed = [AliasMove.from_record(vote["wish"]) for vote in votes if vote["unopposed"]]
        if unopposed:
            proposal = unopposed[0]
        elif round_number:  # not in the first round: a proposal that a killed process left long ago would win
            proposal = min(proposals, key=lambda other: (other.when, other.id))
        if len(unopposed) == len(votes):
            write_tag(HISTORY_PREFIX + slot, json.dumps(proposal.as_json()))
            return proposal
    return AliasMove.from_record(json.loads(tags[HISTORY_PREFIX + slot]))


def _load_tags(tags: Mapping[str, str], prefix: str) -> list[dict[str, Any]]:
    """The decoded values of the tags with this prefix, in the order of their keys."""
    return [json.loads(text) for key, text in sorted(tags.items()) if key.startswith(prefix)]


def _apply_last_move(client: MlflowClient, name: str, alias: str) -> bool:
    """Set the alias to the version of its last move, then delete stale proposals. False: that version was deleted.

    The alias is checked again after it was set: a process that was suspended in between could otherwise set it to the
    version of an older move.
    """
    deleted = ""
    for _ in range(SET_ALIAS_ATTEMPTS):
        model = find_model(client, name)
        moves = alias_history(model.tags, alias)
        to = moves[-1].to
        if to in (deleted, _alias_version(model.aliases, alias)):
            break
        try:
            client.set_registered_model_alias(name, alias, to)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                deleted = to
            elif error.error_code != "BAD_REQUEST":  # raised if two processes insert the same row
                raise
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tags that another process has deleted already
        for key in _stale_proposals(model.tags, alias, len(moves)):
            with suppress(MlflowException):
                client.delete_registered_model_tag(name, key)
    return to != deleted


def rejections(name: str, tracking_uri: str | None = None) -> list[Rejection]:
    """The versions that did not become champion when they were registered, and why, oldest first."""
    with registry_client(tracking_uri) as client:
        return [
            Rejection(str(version.version), utc_time(version.creation_timestamp), version.tags[REJECTED_TAG])
            for version in list_versions(client, name, f"tags.{REJECTED_TAG} LIKE '%'")
        ]


def _stale_proposals(tags: Mapping[str, str], alias: str, count: int) -> list[str]:
    """The tags with proposals and votes for the first `count` moves, which are decided."""
    return [
        key
        for key in tags
        if key.startswith((f"{PROPOSAL_PREFIX}{alias}.", f"{VOTE_PREFIX}{alias}."))
        and int(key.split(".")[2]) < count
    ]


def _set_tag(client: MlflowClient, name: str, key: str, text: str) -> None:
    try:
        client.set_registered_model_tag(name, key, text)
    except MlflowException as error:
        # if two processes that agree insert the same row, one gets an error
        if error.error_code != "BAD_REQUEST" or find_model(client, name).tags.get(key) != text:
            raise


def _alias_version(aliases: Mapping[str, str], alias: str) -> str | None:
    version = aliases.get(alias)
    return None if version is None else str(version)
