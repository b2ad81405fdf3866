"""`inpaint models ...`: its text, its JSON and its one-line errors."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import registry
from pipelines.cli.main import build_parser, main
from pipelines.cli.models import ACTIONS
from support.mlflow_stores import PipelineOutputs

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def models(
    registry_of_chain: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Runs `inpaint models` with --tracking-uri on a copy of the chain's registry: exit status, output, errors."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["models", *arguments, "--tracking-uri", registry_of_chain])
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


def test_list_show_best_and_history(models: Run, chain: PipelineOutputs) -> None:
    status, out, _ = models("list")
    assert (status, out.split()[-6:-1]) == (0, ["encoder", "context_encoder", "3", "2", "3"])
    assert json.loads(models("list", "--json")[1])[0]["champion"] == "2"

    status, out, _ = models("show", "encoder")
    assert status == 0
    assert "encoder: 3 versions" in out
    assert "0123456789ab-dirty" in out
    assert " UTC  version 2 became champion instead of version 1, by " in out
    for text in ("encoder@champion", "encoder/2", "models:/encoder/2"):
        status, out, _ = models("show", text)
        assert out.startswith("encoder version 2 (champion), registered 20")
        assert "submission raysubmit_1" in out
    assert json.loads(models("show", "encoder/2", "--json")[1])["photographs"] == {"center": {"20-30": 29}}

    status, out, _ = models("best", "encoder", "--metric", "psnr", "--band", "20-30")
    assert status == 0
    assert out.startswith("best psnr_rgb_hole on center masks, holes of 20-30 %: encoder/2, ")
    assert "protocol" in out
    assert "not comparable" not in out
    (group,) = json.loads(models("best", "encoder", "--json")[1])["groups"]
    assert [row["version"] for row in group["versions"]] == ["2", "3", "1"]

    status, out, _ = models("history", "encoder")
    first, second, third = out.splitlines()
    assert " UTC  version 1 became champion, by " in first
    assert " UTC  version 2 became champion instead of version 1, by " in second
    assert " UTC  version 3 did not become champion: psnr_rgb_hole " in third
    assert "of version 2 on the same photographs" in third
    assert json.loads(models("history", "encoder", "--json")[1])[1]["comparison"]["n"] == 29


def test_promote_and_rollback(models: Run) -> None:
    status, out, err = models("promote", "encoder/3")
    assert status == 1
    assert err.startswith(
        "inpaint models promote: encoder version 3 is worse than the champion, version 2: psnr_rgb_hole "
    )
    assert err.count("\n") == 1
    status, out, _ = models("promote", "encoder/3", "--force", "--reason", "for a test")
    assert status == 0
    assert out.endswith("encoder version 3 is now champion (before: version 2)\n")
    out = models("history", "encoder")[1]
    assert "version 3 became champion instead of version 2, forced by " in out
    assert ": for a test; psnr_rgb_hole" in out
    assert models("rollback", "encoder")[1] == "encoder: champion is version 2 again\n"
    out = models("history", "encoder")[1]
    assert "champion went back from version 3 to version 2, by " in out
    assert out.endswith(": by hand\n")
    assert models("promote", "encoder/2")[1] == "encoder version 2 is now champion (already)\n"
    by_alias = models("promote", "encoder@candidate", "--alias", "tried")
    assert by_alias[:2] == (0, "encoder version 3 is now tried\n")
    result = json.loads(models("promote", "encoder/1", "--alias", "shadow", "--json")[1])
    assert (result["alias"], result["before"], result["comparison"]) == ("shadow", None, None)


def test_show_prints_the_card(models: Run) -> None:
    status, out, _ = models("show", "encoder@champion", "--card")
    assert status == 0
    assert out.startswith("Context Encoders")
    assert "## Scores" in out
    assert "models:/encoder/2" in out
    assert "## Alias history" in models("show", "encoder", "--card")[1]
    assert json.loads(models("show", "encoder", "--card", "--json")[1])["card"].startswith("Context Encoders")


def test_compare(models: Run, chain: PipelineOutputs, tmp_path: Path) -> None:
    images = [
        "--images",
        chain.storage.subfolder("work/s/a1").uri,
        "--grid-rows",
        "2",
        "--out",
        "compared.png",
    ]
    status, out, _ = models("compare", "encoder/1", "encoder@champion", *images)
    assert status == 0
    assert "A: encoder/1\nB: encoder/2\n95 % intervals" in out
    assert "\ndigests: photographs " in out
    assert "PSNR hole" in out
    assert "better" in out
    assert (tmp_path / "compared.png").stat().st_size > 1000
    status, out, _ = models("compare", "encoder/1", "encoder@champion", *images, "--json")
    assert json.loads(out)["picture"] == "compared.png"


def test_export(models: Run, tmp_path: Path) -> None:
    status, out, _ = models("export", "encoder", "--pt2", "--out", "model.pt2")
    assert (status, out.startswith("encoder version 2: model.pt2, ")) == (0, True)
    assert (tmp_path / "model.pt2").is_file()
    status, _, err = models("export", "encoder", "--pt2", "--size", "64", "--out", "model.pt2")
    assert (status, err) == (1, "inpaint models export: --size goes with --onnx: --pt2 takes any size\n")


def test_delete_asks_for_confirmation(
    models: Run, registry_of_chain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert "is champion: give the alias to another version first" in models("delete", "encoder/2", "--yes")[2]
    monkeypatch.setattr("sys.stdin", io.StringIO("encoder/1\n"))
    assert "needs --yes without a terminal" in models("delete", "encoder/1")[2]
    monkeypatch.setattr("sys.stdin", Terminal("yes\n"))
    assert "encoder version 1 was not deleted" in models("delete", "encoder/1")[2]
    assert registry.list_models(registry_of_chain)[0]["versions"] == 3
    monkeypatch.setattr("sys.stdin", Terminal("encoder/1\n"))
    status, out, _ = models("delete", "encoder/1")
    assert (status, "encoder version 1 is deleted" in out) == (0, True)
    assert registry.list_models(registry_of_chain)[0]["versions"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("show encodr", "no model 'encodr': did you mean 'encoder'"),
        ("show encoder/9", "encoder has no version 9; its versions: 1, 2, 3"),
        ("show encoder@best", "its aliases: candidate (version 3), champion (version 2)"),
        ("promote encoder", "has no version: write NAME/VERSION, for example encoder/2"),
        ("promote encoder/9", "encoder has no version 9"),
        ("promote encoder/1 --alias latest", "'latest' cannot be an alias"),
        ("rollback nobody", "no model 'nobody'"),
        ("rollback encoder --alias shadow", "no earlier shadow on record"),
        ("best encoder --metric psnr --band 20-3", "in band '20-3'"),
        ("compare encoder encoder/2", "are the same, encoder/2"),
        ("compare encoder@x encoder/2", "no alias 'x'"),
        ("delete encoder/x --yes", "has no version"),
        ("history nobody", "no model 'nobody'"),
    ],
)
def test_errors_are_one_line(models: Run, arguments: str, words: str) -> None:
    status, out, err = models(*arguments.split())
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"inpaint models {arguments.split()[0]}: ")
    assert words in err


@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_has_help_with_an_example_that_parses(
    action: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["models", action, "--help"])
    help_text = capsys.readouterr().out
    (example,) = [line for line in help_text.splitlines() if line.startswith("example: inpaint models")]
    assert build_parser().parse_args(example.removeprefix("example: inpaint ").split()).action == action
    assert "--json" in help_text
    assert "--tracking-uri" in help_text
