"""The registry on an MLflow server with authentication: permissions, and concurrent promotions."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient

from pipelines import registry
from pipelines.cli.main import main
from pipelines.cli.reporting import find_experiment
from pipelines.registry import RegistryError, aliases
from pipelines.registry.alias_moves import alias_history
from pipelines.tracking_address import Tracking
from support.cluster_harness import clean_environment, kill_processes, process_tree
from support.mlflow_server import ADMIN, AS_ADMIN, MlflowServer, acting_as

ROUNDS = 5


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """With versions 1 to 5 of `encoder`."""
    with MlflowServer(tmp_path_factory.mktemp("server"), authenticated=True) as server:
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
    server: MlflowServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs `inpaint models` as the administrator; returns exit status and output."""
    for key, value in AS_ADMIN.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)

    def call(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main(["models", *arguments])
        output = capsys.readouterr()
        return int(end.value.code or 0), output.out + output.err

    return call


def test_a_report_finds_the_pages_of_its_runs(server: MlflowServer) -> None:
    tracking = Tracking(server.uri, "test")
    with acting_as(AS_ADMIN):
        client = MlflowClient(server.uri, registry_uri=server.uri)
        run = client.get_model_version("encoder", "1").run_id
        assert run
        experiment = client.get_run(run).info.experiment_id
        assert find_experiment(tracking, ["", run]) == experiment
        assert find_experiment(tracking, ["0" * 32]) == "", "a deleted run"
    assert find_experiment(Tracking("sqlite:////x/mlflow.db", "test"), [run]) == ""


def test_the_commands_work_on_a_server(inpaint: Callable[..., tuple[int, str]]) -> None:
    assert json.loads(inpaint("list", "--json")[1])[0]["versions"] == 5
    assert inpaint("best", "encoder")[1].startswith("best psnr_rgb_hole on center masks: encoder/5, 21")
    assert inpaint("promote", "encoder/1")[1] == "encoder version 1 is now champion\n"
    status, output = inpaint("promote", "encoder/2")
    assert (status, output.count("\n")) == (1, 1), "it has no files to compare"
    assert "version 2 cannot be compared with the champion, version 1" in output
    status, output = inpaint("promote", "encoder/2", "--force", "--reason", "a test")
    assert output.endswith("encoder version 2 is now champion (before: version 1)\n")
    assert inpaint("rollback", "encoder")[1] == "encoder: champion is version 1 again\n"
    assert f"forced by {ADMIN}: a test" in inpaint("history", "encoder")[1]
    status, output = inpaint("show", "encoder@champion")
    assert (status, output.startswith("encoder version 1 (champion)")) == (0, True)
    status, output = inpaint("promote", "encoder/9")
    assert (status, output) == (
        1,
        "inpaint models promote: encoder has no version 9; its versions: 1, 2, 3, 4, 5\n",
    )
    assert inpaint("delete", "encoder/4", "--yes")[0] == 0
    assert [row.version for row in registry.show("encoder").versions] == ["5", "3", "2", "1"]


def test_the_number_of_requests_does_not_depend_on_the_number_of_versions(
    inpaint: Callable[..., tuple[int, str]], server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested: list[str] = []
    send = requests.Session.send

    def record(
        self: requests.Session, request: requests.PreparedRequest, **options: Any
    ) -> requests.Response:
        requested.append(str(request.url))
        return send(self, request, **options)

    def count(command: str) -> int:
        requested.clear()
        assert inpaint(*command.split())[0] == 0
        return len(requested)

    registry.promote("encoder", "1", tracking_uri=server.uri)
    commands = ("list", "show encoder", "show encoder@champion", "best encoder", "history encoder")
    monkeypatch.setattr(requests.Session, "send", record)
    for command in commands:
        count(command)  # the first one also asks whether the server is up
    before = {command: count(command) for command in commands}
    client = MlflowClient(server.uri, registry_uri=server.uri)
    first = client.get_model_version("encoder", "1")
    model = str(first.source).rpartition("/")[2]
    added = [
        client.create_model_version(
            "encoder", first.source, first.run_id, tags=first.tags, model_id=model
        ).version
        for _ in range(20)
    ]
    assert {command: count(command) for command in commands} == before
    assert max(before.values()) <= 10, before
    assert min(before.values()) >= 1, before
    for number in added:
        client.delete_model_version("encoder", number)


def test_a_wrong_or_missing_password_is_refused(
    inpaint: Callable[..., tuple[int, str]], server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not-the-password-7")
    status, output = inpaint("list")
    expected = f"the MLflow server at {server.uri} does not know 'admin' with this password"
    assert (status, output) == (1, f"inpaint models list: {expected}: see MLFLOW_TRACKING_PASSWORD\n")
    for key in AS_ADMIN:
        monkeypatch.delenv(key)
    status, output = inpaint("show", "encoder")
    assert (status, output.count("\n")) == (1, 1)
    assert "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in output


def test_a_reader_may_not_change_the_registry(
    inpaint: Callable[..., tuple[int, str]], server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.promote("encoder", "2")
    before = registry.show("encoder")
    for key, value in server.create_user("reader", "the-readers-password-1").items():
        monkeypatch.setenv(key, value)
    assert inpaint("list")[0] == 0
    assert inpaint("show", "encoder/1")[0] == 0
    for command in (
        "promote encoder/3 --force",
        "promote encoder/3 --alias mine",
        "rollback encoder",
        "delete encoder/3 --yes",
    ):
        status, output = inpaint(*command.split())
        expected = (
            f"reader may not do that in the MLflow at {server.uri}: ask its administrator for the permission"
        )
        assert (status, output) == (1, f"inpaint models {command.split()[0]}: {expected}\n"), command
    assert registry.show("encoder") == before
    server.allow_edits("reader", "encoder")
    assert inpaint("promote", "encoder/3", "--alias", "mine")[0] == 0
    assert registry.history("encoder")[-1].who == "reader"


WORKER = """
import sys
from pipelines import registry

for line in sys.stdin:
    version = line.strip()
    state = registry.alias_state("encoder", "shadow")
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        registry.promote("encoder", version, "shadow", reason="race", expected=state)
        print("won", flush=True)
    except registry.ConcurrentPromotion as error:
        print("lost " + str(error), flush=True)
"""


@pytest.fixture
def people(server: MlflowServer, tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes with different users, which promote when a line is sent to them."""
    started = []
    for name in ("ann", "bob"):
        user = server.create_user(name, f"password-of-{name}-1")
        server.allow_edits(name, "encoder")
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
    kill_processes([member for process in started for member in process_tree(process.pid)])


def send_line(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("inpaint")
def test_of_two_concurrent_promotions_one_wins(
    server: MlflowServer, people: list[subprocess.Popen[str]]
) -> None:
    """In every round one wins, the other's error names the winner, and alias and history agree."""
    client = MlflowClient(server.uri, registry_uri=server.uri)
    for _ in range(ROUNDS):
        before = aliases.find_alias_state(client, "encoder", "shadow")
        candidates = [version for version in ("1", "2", "3") if version != before.version][:2]
        for process, version in zip(people, candidates, strict=True):
            send_line(process, version)
        assert [read_line(process) for process in people] == ["ready", "ready"]
        for process in people:
            send_line(process, "go")
        results = [read_line(process) for process in people]
        assert sorted(text.split()[0] for text in results) == ["lost", "won"], results
        winner = [text.split()[0] for text in results].index("won")
        name, version = ("ann", "bob")[winner], candidates[winner]
        loser = results[1 - winner]
        assert f"{name} made version {version} shadow of encoder at the same time" in loser
        assert (
            f"version {candidates[1 - winner]} is not; compare it with version {version} and try again"
            in loser
        )
        model = client.get_registered_model("encoder")
        assert model.aliases["shadow"] == version
        moves = alias_history(model.tags, "shadow")
        assert len(moves) == len(before.moves) + 1
        last = moves[-1]
        assert (last.from_, last.to, last.who) == (before.version, version, name)
        assert [key for key in model.tags if not key.startswith("history.")] == []


def test_an_unreachable_server_is_reported(
    inpaint: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    status, output = inpaint("list", "--tracking-uri", "http://127.0.0.1:9")
    assert (status, output.count("\n")) == (1, 1)
    assert "the MLflow server at http://127.0.0.1:9 does not answer" in output
    with pytest.raises(RegistryError, match="does not answer"):
        registry.search(tracking_uri="http://127.0.0.1:9")
