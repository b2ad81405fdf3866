"""Alias moves: their history, rollbacks, processes killed during a move, and concurrent moves."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import alembic
import pytest
from mlflow import MlflowClient

from pipelines import registry
from pipelines.registry import ConcurrentPromotion, RegistryError, aliases
from pipelines.registry.alias_moves import AliasMove, AliasState
from pipelines.registry.aliases import reach_consensus
from support.mlflow_stores import Killed, MlflowStore, champion_version


@pytest.fixture
def five_versions(bare: MlflowStore) -> MlflowStore:
    """Versions 1 to 5 of `encoder`."""
    bare.add_empty_versions("encoder", 5)
    return bare


def test_promotions_and_rollbacks_are_recorded(five_versions: MlflowStore) -> None:
    assert champion_version(five_versions.uri) is None
    assert (
        registry.promote("encoder", "1", reason="first", score=20.0, tracking_uri=five_versions.uri) is None
    )
    assert (
        registry.promote("encoder", "3", reason="21 against 20", score=21.0, tracking_uri=five_versions.uri)
        == "1"
    )
    assert registry.promote("encoder", "3", reason="a step repeated", tracking_uri=five_versions.uri) == "3"
    moves = registry.history("encoder", five_versions.uri)
    assert [(move.from_, move.to) for move in moves] == [(None, "1"), ("1", "3")]
    assert (moves[1].reason, moves[1].score) == ("21 against 20", 21.0)
    assert moves[1].who
    assert moves[1].when.startswith("20")

    assert registry.promote("encoder", "2", reason="looks better", tracking_uri=five_versions.uri) == "3"
    assert registry.rollback("encoder", tracking_uri=five_versions.uri) == "3"
    assert registry.rollback("encoder", tracking_uri=five_versions.uri) == "1"
    with pytest.raises(RegistryError, match="no earlier champion"):
        registry.rollback("encoder", tracking_uri=five_versions.uri)
    assert champion_version(five_versions.uri) == "1"
    assert len(registry.history("encoder", five_versions.uri)) == 5
    with pytest.raises(RegistryError, match="no version 9; its versions: 1, 2, 3, 4, 5"):
        registry.promote("encoder", "9", tracking_uri=five_versions.uri)
    with pytest.raises(RegistryError, match="'v2' cannot be an alias"):
        registry.promote("encoder", "2", "v2", tracking_uri=five_versions.uri)
    assert len(registry.history("encoder", five_versions.uri)) == 5


def test_each_alias_has_its_own_history(five_versions: MlflowStore) -> None:
    for version, alias in (("1", "champion"), ("2", "shadow"), ("3", "champion"), ("4", "shadow")):
        registry.promote("encoder", version, alias, tracking_uri=five_versions.uri)
    assert registry.rollback("encoder", "shadow", tracking_uri=five_versions.uri) == "2"
    assert champion_version(five_versions.uri) == "3"
    moves = [(move.alias, move.to) for move in registry.history("encoder", five_versions.uri)]
    assert moves == [("champion", "1"), ("shadow", "2"), ("champion", "3"), ("shadow", "4"), ("shadow", "2")]


def test_an_alias_moved_by_other_means_is_accepted(five_versions: MlflowStore) -> None:
    for version in "123":
        registry.promote("encoder", version, tracking_uri=five_versions.uri)
    five_versions.client.set_registered_model_alias("encoder", "champion", "2")
    assert registry.rollback("encoder", tracking_uri=five_versions.uri) == "1", (
        "the champion before version 2"
    )
    five_versions.client.set_registered_model_alias("encoder", "champion", "5")
    assert registry.promote("encoder", "4", tracking_uri=five_versions.uri) == "5"
    assert registry.rollback("encoder", tracking_uri=five_versions.uri) == "5"


def test_the_history_of_an_earlier_release_is_continued(five_versions: MlflowStore) -> None:
    common = {"alias": "champion", "action": "promote", "who": "a", "reason": "", "score": None}
    for when, before, to in (("2025-01-01T00:00:00", None, "1"), ("2025-01-02T00:00:00", "1", "2")):
        record = json.dumps({**common, "from": before, "to": to, "when": when})
        five_versions.client.set_registered_model_tag(
            "encoder", f"history.{when[:10].replace('-', '')}T000000.0", record
        )
    five_versions.client.set_registered_model_alias("encoder", "champion", "2")
    registry.promote("encoder", "3", tracking_uri=five_versions.uri)
    assert [move.to for move in registry.history("encoder", five_versions.uri)] == ["1", "2", "3"]
    assert [registry.rollback("encoder", tracking_uri=five_versions.uri) for _ in "ab"] == ["2", "1"]


def test_a_rollback_to_a_deleted_version_is_refused(five_versions: MlflowStore) -> None:
    for version in "12":
        registry.promote("encoder", version, tracking_uri=five_versions.uri)
    registry.delete("encoder", "1", five_versions.uri)
    with pytest.raises(RegistryError, match="no version 1; its versions: 2, 3, 4, 5"):
        registry.rollback("encoder", tracking_uri=five_versions.uri)
    assert champion_version(five_versions.uri) == "2"


def test_a_version_with_an_alias_is_not_deleted(five_versions: MlflowStore) -> None:
    registry.promote("encoder", "2", tracking_uri=five_versions.uri)
    registry.promote("encoder", "2", "shadow", tracking_uri=five_versions.uri)
    with pytest.raises(RegistryError, match="version 2 is champion and shadow: give the alias to another"):
        registry.delete("encoder", "2", five_versions.uri)
    registry.delete("encoder", "4", five_versions.uri)
    assert [row.version for row in five_versions.versions("encoder")] == ["5", "3", "2", "1"]


WRITES = ["set_registered_model_tag", "set_registered_model_alias", "delete_registered_model_tag"]


@pytest.mark.parametrize("nth", range(7))
def test_a_promotion_killed_at_any_write_is_done_or_undone(
    five_versions: MlflowStore, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """Killed before the nth of its six writes: for the next process, the promotion is either done or not."""
    registry.promote("encoder", "1", tracking_uri=five_versions.uri)
    remaining = iter(range(nth, -1, -1))
    with monkeypatch.context() as patch:
        for name in WRITES:
            original = getattr(MlflowClient, name)

            def dying_write(*args: Any, original: Callable[..., Any] = original) -> None:
                if next(remaining, 0) == 0:
                    raise Killed
                original(*args)

            patch.setattr(MlflowClient, name, dying_write)
        if nth < 6:
            with pytest.raises(Killed):
                registry.promote("encoder", "2", tracking_uri=five_versions.uri)
        else:
            registry.promote("encoder", "2", tracking_uri=five_versions.uri)
    if nth < 2:  # nobody can have seen a decision: the next proposal wins
        assert registry.promote("encoder", "3", tracking_uri=five_versions.uri) == "1"
        assert [move.to for move in registry.history("encoder", five_versions.uri)] == ["1", "3"]
    elif nth == 2:  # it voted and may have decided
        with pytest.raises(ConcurrentPromotion, match="made version 2 champion"):
            registry.promote("encoder", "3", tracking_uri=five_versions.uri)
        assert champion_version(five_versions.uri) == "2"
    else:
        assert registry.promote("encoder", "3", tracking_uri=five_versions.uri) == "2"
        assert [move.to for move in registry.history("encoder", five_versions.uri)] == ["1", "2", "3"]
    tags = five_versions.client.get_registered_model("encoder").tags
    assert [key for key in tags if not key.startswith("history.")] == []


def test_promoting_a_version_that_is_deleted_meanwhile_fails(
    five_versions: MlflowStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.promote("encoder", "1", tracking_uri=five_versions.uri)
    original = MlflowClient.set_registered_model_alias

    def delete_then_set(self: MlflowClient, name: str, alias: str, version: str) -> None:
        if version == "2":
            self.delete_model_version(name, version)
        original(self, name, alias, version)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", delete_then_set)
        with pytest.raises(RegistryError, match="version 2 was deleted at the same moment"):
            registry.promote("encoder", "2", tracking_uri=five_versions.uri)
    assert champion_version(five_versions.uri) == "1"
    assert registry.promote("encoder", "3", tracking_uri=five_versions.uri) == "1"
    assert registry.rollback("encoder", tracking_uri=five_versions.uri) == "1"


def test_a_suspended_process_cannot_undo_a_later_move(
    five_versions: MlflowStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the decision and setting the alias, another process finishes the move and makes the next one."""
    original = MlflowClient.set_registered_model_alias
    delayed = []

    def set_late(self: MlflowClient, name: str, alias: str, version: str) -> None:
        if not delayed:
            delayed.append(version)
            assert registry.promote("encoder", "3", tracking_uri=five_versions.uri) == "2"
        original(self, name, alias, version)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", set_late)
    registry.promote("encoder", "2", tracking_uri=five_versions.uri)
    assert delayed == ["2"]
    assert champion_version(five_versions.uri) == "3"
    assert [move.to for move in registry.history("encoder", five_versions.uri)] == ["2", "3"]


