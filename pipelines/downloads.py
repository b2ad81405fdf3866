"""Downloads the files that a recipe names by address, the weights of feature stacks, into this machine's cache."""

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

from data_prep.network import bypass_proxy_for_loopback, describe_proxy
from data_prep.os_errors import explain_os_error
from data_prep.storage import StorageError, open_storage
from data_prep.uris import is_s3_uri, path_from_file_url
from pipelines.errors import error_text

TIMEOUT_SECONDS = 60  # without a response


def download(address: str, sha256: str | None = None) -> str:
    """The local path of the file at a path, file://, s3:// or https:// address. Downloads are kept in `cache_folder`.

    Raises ValueError in one line: another kind of address, no sha256 for a download over http(s), or a wrong one;
    FileNotFoundError: the file is unavailable.
    """
    scheme = urlsplit(address).scheme
    if scheme in ("", "file"):
        return str(path_from_file_url(address, "weights")) if scheme else address
    if scheme not in ("s3", "https", "http"):
        raise ValueError(f"weights {address}: give a path, file://, s3:// or https:// address")
    if scheme != "s3" and sha256 is None:
        raise ValueError(
            f"weights {address}: a download needs a sha256 to be checked by; give it beside weights"
        )
    target = _cache_path(address, sha256)
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            path = Path(folder) / "weights"
            _download_to(address, path)
            actual = file_sha256(path)
            if sha256 is not None and actual != sha256.lower():
                raise ValueError(
                    f"weights {address} have the sha256 {actual}, not {sha256}: another file, or a damaged one"
                )
            os.replace(path, target)
    return str(target)


def cache_folder() -> Path:
    """The folder for files that commands keep on this machine: INPAINT_CACHE, or ~/.cache/inpaint. It may not exist."""
    return Path(os.environ.get("INPAINT_CACHE") or os.path.expanduser("~/.cache/inpaint"))


def is_local(address: str, sha256: str | None = None) -> bool:
    """Whether `download` would return without downloading."""
    return urlsplit(address).scheme in ("", "file") or _cache_path(address, sha256).is_file()


def _cache_path(address: str, sha256: str | None) -> Path:
    """The path of a download in the cache."""
    name = hashlib.sha256(f"{address} {sha256}".encode()).hexdigest()[:16]
    return cache_folder() / f"{name}-{Path(address).name}"


def with_local_weights(options: Mapping[str, Any]) -> dict[str, Any]:
    """A model's options with the weights of its feature stack replaced by their local path; downloads them."""
    features = options.get("features")
    if not isinstance(features, Mapping) or not features.get("weights"):
        return dict(options)
    weights = download(features["weights"], features.get("sha256"))
    return {**options, "features": {**features, "weights": weights}}


def _download_to(address: str, path: Path) -> None:
    try:
        if is_s3_uri(address):
            folder, _, name = address.rpartition("/")
            open_storage(folder).download(name, path)
        else:
            bypass_proxy_for_loopback(address)
            with (
                urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as response,
                open(path, "wb") as file,
            ):
                shutil.copyfileobj(response, file)
    except (StorageError, urllib.error.URLError, OSError) as error:
        is_local_error = isinstance(error, OSError) and error.filename  # leave out the temporary file's name
        reason = explain_os_error(error) if is_local_error else error_text(error)  # type: ignore[arg-type]
        raise FileNotFoundError(
            f"weights {address} cannot be downloaded{describe_proxy(address)}: {reason}"
        ) from None


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
