"""Moves of an alias: their history, dying over them, taking them back, and several people at the same moment."""

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
from stores import Killed, Store, champion

from pipelines import registry
from pipelines.registry import Overtaken, RegistryError, aliases
from pipelines.registry.aliases import Move, agree


@pytest.fixture
def five(bare: Store) -> Store:
    """Versions 1 to 5 of `encoder`."""
    bare.numbers("encoder", 5)
    return bare


def test_champions_and_their_history(five: Store) -> None:
    assert champion(five.uri) is None
    assert registry.promote("encoder", "1", reason="first", score=20.0, tracking_uri=five.uri) is None
    assert registry.promote("encoder", "3", reason="21 against 20", score=21.0, tracking_uri=five.uri) == "1"
    assert registry.promote("encoder", "3", reason="a step repeated", tracking_uri=five.uri) == "3"
    events = registry.history("encoder", five.uri)
    assert [(event["from"], event["to"]) for event in events] == [(None, "1"), ("1", "3")]
    assert (events[1]["reason"], events[1]["score"]) == ("21 against 20", 21.0)
    assert events[1]["who"]
    assert events[1]["when"].startswith("20")

    assert registry.promote("encoder", "2", reason="looks better", tracking_uri=five.uri) == "3"
    assert registry.rollback("encoder", tracking_uri=five.uri) == "3"
    assert registry.rollback("encoder", tracking_uri=five.uri) == "1"
    with pytest.raises(RegistryError, match="no earlier champion"):
        registry.rollback("encoder", tracking_uri=five.uri)
    assert champion(five.uri) == "1"
    assert len(registry.history("encoder", five.uri)) == 5
    with pytest.raises(RegistryError, match="no version 9; its versions: 1, 2, 3, 4, 5"):
        registry.promote("encoder", "9", tracking_uri=five.uri)
    with pytest.raises(RegistryError, match="'v2' cannot be an alias"):
        registry.promote("encoder", "2", "v2", tracking_uri=five.uri)
    assert len(registry.history("encoder", five.uri)) == 5


def test_aliases_have_histories_of_their_own(five: Store) -> None:
    for version, alias in (("1", "champion"), ("2", "shadow"), ("3", "champion"), ("4", "shadow")):
        registry.promote("encoder", version, alias, tracking_uri=five.uri)
    assert registry.rollback("encoder", "shadow", tracking_uri=five.uri) == "2"
    assert champion(five.uri) == "3"
    moves = [(move["alias"], move["to"]) for move in registry.history("encoder", five.uri)]
    assert moves == [("champion", "1"), ("shadow", "2"), ("champion", "3"), ("shadow", "4"), ("shadow", "2")]


def test_an_alias_that_was_moved_by_other_means_is_taken_as_it_is(five: Store) -> None:
    for version in "123":
        registry.promote("encoder", version, tracking_uri=five.uri)
    five.client.set_registered_model_alias("encoder", "champion", "2")
    assert registry.rollback("encoder", tracking_uri=five.uri) == "1", "what was champion before version 2"
    five.client.set_registered_model_alias("encoder", "champion", "5")
    assert registry.promote("encoder", "4", tracking_uri=five.uri) == "5"
    assert registry.rollback("encoder", tracking_uri=five.uri) == "5"


def test_a_history_of_an_earlier_release_goes_on(five: Store) -> None:
    old = {"alias": "champion", "action": "promote", "who": "a", "reason": "", "score": None}
    for when, before, to in (("2025-01-01T00:00:00", None, "1"), ("2025-01-02T00:00:00", "1", "2")):
        event = json.dumps({**old, "from": before, "to": to, "when": when})
        five.client.set_registered_model_tag(
            "encoder", f"history.{when[:10].replace('-', '')}T000000.0", event
        )
    five.client.set_registered_model_alias("encoder", "champion", "2")
    registry.promote("encoder", "3", tracking_uri=five.uri)
    assert [move["to"] for move in registry.history("encoder", five.uri)] == ["1", "2", "3"]
    assert [registry.rollback("encoder", tracking_uri=five.uri) for _ in "ab"] == ["2", "1"]


def test_a_rollback_to_a_deleted_version_is_refused(five: Store) -> None:
    for version in "12":
        registry.promote("encoder", version, tracking_uri=five.uri)
    registry.delete("encoder", "1", five.uri)
    with pytest.raises(RegistryError, match="no version 1; its versions: 2, 3, 4, 5"):
        registry.rollback("encoder", tracking_uri=five.uri)
    assert champion(five.uri) == "2"


def test_a_version_with_an_alias_is_not_deleted(five: Store) -> None:
    registry.promote("encoder", "2", tracking_uri=five.uri)
    registry.promote("encoder", "2", "shadow", tracking_uri=five.uri)
    with pytest.raises(RegistryError, match="version 2 is champion and shadow: give the alias to another"):
        registry.delete("encoder", "2", five.uri)
    registry.delete("encoder", "4", five.uri)
    assert [row["version"] for row in five.versions("encoder")] == ["5", "3", "2", "1"]


