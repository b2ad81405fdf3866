"""The descriptions of registered models and of versions in MLflow: model cards in Markdown, from what is on record.

A version's card says what the model is, on what it was trained, how it scored, its limits and how to use it. That of the
registered model says how its versions and aliases are meant, and lists the moves of its aliases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from models import paper
from pipelines.registry.alias_moves import AliasMove
from pipelines.tracking.markdown import spaced_columns

MAX_DESCRIPTION_CHARS = 5000  # of MLflow's column: MySQL and PostgreSQL refuse more
MAX_OUTCOME_CHARS = 700
MAX_LISTED_MOVES = 12
HISTORY_HEADING, OUTCOME_HEADING = "## Alias history", "## Compared with the champion"
UNNUMBERED = "/VERSION"  # in a card that is written before the version has its number


def version_card(
    name: str, metadata: Mapping[str, Any], metrics: Mapping[str, float], run_id: str | None
) -> str:
    """The card of a version. metadata: of its MLmodel file; metrics: `masks/band/metric` -> score. Missing parts of the
    record, as in versions of earlier releases, are left out."""
    model = str(metadata.get("model", name))
    tables = _score_tables(metadata, metrics)
    for shown in range(len(tables), -1, -1):
        rest = [f"{len(tables) - shown} more mask sets: `inpaint models show {name}{UNNUMBERED}`"]
        card = "\n\n".join(
            part
            for part in (
                paper(model) or f"The inpainting model `{model}`.",
                *_training(metadata),
                *_scores(metadata, [*tables[:shown], *(rest if shown < len(tables) else [])]),
                *_samples(metadata, run_id),
                *_limits(metadata, metrics),
                _usage(name, metadata),
            )
            if part
        )
        if len(card) <= MAX_DESCRIPTION_CHARS - MAX_OUTCOME_CHARS:
            return card
    return _truncate(card, MAX_DESCRIPTION_CHARS - MAX_OUTCOME_CHARS)


def numbered(card: str, name: str, version: str) -> str:
    """The card with the version's number in its commands."""
    return card.replace(f"{name}{UNNUMBERED}", f"{name}/{version}")


def with_outcome(card: str, is_champion: bool, reason: str) -> str:
    """The card with the result of the comparison with the champion at registration."""
    result = "became `champion`" if is_champion else "did not become `champion`"
    text = f"\n\n{OUTCOME_HEADING}\n\nWhen it was registered, this version {result}: {reason}"
    return card.partition(f"\n\n{OUTCOME_HEADING}")[0] + _truncate(text, MAX_OUTCOME_CHARS)


def model_card(name: str, model: str, metric: str, moves: Sequence[AliasMove]) -> str:
    """The description of a registered model. metric: the one that decides which version becomes champion, or ''."""
    better = f"better in `{metric}`" if metric else "better"
    about = paper(model) or f"The inpainting model `{model}`."
    head = f"""{about}

Each version is one trained model. Its description says on what it was trained, how it scored, and what its limits are.

* `candidate` is the newest version.
* `champion` is the best version so far. A new version becomes champion if it is {better} than the champion, which is \
scored again on the same photographs and masks. `inpaint models promote` compares them in the same way.

```sh
inpaint models show {name}@champion
inpaint fill models:/{name}@champion photo.png mask.png --out filled.png
```"""
    return with_history(head, name, moves)


def with_history(description: str, name: str, moves: Sequence[AliasMove]) -> str:
    """The description with the moves of the aliases, newest first; text above their heading is kept."""
    head = description.partition(f"\n\n{HISTORY_HEADING}")[0]
    if not moves:
        return head
    newest = [f"* {move.date}: {move.sentence}" for move in reversed(moves)]
    for count in range(min(len(newest), MAX_LISTED_MOVES), 0, -1):
        lines = newest[:count]
        if hidden := len(newest) - count:
            lines.append(f"* {hidden} earlier: `inpaint models history {name}`")
        text = "\n\n".join([head, HISTORY_HEADING, "\n".join(lines)])
        if len(text) <= MAX_DESCRIPTION_CHARS:
            return text
    return _truncate(text, MAX_DESCRIPTION_CHARS)