def test_a_promotion_fails_if_the_alias_is_not_in_the_expected_state(five_versions: MlflowStore) -> None:
    registry.promote("encoder", "1", tracking_uri=five_versions.uri)
    state = registry.alias_state("encoder", tracking_uri=five_versions.uri)
    registry.promote("encoder", "2", tracking_uri=five_versions.uri)
    with pytest.raises(
        ConcurrentPromotion, match=r"made version 2 champion of encoder .*: version 3 is not; compare it"
    ):
        registry.promote("encoder", "3", expected=state, tracking_uri=five_versions.uri)
    assert registry.promote("encoder", "2", expected=state, tracking_uri=five_versions.uri) == "2", (
        "it has been promoted already"
    )
    state = registry.alias_state("encoder", tracking_uri=five_versions.uri)
    five_versions.client.set_registered_model_alias("encoder", "champion", "5")
    with pytest.raises(ConcurrentPromotion, match="from version 2 to 5 meanwhile"):
        registry.promote("encoder", "3", expected=state, tracking_uri=five_versions.uri)
    assert champion_version(five_versions.uri) == "5"


@pytest.mark.slow
def test_a_rollback_fails_if_the_alias_is_not_in_the_expected_state(five_versions: MlflowStore) -> None:
    uri = five_versions.uri
    for version in "12":
        registry.promote("encoder", version, tracking_uri=uri)
    seen = registry.alias_state("encoder", tracking_uri=uri)
    assert seen.previous_version == "1"
    registry.promote("encoder", "3", tracking_uri=uri)
    with pytest.raises(ConcurrentPromotion, match=r"moved meanwhile \(version 3 became champion instead of"):
        registry.rollback("encoder", expected=seen, tracking_uri=uri)
    seen = registry.alias_state("encoder", tracking_uri=uri)
    assert registry.rollback("encoder", expected=seen, tracking_uri=uri) == "2"
    assert registry.alias_state("encoder", "none", uri).previous_version is None


