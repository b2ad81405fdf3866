"""Searches versions by their tags and scores, as a pandas frame, and ranks them by a score.

The scores of a version are stored in one of its tags: one request returns all versions with their scores. For versions
that an earlier release registered they are read from MLflow's logged models.
"""

from __future__ import annotations

import difflib
import json
import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipelines.evaluation.protocol import MASKS_TAG, PHOTOGRAPHS_TAG
from pipelines.registry.client import (
    RegistryError,
    all_pages,
    find_model,
    list_versions,
    registry_client,
    utc_time,
)

if TYPE_CHECKING:
    import pandas as pd

SCORES_TAG, PROTOCOL_TAG, DISTANCE_TAG = "inpaint.scores", "inpaint.protocol", "inpaint.distance"
FEATURES_TAG = "inpaint.features"
DEFAULT_METRIC = "psnr_rgb_hole"  # decides which version becomes champion, for versions that record none
METRIC_ALIASES = {
    "psnr": "psnr_rgb_hole",
    "ssim": "ssim_gauss11_rgb",
    "l1": "l1_percent",
    "l2": "l2_percent",
    "tv": "tv_percent",
    "mae": "mae_edgeconnect_grey",
    "kd": "kid",
    "lpips": "lpips_alex",
    "p_ids": "p_ids_percent",
    "u_ids": "u_ids_percent",
}
"""Short name -> the protocol's name of the metric, as in the tables' columns."""
BAND_PATTERN = re.compile(r"\d+-\d+")
CONDITION_PATTERN = re.compile(r"\s*(\S+?)\s*(>=|<=|==|!=|>|<|=)\s*(\S+)\s*")
OPERATORS = {
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
    """The versions of one model, or of all models (`name` None), one row per version.

    Columns: name, version, aliases, created, model, sigma, size, run_id, recipe, commit, protocol, and every score as
    `masks/band/metric`, or `masks/metric` over all photographs (nan: no such score). Scores of different protocols are
    not comparable.
    where: conditions on columns, such as "center/psnr_rgb_hole > 18", "psnr >= 18" (if only one mask set was scored) or
    "sigma < 2"; all must hold. filter: MLflow's filter string, such as "tags.model = 'edge_connect'". order_by: a
    column, followed by ` desc` for descending order. ValueError: an unknown column, an invalid condition or order, or
    the registry (RegistryError).
    """
    import pandas as pd

    with registry_client(tracking_uri) as client:
        rows = version_rows(client, name, filter)
    scores = sorted({column for row in rows for column in row["scores"]})
    frame = pd.DataFrame(
        [{**{key: row[key] for key in row if key in VERSION_COLUMNS}, **row["scores"]} for row in rows],
        columns=[*VERSION_COLUMNS, *scores],
    ).astype({"version": int, "sigma": float, "size": "Int64", **dict.fromkeys(scores, float)})
    frame["created"] = pd.to_datetime(frame["created"], utc=True)
    for condition in [where] if isinstance(where, str) else where:
        match = CONDITION_PATTERN.fullmatch(condition)
        value = _parse_number(match[3]) if match else None
        if not match or value is None:
            raise ValueError(
                f"{condition!r} is not a condition: write, for example, 'center/psnr_rgb_hole > 18'"
            )
        holds = OPERATORS[match[2]](frame[find_column(frame.columns, match[1])], value)
        frame = frame[holds.fillna(False).astype(bool)]
    column, _, direction = order_by.strip().partition(" ")
    if direction.strip().lower() not in ("", "asc", "desc"):
        raise ValueError(f"order_by {order_by!r}: write a column, then `desc` or nothing")
    if column:
        descending = direction.strip().lower() == "desc"
        frame = frame.sort_values(find_column(frame.columns, column), ascending=not descending, kind="stable")
    return frame.head(len(frame) if limit is None else limit).reset_index(drop=True)


VERSION_COLUMNS = (
    *("name", "version", "aliases", "created", "model", "sigma", "size"),
    *("run_id", "recipe", "commit", "protocol"),
)


@dataclass(frozen=True)
class RankedVersion:
    """A version and its score."""

    version: str
    aliases: tuple[str, ...]
    created: str
    recipe: str | None
    value: float


@dataclass(frozen=True)
class RankedGroup:
    """The versions scored under one protocol (None: not on record), best first."""

    protocol: str | None
    versions: tuple[RankedVersion, ...]
    photographs: str | None = None
    """Short digest of the photographs; None: not on record."""
    masks: str | None = None
    """Short digest of the masks; None: not on record."""
    not_comparable: str = ""
    """Why its scores cannot be compared with those of the first group; '' for the first group."""


@dataclass(frozen=True)
class Ranking:
    """The versions of a model ranked by a score. Scores of different groups are not comparable."""

    name: str
    metric: str
    masks: str
    band: str
    """Hole-area band in percent of the image, such as "20-30"; "all": all photographs."""
    groups: tuple[RankedGroup, ...]
    """The newest version's group first."""
    unscored: tuple[str, ...]
    """Versions without that score."""


def best(
    name: str,
    metric: str = "psnr",
    *,
    band: str | None = None,
    masks: str | None = None,
    tracking_uri: str | None = None,
) -> Ranking:
    """The versions of a model ranked by a score, separately for each protocol.

    band: hole area in percent of the image, such as "20-30"; None: all photographs. ValueError: no such model, or no
    such metric, band or masks among the versions' scores.
    """
    with registry_client(tracking_uri) as client:
        rows = version_rows(client, name)[::-1]
        if not rows:
            find_model(client, name)  # raises if there is no such model
            raise RegistryError(f"{name} has no versions")
    from pipelines.evaluation.metrics import DISTANCE_METRICS, FEATURE_NETWORKS, higher_is_better

    query = "/".join(part for part in (masks, band, metric) if part)
    columns = {column for row in rows for column in row["scores"]}
    column = find_column(columns, query, f"versions of {name}")
    mask_set, score_band, metric_name = split_column(column)
    groups: dict[str | None, list[RankedVersion]] = {}
    first_rows: dict[str | None, dict[str, Any]] = {}
    unscored = []
    for row in rows:
        value = row["scores"].get(column)
        if value is None:
            unscored.append(row["version"])
            continue
        protocol = row["protocol"]
        if protocol and metric_name in DISTANCE_METRICS:
            protocol += f"; {row['distance']}"
        elif protocol and (network := FEATURE_NETWORKS.get(metric_name)):
            protocol += f"; {network} {json.loads(row['features'] or '{}').get(network, '')[:12]}"
        entry = RankedVersion(row["version"], tuple(row["aliases"]), row["created"], row["recipe"], value)
        groups.setdefault(protocol, []).append(entry)
        first_rows.setdefault(protocol, row)

    for versions in groups.values():
        versions.sort(key=lambda entry: entry.value, reverse=higher_is_better(metric_name))
    first = next(iter(first_rows.values()), None)
    ranked = tuple(
        RankedGroup(
            protocol,
            tuple(versions),
            first_rows[protocol]["digests"][0],
            first_rows[protocol]["digests"][1],
            ""
            if first_rows[protocol] is first or first is None
            else _why_not_comparable(first, first_rows[protocol]),
        )
        for protocol, versions in groups.items()
    )
    return Ranking(name, metric_name, mask_set, score_band or "all", ranked, tuple(unscored))


def _why_not_comparable(first: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Why the scores of two versions with other protocols cannot be compared."""
    reasons, unknown = [], False
    for name, digest, other in zip(("photographs", "masks"), first["digests"], row["digests"], strict=True):
        unknown |= digest is None or other is None
        if digest and other and digest != other:
            reasons.append(f"other {name} ({digest} and {other})")
    if reasons:
        return ", ".join(reasons)
    if first["protocol"] is None or row["protocol"] is None:
        return "the protocol of one of them is not on record"
    if unknown:
        return "other photographs, masks, seed or definitions of metrics (digests are not on record)"
    if first["protocol"] == row["protocol"]:
        return "other features of the distance, or other weights of the metric's network"
    return "other sizes, seed or definitions of metrics, with the same photographs and masks"


def version_rows(
    client: MlflowClient, name: str | None = None, filter_string: str = ""
) -> list[dict[str, Any]]:
    """The versions with their scores, one dict per version, by name and number."""
    versions = list_versions(client, name, filter_string)
    aliases: dict[tuple[str, str], list[str]] = {}
    for model in all_pages(
        client.search_registered_models, **({"filter_string": f"name = '{name}'"} if name else {})
    ):
        for alias, number in model.aliases.items():
            aliases.setdefault((model.name, str(number)), []).append(alias)
    without_tag = [version for version in versions if SCORES_TAG not in version.tags]
    logged = logged_scores(client) if without_tag else {}
    return [
        {
            "name": version.name,
            "version": str(version.version),
            "aliases": sorted(aliases.get((version.name, str(version.version)), [])),
            "created": utc_time(version.creation_timestamp),
            "model": version.tags.get("model"),
            "sigma": version.tags.get("sigma"),
            "size": version.tags.get("size"),
            "run_id": version.run_id,
            "recipe": version.tags.get("inpaint.recipe"),
            "commit": version.tags.get("inpaint.commit"),
            "protocol": version.tags.get(PROTOCOL_TAG),
            "distance": version.tags.get(DISTANCE_TAG),
            "digests": (version.tags.get(PHOTOGRAPHS_TAG), version.tags.get(MASKS_TAG)),
            "features": version.tags.get(FEATURES_TAG),
            "scores": version_scores(version, logged),
        }
        for version in versions
    ]


def version_scores(version: ModelVersion, logged_scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """A version's scores from its tag, else from `logged_scores` (logged model's id -> scores)."""
    text = version.tags.get(SCORES_TAG)
    scores = logged_scores.get(logged_model_id(version), {}) if text is None else json.loads(text)
    return {key: float(value) for key, value in scores.items()}


def scores_json(metrics: Mapping[str, float]) -> str:
    """The value of the tag that stores the finite scores, rounded to six digits."""
    return json.dumps({key: float(f"{value:.6g}") for key, value in metrics.items() if math.isfinite(value)})


def logged_model_id(version: ModelVersion) -> str:
    """The id of the MLflow logged model that the version was created from."""
    return str(version.source).rpartition("/")[2]


def split_column(column: str) -> tuple[str, str, str]:
    """(masks, band, metric) of masks/band/metric, or of masks/metric with band ""."""
    prefix, _, metric = column.rpartition("/")
    masks, _, band = prefix.rpartition("/")
    return (masks, band, metric) if masks and BAND_PATTERN.fullmatch(band) else (prefix, "", metric)


def find_column(columns: Iterable[str], text: str, subject: str = "these versions") -> str:
    """The column named by its full name, or by `psnr`, `20-30/psnr`, `center/psnr` or `center/20-30/psnr`.

    ValueError: no column matches, or the columns of several mask sets do. `subject` starts the message.
    """
    columns = list(columns)
    if text in columns:
        return text
    masks, band, metric = split_column(text)
    if not band and BAND_PATTERN.fullmatch(masks):
        masks, band = "", masks
    metric = METRIC_ALIASES.get(metric, metric)
    parts = {column: split_column(column) for column in columns if "/" in column}
    with_metric = [column for column, part in parts.items() if part[2] == metric]
    if not with_metric:
        known = sorted({part[2] for part in parts.values()} | {c for c in columns if "/" not in c})
        near = difflib.get_close_matches(metric, [*known, *METRIC_ALIASES], n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known) or 'none'}"
        raise ValueError(f"{subject} have no score {metric!r}: {hint}")
    matches = [c for c in with_metric if parts[c][1] == band and masks in ("", parts[c][0])]
    if len(matches) == 1:
        return matches[0]
    mask_sets = sorted({parts[column][0] for column in with_metric})
    if len(matches) > 1:
        raise ValueError(f"{subject} were scored with masks {' and '.join(mask_sets)}: say which")
    bands = sorted({parts[column][1] or "all" for column in with_metric})
    raise ValueError(
        f"{subject} have no {metric} for {f'masks {masks!r}' if masks else 'any masks'}"
        f"{f' in band {band!r}' if band else ''}: masks {', '.join(mask_sets)}; bands {', '.join(bands)}"
    )


def logged_scores(client: MlflowClient) -> dict[str, dict[str, float]]:
    """Logged model's id -> metrics, for the logged models of all experiments."""
    experiments = [experiment.experiment_id for experiment in all_pages(client.search_experiments)]
    models = all_pages(client.search_logged_models, experiment_ids=experiments)
    return {model.model_id: {metric.key: metric.value for metric in model.metrics or []} for model in models}


def _parse_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
