"""`inpaint --version`, `recipes` and `completion`."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from pipelines.cli.main import build_parser, main
from pipelines.cli.overview import SHELLS
from pipelines.provenance import code_version
from pipelines.shipped_recipes import GROUPS, SHIPPED_RECIPES, describe_recipes, shipped_recipes


def output_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert not end.value.code
    return capsys.readouterr().out


def test_version_names_the_package_its_commit_and_the_libraries(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = output_of(["--version"], capsys).splitlines()
    assert first.startswith(f"inpaint {version('inpaint-pipelines')}")
    assert first.partition(" (commit ")[2][:12] == code_version().get("commit", "")[:12]
    assert re.fullmatch(r"Python 3\S+, torch (\S+), Ray (\S+), MLflow (\S+)", second)
    assert all(version(name) in second for name in ("torch", "ray", "mlflow"))
    monkeypatch.setattr("pipelines.provenance.code_version", dict)  # an installed wheel
    assert "commit" not in output_of(["--version"], capsys)


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_first_line_of_every_shipped_recipe_describes_it(name: str) -> None:
    first, _, rest = (SHIPPED_RECIPES / f"{name}.yaml").read_text().partition("\n")
    assert re.fullmatch(r"# [A-Z].{40,118}\.", first), first
    assert rest.startswith("# "), "and further lines say how to run it"


def test_the_first_lines_differ() -> None:
    assert len({recipe.description for recipe in describe_recipes()}) == len(shipped_recipes())


def test_recipes_are_listed_in_groups(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    rows = json.loads(output_of(["recipes", "--json"], capsys))
    assert [row["name"] for row in rows if row["group"] == "demo"] == ["demo"]
    assert [row["name"] for row in rows if row["group"] == "sweeps"] == [
        "context_encoder-lambda",
        "edge_connect-sigma",
    ]
    groups = {row["name"]: row["group"] for row in rows}
    assert set(groups) == set(shipped_recipes())
    assert (groups["edge_connect"], groups["edge_connect-small"], groups["facades"]) == (
        "papers",
        "small",
        "small",
    )
    text = output_of(["recipes"], capsys)
    assert [line for line in text.splitlines() if line in GROUPS.values()] == list(GROUPS.values())
    for row in rows:
        assert f"  {row['name']} " in text
        assert row["description"] in text
    monkeypatch.setenv("COLUMNS", "80")
    narrow = output_of(["recipes"], capsys)
    assert max(map(len, narrow.splitlines())) <= 80
    assert narrow.split() == text.split()


def complete(script: Path, line: str) -> set[str]:
    """What bash offers when TAB is pressed at the end of the line."""
    words = line.split(" ")
    commands = f"""
    source {shlex.quote(str(script))}
    COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}
    function_name=$(complete -p inpaint | grep -o -- '-F [^ ]*' | cut -c 4-)
    $function_name
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", commands], capture_output=True, text=True, check=True, cwd=script.parent
    )
    return set(done.stdout.split())


def test_bash_completes_commands_options_recipes_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "completion"
    script.write_text(output_of(["completion", "bash"], capsys))
    for name in ("own.yaml", "photo.png"):
        (tmp_path / name).touch()
    (tmp_path / "photos").mkdir()
    assert complete(script, "inpaint ev") == {"evaluate"}
    assert complete(script, "inpaint ") == set(build_parser().actions.choices)
    assert complete(script, "inpaint models p") == {"promote"}
    assert {"--set", "--storage", "--tracking-uri", "--debug"} <= complete(script, "inpaint run demo --")
    assert complete(script, "inpaint run demo --track") == {"--tracking-uri"}
    assert complete(script, "inpaint run edge_connect-s") == {"edge_connect-sigma", "edge_connect-small"}
    assert complete(script, "inpaint run ow") == {"own.yaml"}
    assert complete(script, "inpaint run phot") == {"photos"}, "a folder, but no photograph"
    assert complete(script, "inpaint fill model phot") == {"photo.png", "photos"}
    assert complete(script, "inpaint run demo --storage phot") == {"photos"}
    assert complete(script, "inpaint completion f") == {"fish"}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_each_shell_has_every_command_and_recipe(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = output_of(["completion", shell], capsys)
    names = {*build_parser().actions.choices, "promote", *shipped_recipes()}
    assert [name for name in names if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)] == []
    assert "NAMES" not in text
    if program := shutil.which(shell):
        script = tmp_path / "script"
        script.write_text(text)
        subprocess.run([program, "-n", str(script)], check=True)
