"""The report of a sweep: as Markdown, and as one self-contained HTML page without network access or scripts."""

from __future__ import annotations

import base64
import re
import shlex
from collections.abc import Mapping

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipelines.evaluation.results import EvaluationResult
from pipelines.evaluation.table_rendering import Cell
from pipelines.sweeps.report.figures import Picture, draw_pictures, sweep_pictures
from pipelines.sweeps.report.statistics import format_value, label_axes
from pipelines.sweeps.report.text import (
    baseline_sentences,
    best_sentences,
    better_direction,
    changed_values,
    metric_title,
    pluralize,
    summary_sentences,
    sweep_table,
    unfinished_trials,
)
from pipelines.sweeps.results import SweepResult, best_recipe_file

__all__ = ["sweep_html", "sweep_markdown", "sweep_pictures", "sweep_table"]

HEAD_FACTS = ("date", "source", "photographs", "commit", "minutes", "storage", "MLflow")  # below the title
MAX_VISIBLE_ROWS = 40  # rows and list items that the page shows without a click


def sweep_markdown(result: SweepResult) -> str:
    """The report in Markdown, without pictures: facts, conclusions, table, unfinished trials."""
    table = sweep_table(result)
    parts = [f"# {_escape_markdown(report_title(result))}"]
    about = [f"{_escape_markdown(name)}: {_code_span(value)}" for name, value in _run_facts(result).items()]
    parts += ["  \n".join(about)] if about else []
    parts.append("\n".join(f"* {_escape_markdown(sentence)}" for sentence in summary_sentences(result)))
    if table.setting_rows or table.baseline_rows:
        alignments = (
            [":--"] * table.setting_columns
            + ["--:"] * (len(table.headings) - table.setting_columns - 1)
            + [":--"]
        )
        rows = [table.headings, alignments]
        lines = [f"| {' | '.join(_escape_markdown(name) for name in rows[0])} |", f"|{'|'.join(alignments)}|"]
        lines += [
            f"| {' | '.join(map(_markdown_cell, line))} |"
            for line in (*table.setting_rows, *table.baseline_rows)
        ]
        parts += ["\n".join(lines), table_caption(result)]
    for name, items in (
        ("Not finished", unfinished_trials(result)),
        ("Changed during training", changed_values(result)),
    ):
        if items:
            parts.append(f"## {name}\n\n" + "\n".join(f"* {_escape_markdown(line)}" for line in items))
    return "\n\n".join(parts) + "\n"


def sweep_html(
    result: SweepResult, evaluations: Mapping[int, EvaluationResult], best_recipe_yaml: str
) -> str:
    """The report as one HTML page: pictures are data URIs, all text from recipes and trials is escaped.

    evaluations: trial number -> its evaluation, for the strips; may lack trials. best_recipe_yaml: the recipe with the
    best values; empty if there is none.
    """
    headline = headline_sentences(result)
    environment = Environment(
        loader=PackageLoader("pipelines"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("sweep.html").render(
        title=report_title(result),
        headline=headline,
        sentences=[sentence for sentence in summary_sentences(result) if sentence not in headline],
        pictures=[(picture, _data_uri(picture)) for picture in draw_pictures(result, evaluations)],
        table=sweep_table(result),
        caption=table_caption(result),
        distance=_distance_note(evaluations),
        unfinished_trials=unfinished_trials(result),
        changed_values=changed_values(result),
        recipe=best_recipe_yaml,
        recipe_file=best_recipe_file(result.name),
        command=f"inpaint run {shlex.quote(best_recipe_file(result.name))}",
        fields={path: _format_domain(spec) for path, spec in result.fields.items()},
        head=_head_facts(result),
        facts={name: value for name, value in _run_facts(result).items() if name not in HEAD_FACTS},
        max_rows=MAX_VISIBLE_ROWS,
    )


def headline_sentences(result: SweepResult) -> list[str]:
    """The best setting, whether it stands out, and how it compares with the best untrained method in the metric that
    decides."""
    axes = label_axes(result)
    return [*best_sentences(result, axes), *list(baseline_sentences(result))[:1]]


def report_title(result: SweepResult) -> str:
    paths = [axis.path for axis in label_axes(result)]
    return f"{result.name}: {result.model}" + (f" over {', '.join(paths)}" if paths else "")


def table_caption(result: SweepResult) -> str:
    """The caption of the table: photographs, split, and the direction of each metric."""
    directions = ", ".join(f"{metric_title(metric)} {better_direction(metric)}" for metric in result.metrics)
    return (
        f"{pluralize(result.photographs, 'photograph')} of the split {result.split}; mean ± sample standard deviation over "
        f"seeds; {directions}; best in bold."
    )


def _head_facts(result: SweepResult) -> dict[str, str]:
    facts = {name: str(result.about[name]) for name in HEAD_FACTS if name in result.about}
    return {
        {"minutes": "duration"}.get(name, name): f"{value} min" if name == "minutes" else value
        for name, value in facts.items()
    }


def _run_facts(result: SweepResult) -> dict[str, str]:
    """The facts about the run; command, commit and minutes first."""
    first_names = ("command", "commit", "minutes")
    first = {name: result.about[name] for name in first_names if name in result.about}
    return first | {name: str(value) for name, value in result.about.items()}


def _format_domain(spec: Mapping[str, object]) -> str:
    return ", ".join(
        f"{kind.replace('grid', 'each of').replace('choice', 'one of')} {format_value(values)}"
        for kind, values in spec.items()
        if values is not None
    )


def _distance_note(evaluations: Mapping[int, EvaluationResult]) -> str:
    """The features and sample size of FD, from the first evaluation that has it; empty if none has."""
    for evaluation in evaluations.values():
        for methods in evaluation.distances.values():
            for entry in methods.values():
                if "fd" in entry:
                    return f"FD: {entry['name']}, n = {entry['n']}, d = {entry['d']}"
    return ""


def _data_uri(picture: Picture) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.png).decode()


def _markdown_cell(cell: Cell) -> str:
    text = _escape_markdown(cell.text)
    return f"**{text}**" if cell.best and text else text


def _escape_markdown(text: str) -> str:
    """The text on one line, with Markdown, HTML and table characters escaped."""
    return re.sub(r"([\\`*<>|\[\]])", r"\\\1", " ".join(str(text).split()))


def _code_span(text: str) -> str:
    """The text as a code span on one line, also if it contains backticks."""
    line = " ".join(str(text).split())
    fence = "`" * (max((len(run) for run in re.findall(r"`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"
