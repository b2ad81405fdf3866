"""The report of a sweep: as Markdown, and as one self-contained HTML page that needs no network and no script."""

from __future__ import annotations

import base64
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipelines.evaluation.scores import Evaluation
from pipelines.evaluation.tables import Cell
from pipelines.sweeps.analysis import (
    direction,
    figure,
    heading,
    how_many,
    named_by,
    scored,
    shown,
    unit,
    with_spread,
)
from pipelines.sweeps.figures import Picture, pictures, sweep_pictures
from pipelines.sweeps.result import Group, SweepResult, best_name
from pipelines.sweeps.sentences import changes, sentences, unfinished

__all__ = ["sweep_html", "sweep_markdown", "sweep_pictures", "sweep_table"]

LONG = 40  # rows and lines that the page shows unasked


@dataclass(frozen=True)
class SweepTable:
    """One row a setting, best first, then one a classical method; the first `words` columns are the setting's."""

    headings: tuple[str, ...]
    settings: tuple[tuple[Cell, ...], ...]
    baselines: tuple[tuple[Cell, ...], ...]
    words: int


def sweep_table(result: SweepResult) -> SweepTable:
    """The fields, how many seeds, every metric as mean ± deviation over them, steps, and how its trials ended.

    The winner's values are marked best, and the best mean of each metric; settings without a finished trial have no row.
    """
    axes, metrics = named_by(result), result.metrics
    best = {m: figure(m, order[0].mean(m)) for m in metrics if len(order := scored(result, m)) > 1}
    lines = []
    for group in result.ranked:
        won = bool(best and result.best and group.setting == result.best.setting)
        values = [shown(group.values.get(axis.path, "n/a")) for axis in axes] or ["as the recipe"]
        scores = [
            Cell(with_spread(m, group), figure(m, group.mean(m)) == best.get(m) != "n/a") for m in metrics
        ]
        ended = [Cell(_steps(group)), Cell(_ended(result, group))]
        lines.append((*(Cell(value, won) for value in values), Cell(str(len(group.trials))), *scores, *ended))
    paths = tuple(axis.path for axis in axes) or ("setting",)
    classical = tuple(
        (
            Cell(name),
            *(Cell("") for _ in paths),
            *(Cell(figure(metric, scores.get(metric, float("nan")))) for metric in metrics),
            Cell(""),
            Cell("not trained"),
        )
        for name, scores in result.baselines.items()
    )
    names = (f"{heading(m)}{unit(m) and ',' + unit(m)}" for m in metrics)
    return SweepTable((*paths, "seeds", *names, "steps", "state"), tuple(lines), classical, len(paths))


def sweep_markdown(result: SweepResult) -> str:
    """The report in Markdown, without pictures: what was run, findings, the table, and what did not finish."""
    table = sweep_table(result)
    parts = [f"# {_escaped(title(result))}"]
    about = [f"{_escaped(name)}: {_code(value)}" for name, value in _about(result).items()]
    parts += ["  \n".join(about)] if about else []
    parts.append("\n".join(f"* {_escaped(sentence)}" for sentence in sentences(result)))
    if table.settings or table.baselines:
        sides = [":--"] * table.words + ["--:"] * (len(table.headings) - table.words - 1) + [":--"]
        rows = [table.headings, sides]
        lines = [f"| {' | '.join(_escaped(name) for name in rows[0])} |", f"|{'|'.join(sides)}|"]
        lines += [f"| {' | '.join(map(_cell, line))} |" for line in (*table.settings, *table.baselines)]
        parts += ["\n".join(lines), caption(result)]
    for name, found in (("Not finished", unfinished(result)), ("Changed during training", changes(result))):
        if found:
            parts.append(f"## {name}\n\n" + "\n".join(f"* {_escaped(line)}" for line in found))
    return "\n\n".join(parts) + "\n"


def sweep_html(result: SweepResult, evaluations: Mapping[int, Evaluation], best_recipe_yaml: str) -> str:
    """The report as one page: pictures are data URIs, everything from outside is escaped.

    evaluations: trial number -> its evaluation, for the strips; trials may be missing. best_recipe_yaml: the recipe
    with the best values in it; empty when there is none.
    """
    environment = Environment(
        loader=PackageLoader("pipelines"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("sweep.html").render(
        title=title(result),
        sentences=sentences(result),
        pictures=[(picture, _uri(picture)) for picture in pictures(result, evaluations)],
        table=sweep_table(result),
        caption=caption(result),
        distance=_distance(evaluations),
        unfinished=unfinished(result),
        changes=changes(result),
        recipe=best_recipe_yaml,
        file=best_name(result.name),
        command=f"inpaint run {shlex.quote(best_name(result.name))}",
        fields={path: _domain(spec) for path, spec in result.fields.items()},
        about=_about(result),
        long=LONG,
    )


def title(result: SweepResult) -> str:
    paths = [axis.path for axis in named_by(result)]
    return f"{result.name}: {result.model}" + (f" over {', '.join(paths)}" if paths else "")


def caption(result: SweepResult) -> str:
    """What the table's figures are."""
    ways = ", ".join(f"{heading(metric)} {direction(metric)}" for metric in result.metrics)
    return (
        f"{how_many(result.photographs, 'photograph')} of the split {result.split}; mean ± sample standard deviation over "
        f"seeds; {ways}; best in bold."
    )


def _steps(group: Group) -> str:
    steps = sorted({trial.steps for trial in group.trials})
    return str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"


def _ended(result: SweepResult, group: Group) -> str:
    """`finished`, or `2 finished, 1 failed` when not all trials of the setting did."""
    counts = Counter(trial.state for trial in result.trials if trial.setting == group.setting)
    return (
        next(iter(counts)) if len(counts) == 1 else ", ".join(f"{n} {state}" for state, n in counts.items())
    )


def _about(result: SweepResult) -> dict[str, str]:
    """The command first, as what readers want most."""
    order = ("command", "commit", "minutes")
    found = {name: result.about[name] for name in order if name in result.about}
    return found | {name: str(value) for name, value in result.about.items()}


def _domain(spec: Mapping[str, object]) -> str:
    return ", ".join(
        f"{kind.replace('grid', 'each of').replace('choice', 'one of')} {shown(values)}"
        for kind, values in spec.items()
        if values is not None
    )


def _distance(evaluations: Mapping[int, Evaluation]) -> str:
    """What FD is measured on, as the evaluations have it; empty when nothing is."""
    for evaluation in evaluations.values():
        for methods in evaluation.distances.values():
            for entry in methods.values():
                if "fd" in entry:
                    return f"FD: {entry['name']}, n = {entry['n']}, d = {entry['d']}"
    return ""


def _uri(picture: Picture) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.png).decode()


def _cell(cell: Cell) -> str:
    text = _escaped(cell.text)
    return f"**{text}**" if cell.best and text else text


def _escaped(text: str) -> str:
    """One line whose Markdown, HTML and table signs are only characters."""
    return re.sub(r"([\\`*<>|\[\]])", r"\\\1", " ".join(str(text).split()))


def _code(text: str) -> str:
    """A code span on one line, whatever ticks the text holds."""
    line = " ".join(str(text).split())
    fence = "`" * (max((len(run) for run in re.findall(r"`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"
