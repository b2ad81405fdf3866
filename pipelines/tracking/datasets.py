"""The photographs of a run as MLflow datasets: name, digest and source as lineage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.storage import Storage
from data_prep.uris import redact_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from data_prep.manifest import Split

CONTEXTS = {"train": "training", "val": "validation", "test": "testing"}


def log_dataset(client: MlflowClient, run_id: str, shards: Storage, split: Split | None = None) -> None:
    """Log the shards in a folder as the run's dataset, or one split of them. May be repeated.

    MLflow keeps one dataset per name and digest: a split's has the split in its name, and the digest of all shards.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    from data_prep.manifest import load_manifest
    from data_prep.records import to_json

    manifest = load_manifest(shards)
    source = redact_uri(manifest.source)
    name = Path(source.rstrip("/")).name or source
    profile = {
        "num_rows": manifest.splits[split] if split else sum(manifest.splits.values()),
        "splits": dict(manifest.splits),
        "options": to_json(manifest.options),
    }
    dataset = Dataset(
        name=f"{name}/{split}" if split else name,
        digest=manifest.digest[:36],
        source_type="inpaint shards",
        source=json.dumps({"uri": source, "shards": shards.uri}),
        profile=json.dumps(profile),
    )
    context = CONTEXTS[split] if split else "training"
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])
