"""Errors in what a user typed: one line, exit status 2, and the word that was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.cli.main import build_parser, main


def error_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(words)
    captured = capsys.readouterr()
    assert (end.value.code, captured.out, captured.err.count("\n")) == (2, "", 1), captured
    return captured.err.rstrip("\n")


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("trian demo", "inpaint: there is no command 'trian'; did you mean train?"),
        ("models promot a/1", "inpaint models: there is no action 'promot'; did you mean promote?"),
        ("promote a/1", "inpaint: there is no command 'promote'; did you mean inpaint models promote?"),
        ("data x", "inpaint data: there is no action 'x'; there are show, check; see inpaint data --help"),
        (
            "run demo --trakcing-uri x",
            "inpaint run: there is no option --trakcing-uri; did you mean --tracking-uri?",
        ),
        ("run demo --stroage=x", "inpaint run: there is no option --stroage; did you mean --storage?"),
        (
            "models best a --metrc psnr",
            "inpaint models best: there is no option --metrc; did you mean --metric?",
        ),
        ("fill m p h --ot f.png", "inpaint fill: there is no option --ot; did you mean --out?"),
        ("fill m p h -o f.png", "inpaint fill: there is no option -o; did you mean --out?"),
        ("--jsn models list", "inpaint: there is no option --jsn; see inpaint --help"),
        ("models list json", "inpaint models list: unexpected argument 'json'; did you mean --json?"),
        ("models list a", "inpaint models list: unexpected argument 'a'; see inpaint models list --help"),
        ("run", "inpaint run: the following arguments are required: RECIPE; see inpaint run --help"),
        (
            "shard a b --size x",
            "inpaint shard: argument --size: 'x' is not a whole number; see inpaint shard --help",
        ),
    ],
)
def test_a_misspelt_word_is_answered_with_the_nearest_one(
    command: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error_of(command.split(), capsys) == error


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("run demo data.source=x", "give it as --set data.source=x"),
        ("run data.source=x demo", "give it as --set data.source=x, after the recipe's name"),
        ("submit data.source=x", "give it as --set data.source=x, after the recipe's name"),
        ("sweep demo models.edge_connect.lambda_p=0", "give it as --set models.edge_connect.lambda_p=0"),
        ("plan demo seed=1 --photos 5", "give it as --set seed=1"),
        ("run demo --data.source x", "give it as --set data.source=VALUE"),
        ("run demo --data.source=x", "give it as --set data.source=x"),
        ("run demo --set data.source x", "give it as --set data.source=x"),
    ],
)
def test_a_field_without_set_is_explained(
    command: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error_of(command.split(), capsys).endswith(words)


def test_a_field_with_spaces_is_quoted_for_the_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(["run", "demo", "data.source=my photos"], capsys).endswith(
        "--set 'data.source=my photos'"
    )


def test_a_recipe_file_may_have_an_equals_sign_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a=b.yaml").touch()
    assert build_parser().parse_args(["run", "a=b.yaml"]).recipe == "a=b.yaml"


def test_a_missing_command_or_action_is_named_with_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of([], capsys)
    assert error.startswith("inpaint: the command is missing: run, ")
    assert error.endswith("; see inpaint --help")
    assert error_of(["data"], capsys).startswith("inpaint data: the action is missing: show, check; ")


def test_beginnings_of_options_and_negative_numbers_still_parse() -> None:
    args = build_parser().parse_args(["run", "demo", "--tracking", "x", "--set", "a=-1"])
    assert (args.tracking_uri, args.set) == ("x", ["a=-1"])
    assert build_parser().parse_args(["models", "rollback", "a", "--reason", "- worse"]).reason == "- worse"