def _training(metadata: Mapping[str, Any]) -> list[str]:
    lines = []
    if imported := metadata.get("imported"):
        lines.append(f"imported weights: {imported}")
    size, holes = metadata.get("size"), _hole_range(metadata)
    splits = metadata.get("splits") or {}
    source = f"`{metadata['source']}`" if metadata.get("source") else ""
    if splits:
        counts = ", ".join(
            f"{splits[split]} {split}" for split in ("train", "val", "test") if split in splits
        )
        lines.append(f"photographs: {counts}, of {source or 'a source that is not on record'}")
    if digest := metadata.get("shards"):
        lines.append(f"shards: `{digest[:12]}`")
    if size:
        lines.append(f"crops of {size} x {size} pixels")
    if masks := metadata.get("masks"):
        lines.append(f"masks: {', '.join(masks)}{f' ({holes})' if holes else ''}")
    if metadata.get("takes_edges") or metadata.get("needs_edges"):
        sigmas = metadata.get("sigmas") or [metadata.get("sigma")]
        kind = f", {metadata['edge_source']}" if metadata.get("edge_source") else ""
        lines.append(f"edges: Canny, sigma {', '.join(f'{sigma:g}' for sigma in sigmas if sigma)}{kind}")
    if metadata.get("steps"):
        precision = f", {metadata['precision']}" if metadata.get("precision") else ""
        hardware = f" (begun on: {metadata['hardware']})" if metadata.get("hardware") else ""
        lines.append(f"{metadata['steps']} steps, seed {metadata.get('seed')}{precision}{hardware}")
    if sweep := metadata.get("sweep"):
        lines.append(f"values found by the sweep {sweep.get('name')}: {sweep.get('values')}")
    code = metadata.get("code") or {}
    if code.get("commit"):
        changes = ", with uncommitted changes" if code.get("dirty") == "true" else ""
        lines.append(f"code: commit `{code['commit'][:12]}`{changes}")
    return ["## Trained on", "\n".join(f"* {line}" for line in lines)] if lines else []


def _hole_range(metadata: Mapping[str, Any]) -> str:
    if not metadata.get("hole_range"):
        return ""
    low, high = (f"{100 * fraction:.0f}" for fraction in metadata["hole_range"])
    return f"holes of {low if low == high else f'{low} to {high}'} % of the image"


def _scores(metadata: Mapping[str, Any], tables: Sequence[str]) -> list[str]:
    if not tables:
        return []
    protocol, scored_on = metadata.get("protocol") or {}, metadata.get("scored_on") or {}
    sentences = []
    if protocol.get("photographs"):
        split = f"{scored_on['split']} " if scored_on.get("split") else ""
        sizes = ", ".join(protocol.get("sizes") or ())
        sentences.append(
            f"Means over {protocol['photographs']} {split}photographs of {sizes} pixels, fixed masks with seed "
            f"{protocol.get('seed')}."
        )
        sentences.append("Known pixels are kept. Only scores of the same protocol can be compared.")
    if protocol.get("photographs_sha256") and protocol.get("masks_sha256"):
        digests = {name: protocol[f"{name}_sha256"][:12] for name in ("photographs", "masks")}
        sentences.append(f"Digests: photographs `{digests['photographs']}`, masks `{digests['masks']}`.")
    if metadata.get("intervals"):
        sentences.append(
            "In brackets: the 95 % interval of the mean over photographs (bootstrap). ↓: worse than the best of the "
            "column by more than chance (paired)."
        )
    return ["## Scores", str(metadata.get("verdict") or ""), " ".join(sentences), *tables]


def _score_tables(metadata: Mapping[str, Any], metrics: Mapping[str, float]) -> list[str]:
    """One table per mask set: the version over all photographs and by hole area, then the untrained methods."""
    from pipelines.evaluation.metrics import ALL_COLUMNS, SUMMARY_METRICS
    from pipelines.evaluation.results import masks_title
    from pipelines.evaluation.verdict import TITLES
    from pipelines.registry.searching import split_column

    columns = [column for column in ALL_COLUMNS if column[1] in SUMMARY_METRICS and column[1] != "kid"]
    rows: dict[str, dict[str, dict[str, float]]] = {}  # masks -> row's title -> metric -> score
    for column, value in metrics.items():
        masks, band, metric = split_column(column)
        rows.setdefault(masks, {}).setdefault(band, {})[metric] = value
    tables = []
    for masks, bands in rows.items():
        ordered = sorted(bands, key=lambda band: int(band.partition("-")[0]) if band else -1)
        lines = [
            (f"holes of {band} %" if band else "**this version**", bands[band], None if band else "")
            for band in ordered
            if not (band and len(bands) == 2)  # the only band repeats the means
        ]
        for method, scores in _baselines(metadata).items():
            own = {
                split_column(column)[2]: x for column, x in scores.items() if split_column(column)[0] == masks
            }
            lines.append((TITLES.get(method, method), own, method))
        shown = [column for column in columns if any(column[1] in scores for _, scores, _ in lines)]
        if not shown:
            continue
        table = [
            f"| {masks_title(masks)} | " + " | ".join(heading for heading, *_ in shown) + " |",
            "|:--|" + "--:|" * len(shown),
        ]
        for title, scores, scored in lines:
            cells = [
                f"{scores[key]:.{digits}f}{_precision(metadata, scored, f'{masks}/{key}', digits)}"
                if key in scores
                else ""
                for _, key, digits in shown
            ]
            table.append(f"| {title} | " + " | ".join(cells) + " |")
        tables.append(spaced_columns("\n".join(table)))
    return tables


