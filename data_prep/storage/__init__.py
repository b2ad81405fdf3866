"""Local folders and S3 buckets behind one interface, opened by `open_storage`.

Keys are relative POSIX paths. Writes are atomic.
"""

from __future__ import annotations

from pathlib import Path

from data_prep.storage.base import (
    TEMPORARY,
    BadKey,
    DeniedKey,
    MissingKey,
    ObjectWithEtag,
    Storage,
    StorageError,
    check_key,
)
from data_prep.storage.local import LocalStorage
from data_prep.uris import is_s3_uri, normalize_storage_uri

__all__ = [
    "TEMPORARY",
    "BadKey",
    "DeniedKey",
    "MissingKey",
    "ObjectWithEtag",
    "Storage",
    "StorageError",
    "check_key",
    "open_storage",
]


def open_storage(uri: str | Path) -> Storage:
    """The storage at a folder or s3://bucket/prefix. Creates nothing and sends no request before the first use.

    Raises UriError (a ValueError) for anything else, in one line with what was probably meant.
    """
    uri = str(uri.expanduser().absolute()) if isinstance(uri, Path) else normalize_storage_uri(uri)
    if is_s3_uri(uri):
        from data_prep.storage.s3 import open_s3  # imported here: boto3 takes half a second

        return open_s3(uri)
    return LocalStorage(uri)
