"""What the registry says, as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LABEL = 12  # columns of what stands before a line
MISSING = "not on record"
RAY = ("job", "submission", "nodes", "cpus", "gpus")


def shown(found: Mapping[str, Any]) -> str:
    """`show` of a version, or of a model with all its versions."""
    return _version(found) if "version" in found else _model(found)


def _model(found: Mapping[str, Any]) -> str:
    rows = [
        {
            "version": row["version"],
            "aliases": " ".join(row["aliases"]),
            "registered": row["created"][:16].replace("T", " "),
            "recipe": row["tags"].get("inpaint.recipe", ""),
            "commit": row["tags"].get("inpaint.commit", ""),
            "score": row["tags"].get("inpaint.metric", ""),
        }
        for row in found["versions"]
    ]
    count = f"{len(rows)} version{'' if len(rows) == 1 else 's'}"
    return "\n".join([f"{found['name']}: {count}", *table(rows), *moves(found["history"])])


def _version(found: Mapping[str, Any]) -> str:
    held = f" ({', '.join(found['aliases'])})" if found["aliases"] else ""
    lines = [f"{found['name']} version {found['version']}{held}, registered {found['created']}"]
    model, edges = found["model"] or {}, found["edges"]
    options = ", ".join(f"{key} {value}" for key, value in (model.get("options") or {}).items())
    said = {
        "model": f"{model['model']}: {options}" if model else None,
        "trained": _trained(model) if "steps" in model else model.get("imported"),
        "shards": found["shards"],
        "edges": _edges(model, edges),
        "code": _code(found["code"]),
        "packages": _pairs(found["packages"]),
        "ray": _pairs(
            {key: found["ray"][key] for key in RAY if key in found["ray"]} if found["ray"] else None
        ),
        "sweep": _pairs(found["sweep"]) or "none",
        "run": found["run_id"],
        "curves": found["curves"] and f"run {found['curves']['run']}: {found['curves']['at']}",
        "samples": ", ".join(found["samples"]),
        "signature": found["signature"]
        and f"{found['signature']['inputs']} -> {found['signature']['outputs']}",
        "example": found["input_example"],
        "files": found["files"],
        "protocol": _protocol(found["protocol"]),
    }
    lines += [f"{label:<{LABEL}}{text or MISSING}" for label, text in said.items()]
    lines += scores(found["metrics"], found["photographs"] or {})
    lines += moves(found["history"])
    if found["recipe"]:
        lines += ["", "recipe", *(f"  {line}" for line in found["recipe"].splitlines())]
    return "\n".join(lines)


def _trained(model: Mapping[str, Any]) -> str:
    masks = ", ".join(model.get("masks") or ())
    low, high = (f"{100 * share:.0f}" for share in model.get("hole_range", (0, 0)))
    return (
        f"{model['steps']} steps at {model.get('size')} px, seed {model.get('seed')}, {masks} masks "
        f"({low} to {high} % hole)"
    )


def _edges(model: Mapping[str, Any], digests: Mapping[str, str] | None) -> str | None:
    if digests:
        return "Canny, " + ", ".join(f"sigma {sigma} ({digest})" for sigma, digest in digests.items())
    if not (model.get("needs_edges") or model.get("takes_edges")):
        return "none: the model takes none" if model else None
    said = f"Canny, sigma {model['sigma']:g}"
    return f"{said}; digest {MISSING}" if digests is None else f"{said}; made on the fly, without tars"


def _code(code: Mapping[str, str] | None) -> str | None:
    if not code:
        return None
    return f"{code['commit']}{', with changes since' if code['dirty'] == 'true' else ', unchanged'}"


def _protocol(protocol: Mapping[str, Any] | None) -> str | None:
    if not protocol:
        return None
    return (
        f"{protocol['photographs']} photographs of {', '.join(protocol['sizes'])} "
        f"({protocol['photographs_sha256'][:12]}), {', '.join(protocol['masks'])} masks ({protocol['masks_sha256'][:12]}), "
        f"seed {protocol['seed']}"
    )


def _pairs(values: Mapping[str, Any] | None) -> str:
    return ", ".join(
        f"{key} {f'{value:g}' if isinstance(value, float) else value}"
        for key, value in (values or {}).items()
        if value not in (None, "")
    )


def scores(metrics: Mapping[str, float], photographs: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A row for each kind of masks and band, the metrics of the main table and the distances in columns."""
    from pipelines.evaluation.tables import COLUMNS
    from pipelines.registry.searching import split_column

    columns = {metric: (heading, digits) for heading, metric, digits in COLUMNS}
    columns |= {"fd": ("FD", 2), "kid": ("KID", 4)}
    found: dict[tuple[str, str], dict[str, float]] = {}
    for column, value in metrics.items():
        masks, band, metric = split_column(column)
        found.setdefault((masks, band), {})[metric] = value
    rows = []
    for (masks, band), values in sorted(found.items(), key=lambda entry: (entry[0][0], _tens(entry[0][1]))):
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
    kept = [key for key in (rows[0] if rows else ()) if any(row[key] for row in rows)]
    return ["", *table([{key: row[key] for key in kept} for row in rows])] if rows else []


def _tens(band: str) -> int:
    return int(band.partition("-")[0]) if band else -1


def moves(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line a move of an alias."""
    if not history:
        return []
    rows = [
        {
            "when": str(move["when"])[:19].replace("T", " "),
            "alias": move["alias"],
            "move": f"{move['from'] or 'none'} -> {move['to']}",
            "who": move["who"],
            "why": " ".join(
                part
                for part in (
                    "rollback:" if move["action"] == "rollback" else "",
                    "forced:" if move.get("forced") else "",
                    str(move["reason"]),
                )
                if part
            ),
        }
        for move in history
    ]
    return ["", *table(rows)]


def ranking(found: Mapping[str, Any]) -> str:
    """`best`: the best version, and how the others did under the same protocol."""
    masks, band = found["masks"], "" if found["band"] == "all" else f", holes of {found['band']} %"
    lines = []
    groups = found["groups"]
    if len(groups) > 1:
        lines.append(
            f"warning: the versions of {found['name']} were scored under {len(groups)} protocols, whose scores do not "
            "compare; the newest version's comes first"
        )
    for group in groups:
        first = group["versions"][0]
        lines += [
            f"best {found['metric']} on {masks} masks{band}: {found['name']}/{first['version']}, {first['value']:.4g}",
            f"protocol {group['protocol'] or MISSING}",
            *table(
                [
                    {
                        "version": row["version"],
                        found["metric"]: f"{row['value']:.4f}",
                        "aliases": " ".join(row["aliases"]),
                        "recipe": row["recipe"] or "",
                        "registered": row["created"][:16].replace("T", " "),
                    }
                    for row in group["versions"]
                ]
            ),
            "",
        ]
    if found["unscored"]:
        lines.append(f"without this score: version {', '.join(found['unscored'])}")
    return "\n".join(lines).rstrip()


def table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Rows with the same keys as aligned lines, below a heading."""
    if not rows:
        return []
    cells = [list(rows[0]), *[[str(value) for value in row.values()] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
