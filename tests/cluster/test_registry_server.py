"""The registry on a real MLflow server with authentication: who may do what, and two who promote at once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import clean_environment, family, kill
from mlflow import MlflowClient
from mlflow_server import ADMIN, AS_ADMIN, Server, acting_as

from pipelines import registry
from pipelines.__main__ import main
from pipelines.registry import RegistryError, aliases

ROUNDS = 8


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With versions 1 to 5 of `encoder`."""
    with Server(tmp_path_factory.mktemp("server"), authenticated=True) as server:
        with acting_as(AS_ADMIN):
            client = MlflowClient(server.uri, registry_uri=server.uri)
            run = client.create_run(client.create_experiment("test")).info.run_id
            client.create_registered_model("encoder")
            for number in range(5):
                model = client.create_logged_model(
                    client.get_run(run).info.experiment_id, "encoder", run
                ).model_id
                scores = json.dumps({"center/psnr_rgb_hole": 17.0 + number})
                tags = {"model": "context_encoder", "inpaint.scores": scores}
                client.create_model_version("encoder", f"models:/{model}", run, tags=tags, model_id=model)
        yield server


@pytest.fixture
def inpaint(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs `inpaint models` as the administrator: exit status, and what it printed."""
    for key, value in AS_ADMIN.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)

    def call(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main(["models", *arguments])
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out + said.err

    return call


def test_the_commands(inpaint: Callable[..., tuple[int, str]]) -> None:
    assert json.loads(inpaint("list", "--json")[1])[0]["versions"] == 5
    assert inpaint("best", "encoder")[1].startswith("best psnr_rgb_hole on center masks: encoder/5, 21")
    assert inpaint("promote", "encoder/1")[1] == "encoder version 1 is now champion\n"
    status, said = inpaint("promote", "encoder/2")
    assert (status, said.count("\n")) == (1, 1), "it has no files to compare"
    assert "version 2 cannot be compared with the champion, version 1" in said
    status, said = inpaint("promote", "encoder/2", "--force", "--reason", "a test")
    assert said.endswith("encoder version 2 is now champion (before: version 1)\n")
    assert inpaint("rollback", "encoder")[1] == "encoder: champion is version 1 again\n"
    assert "forced: a test" in inpaint("history", "encoder")[1]
    assert f" {ADMIN} " in inpaint("history", "encoder")[1]
    status, said = inpaint("show", "encoder@champion")
    assert (status, said.startswith("encoder version 1 (champion)")) == (0, True)
    status, said = inpaint("promote", "encoder/9")
    assert (status, said) == (1, "inpaint models: encoder has no version 9; its versions: 1, 2, 3, 4, 5\n")
    assert inpaint("delete", "encoder/4", "--yes")[0] == 0
    assert [row["version"] for row in registry.show("encoder")["versions"]] == ["5", "3", "2", "1"]


def test_a_wrong_password_and_none(
    inpaint: Callable[..., tuple[int, str]], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not-the-password-7")
    status, said = inpaint("list")
    expected = f"the MLflow server at {server.uri} does not know 'admin' with this password"
    assert (status, said) == (1, f"inpaint models: {expected}: see MLFLOW_TRACKING_PASSWORD\n")
    for key in AS_ADMIN:
        monkeypatch.delenv(key)
    status, said = inpaint("show", "encoder")
    assert (status, said.count("\n")) == (1, 1)
    assert "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in said


def test_who_may_only_read(
    inpaint: Callable[..., tuple[int, str]], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.promote("encoder", "2")
    before = registry.show("encoder")
    for key, value in server.user("reader", "the-readers-password-1").items():
        monkeypatch.setenv(key, value)
    assert inpaint("list")[0] == 0
    assert inpaint("show", "encoder/1")[0] == 0
    for command in (
        "promote encoder/3 --force",
        "promote encoder/3 --alias mine",
        "rollback encoder",
        "delete encoder/3 --yes",
    ):
        status, said = inpaint(*command.split())
        expected = (
            f"reader may not do that in the MLflow at {server.uri}: ask its administrator for the permission"
        )
        assert (status, said) == (1, f"inpaint models: {expected}\n"), command
    assert registry.show("encoder") == before
    server.allow("reader", "encoder")
    assert inpaint("promote", "encoder/3", "--alias", "mine")[0] == 0
    assert registry.history("encoder")[-1]["who"] == "reader"


WORKER = """
import sys
from pipelines import registry

for line in sys.stdin:
    version = line.strip()
    seen = registry.place("encoder", "shadow")
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        registry.promote("encoder", version, "shadow", reason="race", expected=seen)
        print("won", flush=True)
    except registry.Overtaken as error:
        print("lost " + str(error), flush=True)
"""


@pytest.fixture
def people(server: Server, tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes with users of their own, who promote when they are told to."""
    started = []
    for name in ("ann", "bob"):
        user = server.user(name, f"password-of-{name}-1")
        server.allow(name, "encoder")
        environment = clean_environment() | user | {"MLFLOW_TRACKING_URI": server.uri}
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                cwd=Path(__file__).parents[2],
            )
        )
    yield started
    kill([member for process in started for member in family(process.pid)])


def tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("inpaint")
def test_two_who_promote_at_once(server: Server, people: list[subprocess.Popen[str]]) -> None:
    """Many times: one wins, the other is told who did, and alias and history say the same."""
    client = MlflowClient(server.uri, registry_uri=server.uri)
    for _ in range(ROUNDS):
        before = aliases.place(client, "encoder", "shadow")
        free = [version for version in ("1", "2", "3") if version != before.holder][:2]
        for process, version in zip(people, free, strict=True):
            tell(process, version)
        assert [hear(process) for process in people] == ["ready", "ready"]
        for process in people:
            tell(process, "go")
        said = [hear(process) for process in people]
        assert sorted(text.split()[0] for text in said) == ["lost", "won"], said
        winner = [text.split()[0] for text in said].index("won")
        name, version = ("ann", "bob")[winner], free[winner]
        loser = said[1 - winner]
        assert f"{name} made version {version} shadow of encoder at the same time" in loser
        assert f"version {free[1 - winner]} is not; compare it with version {version} and try again" in loser
        model = client.get_registered_model("encoder")
        assert model.aliases["shadow"] == version
        moves = aliases.moves_of(model.tags, "shadow")
        assert len(moves) == len(before.moves) + 1
        last = {key: moves[-1][key] for key in ("from", "to", "who")}
        assert last == {"from": before.holder, "to": version, "who": name}
        assert [key for key in model.tags if not key.startswith("history.")] == []


def test_a_server_that_is_away(
    inpaint: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    status, said = inpaint("list", "--tracking", "http://127.0.0.1:9")
    assert (status, said.count("\n")) == (1, 1)
    assert "the MLflow server at http://127.0.0.1:9 does not answer" in said
    with pytest.raises(RegistryError, match="does not answer"):
        registry.search(tracking_uri="http://127.0.0.1:9")
