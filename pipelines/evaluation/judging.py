"""Whether a version is better than the champion, on the same photographs and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.shards import load_manifest
from data_prep.storage import StorageError, open_storage
from pipelines.evaluation.comparing import Difference, paired, whole
from pipelines.evaluation.completers import LoadedCompleter
from pipelines.evaluation.evaluate import Completer, EvaluationSpec, evaluate
from pipelines.evaluation.scores import Evaluation
from pipelines.evaluation.scoring import read_photographs, score, usual_size
from pipelines.filling.loading import LoadedModel, load_model

__all__ = ["Photographs", "against_champion", "choose", "compare", "load_model"]

METRIC = "psnr_rgb_hole"  # of versions that do not say by which they are judged
COUNT = 200  # photographs at most


@dataclass(frozen=True)
class Photographs:
    """What two versions are compared on; `note` says why it is not what the version was scored on."""

    images: str
    """A folder of photographs or of shards, or `bundled`."""
    masks: tuple[str, ...] = ("center",)
    seed: int = 0
    split: str = "test"
    size: int | None = None
    count: int = COUNT
    note: str = ""

    def __str__(self) -> str:
        return f"{self.images}, {' and '.join(self.masks)} masks"


def choose(metadata: Mapping[str, Any], images: str | None, masks: Sequence[str]) -> Photographs:
    """The photographs that are named, else those that a version was scored on, if they are still there."""
    protocol = metadata.get("protocol", {})
    kinds = tuple(masks) or tuple(protocol.get("masks", ())) or Photographs.masks
    seed = int(protocol.get("seed", 0))
    if images:
        return Photographs(images, kinds, seed)
    own = metadata.get("scored_on", {})
    try:
        if own and load_manifest(open_storage(own["shards"]))["digest"] == own["digest"]:
            return Photographs(own["shards"], kinds, seed, own["split"], own["size"], own["count"])
    except (StorageError, ValueError, OSError):
        pass
    missing = (
        f"{own['shards']} is not reachable from here" if own else "it does not say what it was scored on"
    )
    return Photographs("bundled", kinds, seed, note=f"compared on bundled photographs: {missing}")


def compare(old: LoadedModel, new: LoadedModel, photographs: Photographs, quiet: bool = True) -> Difference:
    """New minus old by the metric that the new one is judged by. ValueError in one line: it cannot be had."""
    size = photographs.size or usual_size((old, new))
    photos = read_photographs(photographs.images, size, photographs.count, photographs.split)
    spec = EvaluationSpec(photographs.masks, photographs.seed, distance=None, samples=1)
    methods = {"champion": LoadedCompleter(old), "candidate": LoadedCompleter(new)}
    found = score(methods, photos, spec, quiet)
    metric = str(new.metadata.get("metric", METRIC))
    return difference(found, "champion", found, "candidate", metric)


def against_champion(
    champion: LoadedModel,
    scores: Evaluation,
    label: str,
    photos: Sequence[tuple[str, np.ndarray]],
    spec: EvaluationSpec,
    metric: str,
) -> Difference:
    """A method of an evaluation minus the champion, which is scored again on its photographs. ValueError as `compare`."""
    method: dict[str, Completer] = {"champion": LoadedCompleter(champion)}
    return difference(evaluate(method, photos, spec), "champion", scores, label, metric)


def difference(a: Evaluation, old: str, b: Evaluation, new: str, metric: str) -> Difference:
    """New minus old over all photographs of the first kind of masks."""
    true_edges = {old in a.protocol["true_edges"], new in b.protocol["true_edges"]}
    if len(true_edges) > 1:
        raise ValueError(
            "one of the two paints over true edges: give studies a name of their own, register_as"
        )
    masks = next(iter(b.bands))
    first, second = whole(a, old, masks), whole(b, new, masks)
    if metric not in first or metric not in second:
        raise ValueError(f"there is no {metric} of both")
    found = paired(first[metric], second[metric], metric, masks)
    if found is None:
        raise ValueError(f"no photograph has a finite {metric} of both")
    return found