def _precision(metadata: Mapping[str, Any], method: str | None, column: str, digits: int) -> str:
    """The mark and the interval behind a mean. method: '' for this version, None for its rows by hole area, which have
    neither."""
    if method is None:
        return ""
    mark = "↓" if column in (metadata.get("worse") or {}).get(method, ()) else ""
    interval = (metadata.get("intervals") or {}).get(column) if method == "" else None
    return f"{mark} ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})" if interval else mark


def _samples(metadata: Mapping[str, Any], run_id: str | None) -> list[str]:
    """A picture, by its address relative to MLflow's pages, and where the sample grids are."""
    samples = metadata.get("samples") or ()
    if not samples or not run_id:
        return []
    path = quote(metadata.get("card_picture") or samples[0], safe="")
    return [
        "## Samples",
        f"![samples](get-artifact?path={path}&run_uuid={run_id})",
        f"All methods: {', '.join(f'`{path}`' for path in samples)} among the artifacts of run `{run_id}`.",
    ]


def _limits(metadata: Mapping[str, Any], metrics: Mapping[str, float]) -> list[str]:
    lines = []
    if better := _better_baselines(metadata, metrics):
        lines.append(f"Methods without training are better in `{metadata['metric']}`: {', '.join(better)}.")
    if holes := _hole_range(metadata):
        lines.append(f"Trained on {holes}: expect worse results on larger holes.")
    if size := metadata.get("size"):
        lines.append(
            f"Trained on {size} x {size} pixels: it has seen no structures larger than that. `inpaint fill` fills larger "
            "photographs in tiles."
        )
    if metadata.get("true_edges"):
        lines.append("It gets the true edges of the whole photograph, also in the hole: for studies only.")
    elif metadata.get("needs_edges"):
        lines.append("It needs the edges outside the hole, at the same sigma. `inpaint fill` computes them.")
    return ["## Limits", "\n".join(f"* {line}" for line in lines)] if lines else []


def _baselines(metadata: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """The untrained methods on record, in the order of the tables; the stored order is by name."""
    from pipelines.evaluation.verdict import TITLES

    recorded = metadata.get("baselines") or {}
    return {method: recorded[method] for method in (*TITLES, *recorded) if method in recorded}


def _better_baselines(metadata: Mapping[str, Any], metrics: Mapping[str, float]) -> list[str]:
    """The titles of the untrained methods with a better mean in the deciding metric on the first mask set."""
    from pipelines.evaluation.metrics import higher_is_better
    from pipelines.evaluation.verdict import TITLES

    metric = str(metadata.get("metric", ""))
    column = next((name for name in metrics if name.rpartition("/")[2] == metric), "")
    if not column:
        return []
    sign = 1 if higher_is_better(metric) else -1
    return [
        TITLES.get(method, method)
        for method, scores in _baselines(metadata).items()
        if column in scores and sign * (scores[column] - metrics[column]) > 0
    ]


def _usage(name: str, metadata: Mapping[str, Any]) -> str:
    uri = f"models:/{name}{UNNUMBERED}"
    return f"""## Use

```sh
inpaint fill {uri} photo.png mask.png --out filled.png
```

```python
from pipelines import registry
model = registry.load_model("{uri}")
filled = model.complete(image, mask)  # uint8 [H,W,3]; mask [H,W], nonzero = hole

# without this project: float32 [B,5,H,W] (RGB in [0,1], mask, edge) -> [B,3,H,W]
import mlflow
model = mlflow.pyfunc.load_model("{uri}")
```"""


def _truncate(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
