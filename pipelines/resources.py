"""Files that a recipe names by address, brought to this machine: the weights of feature stacks."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data_prep.storage import StorageError, open_storage

TIMEOUT = 60  # seconds without an answer


def local_path(address: str, sha256: str | None = None) -> str:
    """The local path of a path, file://, s3:// or https:// address; what is fetched is kept in the cache folder
    (INPAINT_CACHE, or ~/.cache/inpaint) under its address and sum.

    Raises ValueError in one line: an address of another kind, a download without a sum to check it by, or one
    whose sum differs; FileNotFoundError when it cannot be had.
    """
    kind = urlsplit(address).scheme
    if kind in ("", "file"):
        return urlsplit(address).path if kind else address
    if kind not in ("s3", "https", "http"):
        raise ValueError(f"weights {address}: give a path, file://, s3:// or https:// address")
    if kind != "s3" and sha256 is None:
        raise ValueError(
            f"weights {address}: what is downloaded must be known by its sha256; give it beside weights"
        )
    name = hashlib.sha256(f"{address} {sha256}".encode()).hexdigest()[:16]
    target = (
        Path(os.environ.get("INPAINT_CACHE") or Path.home() / ".cache" / "inpaint")
        / f"{name}-{Path(address).name}"
    )
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            fetched = Path(folder) / "weights"
            _fetch(address, fetched)
            found = file_sha256(fetched)
            if sha256 is not None and found != sha256.lower():
                raise ValueError(
                    f"weights {address} have the sha256 {found}, not {sha256}: another file, or a damaged one"
                )
            os.replace(fetched, target)
    return str(target)


def local_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """A model's options with the weights of its feature stack on this machine."""
    features = options.get("features")
    if not isinstance(features, Mapping) or not features.get("weights"):
        return dict(options)
    weights = local_path(features["weights"], features.get("sha256"))
    return {**options, "features": {**features, "weights": weights}}


def _fetch(address: str, path: Path) -> None:
    try:
        if address.startswith("s3://"):
            folder, _, name = address.rpartition("/")
            open_storage(folder).download(name, path)
        else:
            with urllib.request.urlopen(address, timeout=TIMEOUT) as answer, open(path, "wb") as file:
                shutil.copyfileobj(answer, file)
    except (StorageError, urllib.error.URLError, OSError) as error:
        raise FileNotFoundError(
            f"weights {address} cannot be fetched: {' '.join(str(error).split())}"
        ) from None


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
