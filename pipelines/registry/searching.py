"""Searching versions by what they are and how they scored: rows, a pandas frame, and the best one.

A version's scores are a tag of it, so that all versions come with theirs in one request; of versions that an earlier
release registered they are asked of MLflow's logged models.
"""

from __future__ import annotations

import difflib
import json
import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipelines.registry.versions import RegistryError, connected, find_model, pages, versions_of, when

if TYPE_CHECKING:
    import pandas as pd

SCORES, PROTOCOL, DISTANCE = "inpaint.scores", "inpaint.protocol", "inpaint.distance"  # tags of a version
SHORT = {
    "psnr": "psnr_rgb_hole",
    "ssim": "ssim_gauss11_rgb",
    "l1": "l1_percent",
    "l2": "l2_percent",
    "tv": "tv_percent",
    "mae": "mae_edgeconnect_grey",
}
"""What people say, and the protocol's name for it, as in the columns of the tables."""
BAND = re.compile(r"\d+-\d+")
CONDITION = re.compile(r"\s*(\S+?)\s*(>=|<=|==|!=|>|<|=)\s*(\S+)\s*")
COMPARE = {
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
}


def search(
    name: str | None = None,
    *,
    where: str | Sequence[str] = (),
    filter: str = "",
    order_by: str = "created desc",
    limit: int | None = None,
    tracking_uri: str | None = None,
) -> pd.DataFrame:
    """The versions in the registry (of one model, when named), a row each.

    Columns: name, version, aliases, created, model, sigma, size, run_id, recipe, commit, protocol, and every score as
    `masks/band/metric`, or `masks/metric` over all photographs (nan: not scored so). Scores of different protocols do
    not compare.
    where: conditions on columns, "center/psnr_rgb_hole > 18", "psnr >= 18" (one kind of masks), "sigma < 2"; all must
    hold. filter: MLflow's own filter of versions, "tags.model = 'edge_connect'". order_by: a column, with ` desc` to
    have the largest first. ValueError in one line: a column or condition that is none, the registry.
    """
    import pandas as pd

    with connected(tracking_uri) as client:
        rows = version_rows(client, name, filter)
    scores = sorted({column for row in rows for column in row["scores"]})
    frame = pd.DataFrame(
        [
            {**{key: row[key] for key in row if key not in ("scores", "distance")}, **row["scores"]}
            for row in rows
        ],
        columns=[*ABOUT, *scores],
    ).astype({"version": int, "sigma": float, "size": "Int64", **dict.fromkeys(scores, float)})
    frame["created"] = pd.to_datetime(frame["created"], utc=True)
    for condition in [where] if isinstance(where, str) else where:
        match = CONDITION.fullmatch(condition)
        value = _number(match[3]) if match else None
        if not match or value is None:
            raise ValueError(
                f"{condition!r} is no condition: write, for example, 'center/psnr_rgb_hole > 18'"
            )
        kept = COMPARE[match[2]](frame[column_of(frame.columns, match[1])], value)
        frame = frame[kept.fillna(False).astype(bool)]
    column, _, direction = order_by.strip().partition(" ")
    if direction.strip().lower() not in ("", "asc", "desc"):
        raise ValueError(f"order_by {order_by!r}: write a column, then `desc` or nothing")
    if column:
        falling = direction.strip().lower() == "desc"
        frame = frame.sort_values(column_of(frame.columns, column), ascending=not falling, kind="stable")
    return frame.head(len(frame) if limit is None else limit).reset_index(drop=True)


ABOUT = (
    *("name", "version", "aliases", "created", "model", "sigma", "size"),
    *("run_id", "recipe", "commit", "protocol"),
)


def best(
    name: str,
    metric: str = "psnr",
    *,
    band: str | None = None,
    masks: str | None = None,
    tracking_uri: str | None = None,
) -> dict[str, Any]:
    """The versions of a model ranked by a score, those with one protocol among themselves.

    Keys: name, metric, masks, band, groups (each with `protocol` and `versions`, best first; the group of the newest
    version first), unscored (versions without that score). `band` as in "20-30" (percent of the picture that is hole).
    ValueError in one line: no such model, metric, band or masks among the versions' scores.
    """
    with connected(tracking_uri) as client:
        rows = version_rows(client, name)[::-1]
        if not rows:
            find_model(client, name)  # says so when there is no such model
            raise RegistryError(f"{name} has no versions")
    wanted = "/".join(part for part in (masks, band, metric) if part)
    columns = {column for row in rows for column in row["scores"]}
    column = column_of(columns, wanted, f"versions of {name}")
    of_masks, of_band, full = split_column(column)
    groups: dict[str | None, list[dict[str, Any]]] = {}
    unscored = []
    for row in rows:
        value = row["scores"].get(column)
        if value is None:
            unscored.append(row["version"])
            continue
        protocol = row["protocol"]
        if protocol and full in ("fd", "kid"):
            protocol += f"; {row['distance']}"
        entry = {key: row[key] for key in ("version", "aliases", "created", "recipe")} | {"value": value}
        groups.setdefault(protocol, []).append(entry)
    from pipelines.evaluation.metrics import higher_is_better

    for versions in groups.values():
        versions.sort(key=lambda entry: entry["value"], reverse=higher_is_better(full))
    return {
        "name": name,
        "metric": full,
        "masks": of_masks,
        "band": of_band or "all",
        "groups": [{"protocol": protocol, "versions": found} for protocol, found in groups.items()],
        "unscored": unscored,
    }


