"""Formats the registry's answers as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.registry.alias_moves import AliasMove, Rejection
    from pipelines.registry.describe import ModelDetails, VersionDetails
    from pipelines.registry.searching import Ranking

LABEL_WIDTH = 12  # characters of a label
NOT_RECORDED = "not recorded"
RAY_KEYS = ("job", "submission", "nodes", "cpus", "gpus")


def format_details(details: VersionDetails | ModelDetails) -> str:
    """Output of `models show` for a version or a model."""
    from pipelines.registry.describe import ModelDetails

    return _format_model(details) if isinstance(details, ModelDetails) else _format_version(details)


def _format_model(details: ModelDetails) -> str:
    rows = [
        {
            "version": row.version,
            "aliases": " ".join(row.aliases),
            "registered": row.created[:16].replace("T", " "),
            "recipe": row.tags.get("inpaint.recipe", ""),
            "commit": row.tags.get("inpaint.commit", ""),
            "score": row.tags.get("inpaint.metric", ""),
        }
        for row in details.versions
    ]
    count = f"{len(rows)} version{'' if len(rows) == 1 else 's'}"
    return "\n".join(
        [f"{details.name}: {count}", *format_table(rows), *format_moves(details.history, details.rejections)]
    )


def _format_version(details: VersionDetails) -> str:
    aliases = f" ({', '.join(details.aliases)})" if details.aliases else ""
    lines = [f"{details.name} version {details.version}{aliases}, registered {details.created}"]
    model, edges = details.model or {}, details.edges
    options = ", ".join(f"{key} {value}" for key, value in (model.get("options") or {}).items())
    rows = {
        "champion": _format_champion(details),
        "model": f"{model['model']}: {options}" if model else None,
        "trained": _format_training(model) if "steps" in model else model.get("imported"),
        "shards": details.shards,
        "edges": _format_edges(model, edges),
        "code": _format_code(details.code),
        "packages": _format_pairs(details.packages),
        "ray": _format_pairs(
            {key: details.ray[key] for key in RAY_KEYS if key in details.ray} if details.ray else None
        ),
        "sweep": _format_pairs(details.sweep) or "none",
        "run": details.run_id,
        "curves": details.curves and f"run {details.curves['run']}: {details.curves['at']}",
        "samples": ", ".join(details.samples),
        "signature": details.signature and f"{details.signature['inputs']} -> {details.signature['outputs']}",
        "example": details.input_example,
        "files": details.files,
        "protocol": _format_protocol(details.protocol),
    }
    lines += [f"{label:<{LABEL_WIDTH}}{text or NOT_RECORDED}" for label, text in rows.items()]
    lines += format_scores(details.metrics, details.photographs or {})
    lines += format_moves(details.history)
    if details.recipe:
        lines += ["", "recipe", *(f"  {line}" for line in details.recipe.splitlines())]
    return "\n".join(lines)


def _format_training(model: Mapping[str, Any]) -> str:
    masks = ", ".join(model.get("masks") or ())
    low, high = (f"{100 * fraction:.0f}" for fraction in model.get("hole_range", (0, 0)))
    layout = ", channels_last" if model.get("channels_last") else ""
    precision = f", {model['precision']}{layout} on {model['hardware']}" if model.get("precision") else ""
    return (
        f"{model['steps']} steps at {model.get('size')} px, seed {model.get('seed')}, {masks} masks "
        f"({low} to {high} % hole){precision}"
    )


def _format_edges(model: Mapping[str, Any], digests: Mapping[str, str] | None) -> str | None:
    if digests:
        return "Canny, " + ", ".join(f"sigma {sigma} ({digest})" for sigma, digest in digests.items())
    if not (model.get("needs_edges") or model.get("takes_edges")):
        return "none: the model takes none" if model else None
    text = f"Canny, sigma {model['sigma']:g}"
    return (
        f"{text}; digest {NOT_RECORDED}" if digests is None else f"{text}; computed on the fly, without tars"
    )


def _format_code(code: Mapping[str, str] | None) -> str | None:
    if not code:
        return None
    return f"{code['commit']}{', with uncommitted changes' if code['dirty'] == 'true' else ', unchanged'}"


def _format_protocol(stored: Mapping[str, Any] | None) -> str | None:
    if not stored:
        return None
    from pipelines.evaluation.protocol import Protocol

    protocol = Protocol.from_record(stored)
    return (
        f"{protocol.photographs} photographs of {', '.join(protocol.sizes)} "
        f"({protocol.photographs_sha256[:12]}), {', '.join(protocol.masks)} masks ({protocol.masks_sha256[:12]}), "
        f"seed {protocol.seed}"
    )


def _format_pairs(values: Mapping[str, Any] | None) -> str:
    return ", ".join(
        f"{key} {f'{value:g}' if isinstance(value, float) else value}"
        for key, value in (values or {}).items()
        if value not in (None, "")
    )


def format_scores(metrics: Mapping[str, float], photographs: Mapping[str, Mapping[str, int]]) -> list[str]:
    """One row per mask set and band; the metrics of the main table and the feature distances as columns."""
    from pipelines.evaluation.metrics import ALL_COLUMNS, SUMMARY_METRICS
    from pipelines.registry.searching import split_column

    columns = {
        metric: (heading, digits) for heading, metric, digits in ALL_COLUMNS if metric in SUMMARY_METRICS
    }
    scores: dict[tuple[str, str], dict[str, float]] = {}
    for column, value in metrics.items():
        masks, band, metric = split_column(column)
        scores.setdefault((masks, band), {})[metric] = value
    rows = []
    for (masks, band), values in sorted(
        scores.items(), key=lambda entry: (entry[0][0], _band_start(entry[0][1]))
    ):
        counts = photographs.get(masks, {})
        row = {
            "masks": masks,
            "hole %": band or "all",
            "n": str(counts.get(band, "") if band else sum(counts.values()) or ""),
        }
        row |= {
            heading: f"{values[metric]:.{digits}f}" if metric in values else ""
            for metric, (heading, digits) in columns.items()
        }
        rows.append(row)
    columns_shown = [key for key in (rows[0] if rows else ()) if any(row[key] for row in rows)]
    return ["", *format_table([{key: row[key] for key in columns_shown} for row in rows])] if rows else []


def _band_start(band: str) -> int:
    return int(band.partition("-")[0]) if band else -1


def _format_champion(details: VersionDetails) -> str:
    """Whether the version is champion, and why."""
    moves = [move for move in details.history if move.alias == "champion"]
    if "champion" in details.aliases:
        return f"yes, since {moves[-1].date}: {moves[-1].sentence}" if moves else "yes"
    rejected = details.tags.get("not_champion", "")
    if moves:
        return f"no, since {moves[-1].date}: {moves[-1].sentence}"
    return f"no: {rejected}" if rejected else "no"


def format_moves(history: Sequence[AliasMove], rejections: Sequence[Rejection] = ()) -> list[str]:
    """One line per alias change and per version that did not become champion, by time, below an empty line."""
    # a rejection refers to an earlier move; MLflow's time of its version may have whole seconds only
    moments: list[tuple[str, int, AliasMove | Rejection]] = [(move.when[:19], 0, move) for move in history]
    moments += [(rejection.when[:19], 1, rejection) for rejection in rejections]
    entries = [entry for *_, entry in sorted(moments, key=lambda moment: moment[:2])]
    return ["", *(f"{entry.date}  {entry.sentence}" for entry in entries)] if entries else []


def format_ranking(ranking: Ranking) -> str:
    """Output of `models best`: the ranked versions of each evaluation protocol."""
    masks, band = ranking.masks, "" if ranking.band == "all" else f", holes of {ranking.band} %"
    lines = []
    groups = ranking.groups
    if len(groups) > 1:
        lines.append(
            f"warning: the versions of {ranking.name} were scored under {len(groups)} protocols, whose scores are not "
            "comparable; the newest version's protocol comes first"
        )
    for group in groups:
        first = group.versions[0]
        lines += [
            f"best {ranking.metric} on {masks} masks{band}: {ranking.name}/{first.version}, {first.value:.4g}",
            f"protocol {group.protocol or NOT_RECORDED}",
            f"digests: photographs {group.photographs or NOT_RECORDED}, masks {group.masks or NOT_RECORDED}",
            *([f"not comparable with the first: {group.not_comparable}"] if group.not_comparable else []),
            *format_table(
                [
                    {
                        "version": row.version,
                        ranking.metric: f"{row.value:.4f}",
                        "aliases": " ".join(row.aliases),
                        "recipe": row.recipe or "",
                        "registered": row.created[:16].replace("T", " "),
                    }
                    for row in group.versions
                ]
            ),
            "",
        ]
    if ranking.unscored:
        lines.append(f"without this score: version {', '.join(ranking.unscored)}")
    return "\n".join(lines).rstrip()


def format_table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Aligned lines of rows that have the same keys, below a heading."""
    if not rows:
        return []
    cells = [list(rows[0]), *[[str(value) for value in row.values()] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def format_seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def print_table(header: list[str], rows: list[list[str]]) -> None:
    print("\n".join(format_table([dict(zip(header, row, strict=True)) for row in rows])), flush=True)