WRITES = ["set_registered_model_tag", "set_registered_model_alias", "delete_registered_model_tag"]


@pytest.mark.parametrize("nth", range(7))
def test_dying_at_any_write_of_a_promotion(five: Store, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """Before its nth write of six: for whoever comes next it is done, or not, as a whole."""
    registry.promote("encoder", "1", tracking_uri=five.uri)
    left = iter(range(nth, -1, -1))
    with monkeypatch.context() as patch:
        for name in WRITES:
            real = getattr(MlflowClient, name)

            def counted(*args: Any, real: Callable[..., Any] = real) -> None:
                if next(left, 0) == 0:
                    raise Killed
                real(*args)

            patch.setattr(MlflowClient, name, counted)
        if nth < 6:
            with pytest.raises(Killed):
                registry.promote("encoder", "2", tracking_uri=five.uri)
        else:
            registry.promote("encoder", "2", tracking_uri=five.uri)
    if nth < 2:  # nobody can have seen it decided: another one's wish comes true
        assert registry.promote("encoder", "3", tracking_uri=five.uri) == "1"
        assert [move["to"] for move in registry.history("encoder", five.uri)] == ["1", "3"]
    elif nth == 2:  # he voted and may have decided
        with pytest.raises(Overtaken, match="made version 2 champion"):
            registry.promote("encoder", "3", tracking_uri=five.uri)
        assert champion(five.uri) == "2"
    else:
        assert registry.promote("encoder", "3", tracking_uri=five.uri) == "2"
        assert [move["to"] for move in registry.history("encoder", five.uri)] == ["1", "2", "3"]
    tags = five.client.get_registered_model("encoder").tags
    assert [key for key in tags if not key.startswith("history.")] == []


def test_a_version_deleted_while_it_is_promoted(five: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.promote("encoder", "1", tracking_uri=five.uri)
    real = MlflowClient.set_registered_model_alias

    def deleted_before(self: MlflowClient, name: str, alias: str, version: str) -> None:
        if version == "2":
            self.delete_model_version(name, version)
        real(self, name, alias, version)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", deleted_before)
        with pytest.raises(RegistryError, match="version 2 was deleted at the same moment"):
            registry.promote("encoder", "2", tracking_uri=five.uri)
    assert champion(five.uri) == "1"
    assert registry.promote("encoder", "3", tracking_uri=five.uri) == "1"
    assert registry.rollback("encoder", tracking_uri=five.uri) == "1"


def test_one_who_stood_still_cannot_leave_the_alias_behind(
    five: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between deciding and setting the alias, another finishes his work and makes the next move."""
    real = MlflowClient.set_registered_model_alias
    stood = []

    def slow(self: MlflowClient, name: str, alias: str, version: str) -> None:
        if not stood:
            stood.append(version)
            assert registry.promote("encoder", "3", tracking_uri=five.uri) == "2"
        real(self, name, alias, version)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", slow)
    registry.promote("encoder", "2", tracking_uri=five.uri)
    assert stood == ["2"]
    assert champion(five.uri) == "3"
    assert [move["to"] for move in registry.history("encoder", five.uri)] == ["2", "3"]


def test_a_promotion_counts_only_while_the_alias_is_where_it_was_compared(five: Store) -> None:
    registry.promote("encoder", "1", tracking_uri=five.uri)
    seen = registry.place("encoder", tracking_uri=five.uri)
    registry.promote("encoder", "2", tracking_uri=five.uri)
    with pytest.raises(
        Overtaken, match=r"made version 2 champion of encoder .*: version 3 is not; compare it"
    ):
        registry.promote("encoder", "3", expected=seen, tracking_uri=five.uri)
    assert registry.promote("encoder", "2", expected=seen, tracking_uri=five.uri) == "2", "as was wished"
    seen = registry.place("encoder", tracking_uri=five.uri)
    five.client.set_registered_model_alias("encoder", "champion", "5")
    with pytest.raises(Overtaken, match="from version 2 to 5 meanwhile"):
        registry.promote("encoder", "3", expected=seen, tracking_uri=five.uri)
    assert champion(five.uri) == "5"


def test_threads_that_promote_at_once(five: Store) -> None:
    """Against SQLite: of those who start from the same place one wins, and the others hear of him."""
    for _ in range(4):
        client = five.client
        at = aliases.place(client, "encoder", "champion")
        free = [version for version in "12345" if version != at.holder][:3]
        start = threading.Barrier(len(free))

        def move(version: str) -> str:
            start.wait()  # noqa: B023
            mine = MlflowClient(five.uri, registry_uri=five.uri)
            try:
                aliases.move(mine, "encoder", "champion", "promote", version, at, reason="")  # noqa: B023
            except Overtaken as error:
                return str(error)
            return "won"

        with ThreadPoolExecutor(len(free)) as pool:
            said = dict(zip(free, pool.map(move, free), strict=True))
        (winner,) = [version for version, text in said.items() if text == "won"]
        assert champion(five.uri) == winner
        assert all(f"version {winner} champion" in text for text in said.values() if text != "won")
        now = aliases.place(client, "encoder", "champion")
        assert [move["to"] for move in now.moves] == [*[move["to"] for move in at.moves], winner]


@contextmanager
def nobody() -> Iterator[None]:
    """Without the rights of root, for whom no file is read-only."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        if not os.access(alembic.__file__, os.R_OK, effective_ids=True):
            pytest.skip("root's packages lie where nobody else may look: no other user can open a registry")
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_registry_that_may_only_be_read(five: Store, mode: str) -> None:
    registry.promote("encoder", "1", tracking_uri=five.uri)
    registry.promote("encoder", "2", tracking_uri=five.uri)
    with tempfile.TemporaryDirectory() as temporary:  # pytest's own folders are root's alone
        folder, path = Path(temporary), Path(temporary, "mlflow.db")
        shutil.copyfile(five.uri.removeprefix("sqlite:///"), path)
        with closing(sqlite3.connect(path)) as database:
            database.execute(f"pragma journal_mode={mode}")
        path.chmod(0o444)
        folder.chmod(0o555)
        uri = f"sqlite:///{path}"
        with nobody():
            if mode == "delete":
                assert champion(uri) == "2"
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
    assert champion(five.uri) == "2"


# -- agreement, in every order that a random scheduler finds --------------------------------------------------------


class Stage:
    """Actors who read, write and tidy up the same tags, an operation at a time, in an order drawn from a seed; some die."""

    def __init__(self, seed: int, actors: int, mortal: bool) -> None:
        self.rng = random.Random(seed)
        self.tags: dict[str, str] = {}
        self.go = [threading.Semaphore(0) for _ in range(actors)]
        self.stopped = threading.Semaphore(0)
        self.deaths = {
            actor: self.rng.randrange(1, 12)
            for actor in range(1, actors)
            if mortal and self.rng.random() < 0.6
        }
        self.done = [0] * actors
        self.results: dict[int, Move] = {}
        self.errors: dict[int, BaseException] = {}

    def turn(self, actor: int) -> None:
        self.stopped.release()
        self.go[actor].acquire()
        self.done[actor] += 1
        if self.done[actor] == self.deaths.get(actor):
            raise Killed

    def read(self, actor: int) -> Mapping[str, str]:
        self.turn(actor)
        return dict(self.tags)

    def write(self, actor: int, key: str, text: str) -> None:
        self.turn(actor)
        assert self.tags.get(key, text) == text or not key.startswith("history."), "a decision never changes"
        self.tags[key] = text

    def act(self, actor: int) -> None:
        wish = {"id": f"w{actor}", "alias": "champion", "number": 0, "to": str(actor), "when": str(actor % 2)}
        try:
            decided = agree(lambda: self.read(actor), lambda key, text: self.write(actor, key, text), wish)
            for key in sorted(self.tags, reverse=True):
                if not key.startswith("history."):  # he tidies up, others or not
                    self.turn(actor)
                    self.tags.pop(key, None)
            self.results[actor] = decided
        except BaseException as error:
            self.errors[actor] = error
        self.stopped.release()

    def play(self) -> None:
        threads = [
            threading.Thread(target=self.act, args=(actor,), daemon=True) for actor in range(len(self.go))
        ]
        for thread in threads:
            thread.start()
            self.stopped.acquire()
        while alive := [actor for actor, thread in enumerate(threads) if thread.is_alive()]:
            actor = self.rng.choice(alive)
            assert self.done[actor] < 1000, "it does not end"
            self.go[actor].release()
            self.stopped.acquire()
            if actor in self.results or actor in self.errors:
                threads[actor].join()
        assert all(isinstance(error, Killed) for error in self.errors.values()), self.errors


@pytest.mark.parametrize(("actors", "mortal"), [(2, False), (2, True), (3, False), (4, True)])
def test_all_who_live_agree(actors: int, mortal: bool) -> None:
    winners = set()
    for seed in range(250):
        stage = Stage(seed, actors, mortal)
        stage.play()
        assert set(stage.results) | set(stage.errors) == set(range(actors))
        assert len({result["id"] for result in stage.results.values()}) == 1, f"seed {seed}"
        assert json.loads(stage.tags["history.champion.000000"]) == stage.results[0]
        winners.add(stage.results[0]["id"])
    assert len(winners) == actors, "anybody can win"