def version_rows(client: MlflowClient, name: str | None = None, also: str = "") -> list[dict[str, Any]]:
    """Versions with their scores, by name and number."""
    versions = versions_of(client, name, also)
    aliases: dict[tuple[str, str], list[str]] = {}
    for model in pages(
        client.search_registered_models, **({"filter_string": f"name = '{name}'"} if name else {})
    ):
        for alias, holder in model.aliases.items():
            aliases.setdefault((model.name, str(holder)), []).append(alias)
    older = [version for version in versions if SCORES not in version.tags]
    logged = _logged_scores(client) if older else {}
    return [
        {
            "name": version.name,
            "version": str(version.version),
            "aliases": sorted(aliases.get((version.name, str(version.version)), [])),
            "created": when(version.creation_timestamp),
            "model": version.tags.get("model"),
            "sigma": version.tags.get("sigma"),
            "size": version.tags.get("size"),
            "run_id": version.run_id,
            "recipe": version.tags.get("inpaint.recipe"),
            "commit": version.tags.get("inpaint.commit"),
            "protocol": version.tags.get(PROTOCOL),
            "distance": version.tags.get(DISTANCE),
            "scores": scores_of(version, logged),
        }
        for version in versions
    ]


def scores_of(version: ModelVersion, logged: dict[str, dict[str, float]]) -> dict[str, float]:
    text = version.tags.get(SCORES)
    found = logged.get(model_id(version), {}) if text is None else json.loads(text)
    return {key: float(value) for key, value in found.items()}


def scores_tag(metrics: Mapping[str, float]) -> str:
    """The tag that scores are kept in, to six digits."""
    return json.dumps({key: float(f"{value:.6g}") for key, value in metrics.items() if math.isfinite(value)})


def model_id(version: ModelVersion) -> str:
    """MLflow's logged model that a version was made from."""
    return str(version.source).rpartition("/")[2]


def split_column(column: str) -> tuple[str, str, str]:
    """masks/band/metric, or masks/metric (band "")."""
    masks, _, metric = column.rpartition("/")
    before, _, band = masks.rpartition("/")
    return (before, band, metric) if before and BAND.fullmatch(band) else (masks, "", metric)


def column_of(columns: Iterable[str], text: str, whose: str = "these versions") -> str:
    """The column that is meant by its name, or by `psnr`, `20-30/psnr`, `center/psnr`, `center/20-30/psnr`.

    ValueError in one line: there is none, or one for several kinds of masks.
    """
    columns = list(columns)
    if text in columns:
        return text
    masks, band, metric = split_column(text)
    if not band and BAND.fullmatch(masks):
        masks, band = "", masks
    metric = SHORT.get(metric, metric)
    parts = {column: split_column(column) for column in columns if "/" in column}
    same = [column for column, part in parts.items() if part[2] == metric]
    if not same:
        known = sorted({part[2] for part in parts.values()} | {c for c in columns if "/" not in c})
        near = difflib.get_close_matches(metric, [*known, *SHORT], n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known) or 'none'}"
        raise ValueError(f"{whose} have no score {metric!r}: {hint}")
    found = [c for c in same if parts[c][1] == band and masks in ("", parts[c][0])]
    if len(found) == 1:
        return found[0]
    kinds = sorted({parts[column][0] for column in same})
    if len(found) > 1:
        raise ValueError(f"{whose} were scored with masks {' and '.join(kinds)}: say which")
    bands = sorted({parts[column][1] or "all" for column in same})
    raise ValueError(
        f"{whose} have no {metric} for {f'masks {masks!r}' if masks else 'any masks'}"
        f"{f' in band {band!r}' if band else ''}: masks {', '.join(kinds)}; bands {', '.join(bands)}"
    )


def _logged_scores(client: MlflowClient) -> dict[str, dict[str, float]]:
    """model id -> metrics, of all logged models."""
    experiments = [experiment.experiment_id for experiment in pages(client.search_experiments)]
    found = pages(client.search_logged_models, experiment_ids=experiments)
    return {model.model_id: {metric.key: metric.value for metric in model.metrics or []} for model in found}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
