"""What an evaluation found: scores per photograph (paired over the methods), their means, distances and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.evaluation.figures import DRAWINGS, Grid, decode_png
from pipelines.evaluation.metrics import BANDS, mean_of

Values = dict[str, dict[str, dict[str, list[float | None]]]]


@dataclass(frozen=True)
class Row:
    """The means of one method over the photographs of one band ("all": every one) of one kind of masks.

    A row in which a method failed on any photograph has no means: its mean would be over other photographs than the
    other methods'. `exact` counts, per metric, the infinite values that a mean leaves out.
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
class Evaluation:
    """Scores of several methods on the same photographs and masks, under one protocol."""

    methods: tuple[str, ...]
    photos: tuple[str, ...]
    bands: dict[str, list[str]]
    """masks -> the hole-area band of every photograph's mask."""
    values: Values
    """masks -> method -> metric -> a value a photograph (None: it does not exist there)."""
    failures: dict[str, dict[str, dict[int, str]]]
    """masks -> method -> index of a photograph -> why the method could not complete it."""
    distances: dict[str, dict[str, dict[str, Any]]]
    """masks -> method -> {"name", "n", "d", "fd", "kid", "kid_std"}, or "reason" in place of the figures."""
    truth: dict[str, float]
    """Scores of the photographs themselves: tv_percent."""
    protocol: dict[str, Any]
    """Everything needed to repeat it; two evaluations with equal protocols are comparable."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """{"photo", "masks", "band", "pictures": {column: key in `pictures`}}."""
    pictures: dict[str, bytes] = field(default_factory=dict)
    """key -> PNG bytes."""

    @property
    def rows(self) -> list[Row]:
        return list(self._rows())

    def row(self, method: str, masks: str | None = None, band: str = "all") -> Row:
        """One row; masks None = the first kind. ValueError naming what there is."""
        masks = next(iter(self.bands)) if masks is None else masks
        for row in self._rows():
            if (row.method, row.masks, row.band) == (method, masks, band):
                return row
        raise ValueError(
            f"no scores of {method!r} for masks {masks!r}, band {band!r}: "
            f"methods {', '.join(self.methods)}; masks {', '.join(self.bands)}"
        )

    def score(self, method: str, metric: str, masks: str | None = None, band: str = "all") -> float:
        """A method's mean; ValueError in one line when it has none."""
        row = self.row(method, masks, band)
        if metric not in row.metrics:
            known = ", ".join(row.metrics)
            raise ValueError(f"{method} has no {metric}: {row.reason or f'there are {known}'}")
        return row.metrics[metric]

    def flat(self, method: str) -> dict[str, float]:
        """A method's finite means and distances as `masks/band/metric` (without `all`), for a run's or version's record."""
        found = {}
        for row in self._rows():
            if row.method == method:
                prefix = row.masks if row.band == "all" else f"{row.masks}/{row.band}"
                found.update({f"{prefix}/{name}": value for name, value in row.metrics.items()})
        for masks, distances in self.distances.items():
            entry = distances.get(method, {})
            found.update({f"{masks}/{name}": entry[name] for name in ("fd", "kid") if name in entry})
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def grids(self) -> list[Grid]:
        """The sample pictures, a grid for each kind of masks."""
        grids = []
        for masks in self.bands:
            samples = [sample["pictures"] for sample in self.samples if sample["masks"] == masks]
            if samples:
                drawings = sorted(
                    {name for pictures in samples for name in pictures if name.startswith(DRAWINGS)}
                )
                columns = ("ground truth", "masked", *drawings, *self.methods)
                rows = tuple(
                    tuple(decode_png(self.pictures[p[name]]) if name in p else None for name in columns)
                    for p in samples
                )
                grids.append(Grid(masks_title(masks), columns, rows))
        return grids

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with the rows for readers; without the pictures' bytes."""
        kept = {name: value for name, value in vars(self).items() if name != "pictures"}
        return _json({**kept, "rows": [asdict(row) for row in self._rows()]})

    @classmethod
    def from_dict(cls, data: dict[str, Any], pictures: dict[str, bytes] | None = None) -> Evaluation:
        kept = {name: value for name, value in data.items() if name != "rows"}
        kept["methods"], kept["photos"] = tuple(kept["methods"]), tuple(kept["photos"])
        kept["values"] = {
            masks: {
                method: {
                    name: [None if v is None else float(v) for v in column]
                    for name, column in metrics.items()
                }
                for method, metrics in methods.items()
            }
            for masks, methods in data["values"].items()
        }
        kept["failures"] = {
            masks: {method: {int(i): why for i, why in found.items()} for method, found in methods.items()}
            for masks, methods in data["failures"].items()
        }
        return cls(**kept, pictures=pictures or {})

    def save(self, write: Callable[[str, bytes], Any]) -> list[str]:
        """Write samples/*.png, then evaluation.json, with write(key, bytes) (a storage's); returns the keys."""
        for key, data in self.pictures.items():
            write(key, data)
        write("evaluation.json", json.dumps(self.to_dict(), allow_nan=False).encode())
        return [*self.pictures, "evaluation.json"]

    @classmethod
    def load(cls, read: Callable[[str], bytes]) -> Evaluation:
        """What `save` wrote, with read(key) -> bytes."""
        data = json.loads(read("evaluation.json"))
        keys = [key for sample in data["samples"] for key in sample["pictures"].values()]
        return cls.from_dict(data, {key: read(key) for key in keys})

    def _rows(self) -> Iterator[Row]:
        for masks, bands in self.bands.items():
            present = [band for band in BANDS if band in bands]
            for method in self.methods:
                for band in ["all", *present] if len(present) > 1 else ["all"]:
                    chosen = [i for i, b in enumerate(bands) if band in ("all", b)]
                    yield self._summary(method, masks, band, chosen)

    def _summary(self, method: str, masks: str, band: str, chosen: list[int]) -> Row:
        failures = self.failures.get(masks, {}).get(method, {})
        failed = [i for i in chosen if i in failures]
        if failed:
            reason = failures[failed[0]]
            return Row(method, masks, band, len(chosen), failed=len(failed), reason=reason)
        metrics, exact = {}, {}
        for name, column in self.values[masks][method].items():
            values = [value for i in chosen if (value := column[i]) is not None]
            if len(values) == len(chosen):
                metrics[name], infinite = mean_of(values)
                if infinite:
                    exact[name] = infinite
        return Row(method, masks, band, len(chosen), metrics, exact)


def masks_title(masks: str) -> str:
    """`center masks`; a folder may be called masks already."""
    return masks if masks.endswith("masks") else f"{masks} masks"


def _json(value: Any) -> Any:
    """JSON has no infinity: it is kept as the string "inf", which float() reads."""
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
