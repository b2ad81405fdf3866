"""The result of an evaluation: scores per photograph (paired over the methods), means, distances and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from data_prep.masks import HOLE_AREA_BANDS
from data_prep.records import from_json
from pipelines.evaluation.metrics import SET_METRICS, finite_mean
from pipelines.evaluation.protocol import Protocol
from pipelines.plots.images import DRAWING_PREFIXES, Grid, decode_png

ScoreTable = dict[str, dict[str, dict[str, list[float | None]]]]


@dataclass(frozen=True)
class MethodSummary:
    """Mean scores of one method over the photographs of one hole-area band ("all": all bands) of one mask set.

    If the method failed on a photograph there are no means: they would be over other photographs than those of the
    other methods. `exact` counts per metric the infinite values, which the mean leaves out.
    """

    method: str
    masks: str
    band: str
    n: int
    metrics: dict[str, float] = field(default_factory=dict)
    exact: dict[str, int] = field(default_factory=dict)
    failed: int = 0
    reason: str = ""


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of several methods on the same photographs and masks, under one protocol."""

    methods: tuple[str, ...]
    photos: tuple[str, ...]
    bands: dict[str, list[str]]
    """mask set -> hole-area band of each photograph's mask."""
    values: ScoreTable
    """mask set -> method -> metric -> score per photograph (None: the metric does not exist there)."""
    failures: dict[str, dict[str, dict[int, str]]]
    """mask set -> method -> index of a photograph -> why the method could not complete it."""
    distances: dict[str, dict[str, dict[str, Any]]]
    """mask set -> method -> {"name", "n", "d", "fd", "kid", "kid_std"}, or "reason" in place of the numbers."""
    truth: dict[str, float]
    """Scores of the ground truth itself: tv_percent."""
    protocol: Protocol
    """All that is needed to repeat the evaluation; evaluations with equal protocols are comparable."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """{"photo", "masks", "band", "pictures": {column: key in `pictures`}}."""
    pictures: dict[str, bytes] = field(default_factory=dict)
    """key -> PNG bytes."""
    set_scores: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """mask set -> method -> the scores of `inception_scores`; {}: without weights for Inception."""

    @property
    def rows(self) -> list[MethodSummary]:
        """One row per mask set, method and band."""
        return list(self._iter_rows())

    def row(self, method: str, masks: str | None = None, band: str = "all") -> MethodSummary:
        """One row; masks None: the first mask set. Raises ValueError that names the methods and mask sets."""
        masks = next(iter(self.bands)) if masks is None else masks
        for row in self._iter_rows():
            if (row.method, row.masks, row.band) == (method, masks, band):
                return row
        raise ValueError(
            f"no scores of {method!r} for masks {masks!r}, band {band!r}: "
            f"methods {', '.join(self.methods)}; masks {', '.join(self.bands)}"
        )

    def score(self, method: str, metric: str, masks: str | None = None, band: str = "all") -> float:
        """A method's mean score. Raises ValueError, one line, if there is none."""
        row = self.row(method, masks, band)
        if metric not in row.metrics:
            available = ", ".join(row.metrics)
            raise ValueError(f"{method} has no {metric}: {row.reason or f'there are {available}'}")
        return row.metrics[metric]

    def set_metrics(self, method: str, masks: str) -> dict[str, float]:
        """A method's scores over the whole set of photographs: `fd`, `kid`, `fid` and so on, as far as there are."""
        distances = self.distances.get(masks, {}).get(method, {})
        scores = self.set_scores.get(masks, {}).get(method, {})
        return {name: entry[name] for entry in (distances, scores) for name in SET_METRICS if name in entry}

    def to_metrics(self, method: str) -> dict[str, float]:
        """A method's finite means and distances as `masks/band/metric` (without `all`), to log in MLflow."""
        metrics = {}
        for row in self._iter_rows():
            if row.method == method:
                prefix = row.masks if row.band == "all" else f"{row.masks}/{row.band}"
                metrics.update({f"{prefix}/{name}": value for name, value in row.metrics.items()})
        for masks in self.bands:
            metrics.update({f"{masks}/{name}": x for name, x in self.set_metrics(method, masks).items()})
        return {name: value for name, value in metrics.items() if math.isfinite(value)}

    def sample_grids(self) -> list[Grid]:
        """The sample pictures, one grid per mask set."""
        grids = []
        for masks in self.bands:
            samples = [sample["pictures"] for sample in self.samples if sample["masks"] == masks]
            if samples:
                drawings = sorted(
                    {name for pictures in samples for name in pictures if name.startswith(DRAWING_PREFIXES)}
                )
                columns = ("ground truth", "masked", *drawings, *self.methods)
                rows = tuple(
                    tuple(decode_png(self.pictures[p[name]]) if name in p else None for name in columns)
                    for p in samples
                )
                grids.append(Grid(masks_title(masks), columns, rows))
        return grids

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the rows for readers, without the bytes of the pictures."""
        fields = {name: value for name, value in vars(self).items() if name != "pictures"}
        if not self.set_scores:
            del fields["set_scores"]
        fields["protocol"] = self.protocol.to_dict()
        return _to_json_value({**fields, "rows": [asdict(row) for row in self._iter_rows()]})

    @classmethod
    def from_dict(cls, data: dict[str, Any], pictures: dict[str, bytes] | None = None) -> EvaluationResult:
        """From the output of `to_dict`, and the pictures' bytes."""
        fields = {name: value for name, value in data.items() if name != "rows"}
        fields["protocol"] = from_json(Protocol, data["protocol"], "evaluation.json, protocol")
        fields["methods"], fields["photos"] = tuple(fields["methods"]), tuple(fields["photos"])
        fields["values"] = {
            masks: {
                method: {
                    name: [None if v is None else float(v) for v in column]
                    for name, column in metrics.items()
                }
                for method, metrics in methods.items()
            }
            for masks, methods in data["values"].items()
        }
        fields["failures"] = {
            masks: {
                method: {int(i): reason for i, reason in reasons.items()}
                for method, reasons in methods.items()
            }
            for masks, methods in data["failures"].items()
        }
        return cls(**fields, pictures=pictures or {})

    def save(self, write: Callable[[str, bytes], Any]) -> list[str]:
        """Write samples/*.png, then evaluation.json, with write(key, bytes) (a storage's); returns the keys."""
        for key, data in self.pictures.items():
            write(key, data)
        write("evaluation.json", json.dumps(self.to_dict(), allow_nan=False).encode())
        return [*self.pictures, "evaluation.json"]

    @classmethod
    def load(cls, read: Callable[[str], bytes]) -> EvaluationResult:
        """Load the files of `save` with read(key) -> bytes."""
        data = json.loads(read("evaluation.json"))
        keys = [key for sample in data["samples"] for key in sample["pictures"].values()]
        return cls.from_dict(data, {key: read(key) for key in keys})

    def _iter_rows(self) -> Iterator[MethodSummary]:
        for masks, bands in self.bands.items():
            present = [band for band in HOLE_AREA_BANDS if band in bands]
            for method in self.methods:
                for band in ["all", *present] if len(present) > 1 else ["all"]:
                    indices = [i for i, photo_band in enumerate(bands) if band in ("all", photo_band)]
                    yield self._summarize(method, masks, band, indices)

    def _summarize(self, method: str, masks: str, band: str, indices: list[int]) -> MethodSummary:
        failures = self.failures.get(masks, {}).get(method, {})
        failed = [i for i in indices if i in failures]
        if failed:
            reason = failures[failed[0]]
            return MethodSummary(method, masks, band, len(indices), failed=len(failed), reason=reason)
        metrics, exact = {}, {}
        for name, column in self.values[masks][method].items():
            values = [value for i in indices if (value := column[i]) is not None]
            if len(values) == len(indices):
                metrics[name], infinite = finite_mean(values)
                if infinite:
                    exact[name] = infinite
        return MethodSummary(method, masks, band, len(indices), metrics, exact)


def masks_title(masks: str) -> str:
    """`center masks`; a folder may be called masks already."""
    return masks if masks.endswith("masks") else f"{masks} masks"


def _to_json_value(value: Any) -> Any:
    """JSON has no infinity: it is stored as the string "inf", which float() reads."""
    if isinstance(value, dict):
        return {str(key): _to_json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