def test_of_concurrent_promotions_one_wins(five_versions: MlflowStore) -> None:
    """On SQLite: of the threads that start from the same state one wins, and the errors of the others name it."""
    for _ in range(4):
        client = five_versions.client
        before = aliases.find_alias_state(client, "encoder", "champion")
        candidates = [version for version in "12345" if version != before.version][:3]
        start = threading.Barrier(len(candidates))

        def move(version: str, state: AliasState = before, start: threading.Barrier = start) -> str:
            start.wait()
            thread_client = MlflowClient(five_versions.uri, registry_uri=five_versions.uri)
            try:
                aliases.move_alias(thread_client, "encoder", "champion", "promote", version, state, reason="")
            except ConcurrentPromotion as error:
                return str(error)
            return "won"

        with ThreadPoolExecutor(len(candidates)) as pool:
            results = dict(zip(candidates, pool.map(move, candidates), strict=True))
        (winner,) = [version for version, result in results.items() if result == "won"]
        assert champion_version(five_versions.uri) == winner
        assert all(f"version {winner} champion" in result for result in results.values() if result != "won")
        after = aliases.find_alias_state(client, "encoder", "champion")
        assert [move.to for move in after.moves] == [*[move.to for move in before.moves], winner]


@contextmanager
def without_root() -> Iterator[None]:
    """Drop root's rights: for root, no file is read-only."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        if not os.access(alembic.__file__, os.R_OK, effective_ids=True):
            pytest.skip("only root may read the installed packages: no other user can open a registry")
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_read_only_registry_is_readable_and_refuses_changes(five_versions: MlflowStore, mode: str) -> None:
    registry.promote("encoder", "1", tracking_uri=five_versions.uri)
    registry.promote("encoder", "2", tracking_uri=five_versions.uri)
    with tempfile.TemporaryDirectory() as temporary:  # only root may read pytest's folders
        folder, path = Path(temporary), Path(temporary, "mlflow.db")
        shutil.copyfile(five_versions.uri.removeprefix("sqlite:///"), path)
        with closing(sqlite3.connect(path)) as database:
            database.execute(f"pragma journal_mode={mode}")
        path.chmod(0o444)
        folder.chmod(0o555)
        uri = f"sqlite:///{path}"
        with without_root():
            if mode == "delete":
                assert champion_version(uri) == "2"
            for change in (
                lambda: registry.promote("encoder", "3", tracking_uri=uri),
                lambda: registry.rollback("encoder", tracking_uri=uri),
                lambda: registry.delete("encoder", "4", uri),
            ):
                with pytest.raises(
                    RegistryError, match=r"^this user may not (write|open) MLflow's database"
                ) as error:
                    change()
                assert "ask for write permission on the file and its folder" in str(error.value)
                assert "\n" not in str(error.value)
        folder.chmod(0o755)
    assert champion_version(five_versions.uri) == "2"


# -- consensus under a random scheduler --------------------------------------------------------


class RandomScheduler:
    """Runs actors that read, write and delete the same tags, one operation at a time in a random order; some are killed."""

    def __init__(self, seed: int, actors: int, with_kills: bool) -> None:
        self.rng = random.Random(seed)
        self.tags: dict[str, str] = {}
        self.may_continue = [threading.Semaphore(0) for _ in range(actors)]
        self.has_stopped = threading.Semaphore(0)
        self.killed_at = {
            actor: self.rng.randrange(1, 12)
            for actor in range(1, actors)
            if with_kills and self.rng.random() < 0.6
        }
        self.operations = [0] * actors
        self.results: dict[int, AliasMove] = {}
        self.errors: dict[int, BaseException] = {}

    def wait_for_turn(self, actor: int) -> None:
        self.has_stopped.release()
        self.may_continue[actor].acquire()
        self.operations[actor] += 1
        if self.operations[actor] == self.killed_at.get(actor):
            raise Killed

    def read(self, actor: int) -> Mapping[str, str]:
        self.wait_for_turn(actor)
        return dict(self.tags)

    def write(self, actor: int, key: str, text: str) -> None:
        self.wait_for_turn(actor)
        assert self.tags.get(key, text) == text or not key.startswith("history."), "a decision never changes"
        self.tags[key] = text

    def run_actor(self, actor: int) -> None:
        when = str(actor % 2)
        proposal = AliasMove(
            f"proposal-{actor}", 0, "champion", "promote", str(actor), None, when, f"person {actor}"
        )
        try:
            decided = reach_consensus(
                lambda: self.read(actor), lambda key, text: self.write(actor, key, text), proposal
            )
            for key in sorted(self.tags, reverse=True):
                if not key.startswith("history."):  # it deletes stale tags, whether others run or not
                    self.wait_for_turn(actor)
                    self.tags.pop(key, None)
            self.results[actor] = decided
        except BaseException as error:
            self.errors[actor] = error
        self.has_stopped.release()

    def run(self) -> None:
        threads = [
            threading.Thread(target=self.run_actor, args=(actor,), daemon=True)
            for actor in range(len(self.may_continue))
        ]
        for thread in threads:
            thread.start()
            self.has_stopped.acquire()
        while alive := [actor for actor, thread in enumerate(threads) if thread.is_alive()]:
            actor = self.rng.choice(alive)
            assert self.operations[actor] < 1000, "the actors do not terminate"
            self.may_continue[actor].release()
            self.has_stopped.acquire()
            if actor in self.results or actor in self.errors:
                threads[actor].join()
        assert all(isinstance(error, Killed) for error in self.errors.values()), self.errors


@pytest.mark.slow
@pytest.mark.parametrize(("actors", "with_kills"), [(2, False), (2, True), (3, False), (4, True)])
def test_all_surviving_actors_agree(actors: int, with_kills: bool) -> None:
    winners = set()
    for seed in range(250):
        scheduler = RandomScheduler(seed, actors, with_kills)
        scheduler.run()
        assert set(scheduler.results) | set(scheduler.errors) == set(range(actors))
        assert len({result.id for result in scheduler.results.values()}) == 1, f"seed {seed}"
        assert json.loads(scheduler.tags["history.champion.000000"]) == scheduler.results[0].as_json()
        winners.add(scheduler.results[0].id)
    assert len(winners) == actors, "every actor can win"
