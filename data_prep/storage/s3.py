"""S3 buckets as a Storage, through boto3 and the usual AWS variables (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...).

Retries and timeouts are bounded. Transient errors (no answer, 5xx, SlowDown, a truncated response) are retried for a
minute if the server has answered this process before. Until then they are retried briefly, after a probe of the
endpoint, so that a wrong URL is reported soon. INPAINT_S3_RETRY_SECONDS overrides both limits. Messages never contain
credentials.
"""

from __future__ import annotations

import functools
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
)

from data_prep.left_out import COMPANIONS, SPECIAL, UNFINISHED, LeftOut, find_companion
from data_prep.os_errors import explain_os_error
from data_prep.storage.base import (
    TEMPORARY,
    DeniedKey,
    MissingKey,
    ObjectWithEtag,
    Storage,
    StorageError,
    check_key,
)
from data_prep.storage.s3_retry import (
    HINTS,
    Result,
    check_endpoint,
    client,
    endpoint_url,
    explain_connection_error,
    http_status,
    is_endpoint_known,
    list_objects,
    with_retries,
)
from data_prep.uris import normalize_storage_uri

CLAIM_SECONDS = 1.0  # without conditional writes: a token that is still there after this time has won


def open_s3(uri: str) -> S3Storage:
    """The storage at s3://bucket/prefix. Raises UriError if there is no valid bucket name."""
    uri = normalize_storage_uri(uri)
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    return S3Storage(uri, bucket, f"{check_key(prefix)}/" if prefix else "")


@dataclass(frozen=True)
class S3Storage(Storage):
    """A bucket, or the objects under a prefix of it ('' or ending in '/')."""

    uri: str
    bucket: str
    prefix: str

    def read(self, key: str) -> bytes:
        return self._get(key)["Body"]

    def read_range(self, key: str, offset: int, size: int) -> bytes:
        data: bytes = self._get(key, Range=f"bytes={offset}-{offset + size - 1}")["Body"] if size else b""
        if len(data) != size:
            raise StorageError(
                f"{key} in {self.uri} ends before byte {offset + size}: it is truncated; rebuild it"
            )
        return data

    def read_with_etag(self, key: str) -> ObjectWithEtag:
        response = self._get(key)
        body = response["Body"]
        etag = response.get("ETag") or hashlib.sha256(body).hexdigest()  # not every server sends ETags
        return ObjectWithEtag(body, etag, response["LastModified"].timestamp(), _server_time(response))

    def write(self, key: str, data: bytes) -> None:
        self._put(key, data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if self.exists(key):
            return False
        if _supports_conditional_put(self):
            return self._conditional_put(key, data, IfNoneMatch="*")
        return self._write_with_token(key, data)

    def put_if_match(self, key: str, data: bytes, etag: str) -> bool:
        if _supports_conditional_put(self):
            return self._conditional_put(key, data, IfMatch=etag)
        unchanged = self.exists(key) and self.read_with_etag(key).etag == etag
        return unchanged and self._write_with_token(key, data)

    def upload(self, path: Path, key: str) -> None:
        self._request(
            "write", key, lambda: client().upload_file(str(path), self.bucket, self._object_key(key))
        )

    def copy(self, key: str, to: str) -> None:
        source = {"Bucket": self.bucket, "Key": self._object_key(key)}
        self._request("copy", key, lambda: client().copy(source, self.bucket, self._object_key(to)))

    def download(self, key: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            self._request(
                "read",
                key,
                lambda: client().download_file(self.bucket, self._object_key(key), str(temporary)),
            )
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def size(self, key: str) -> int | None:
        response = self._head(key)
        return None if response is None else response["ContentLength"]

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        for key, entry in self._list_objects(prefix):
            if not key.endswith("/") and not key.rpartition("/")[2].startswith(TEMPORARY):
                yield key, entry["Size"]

    def list_user_files(self, left_out: LeftOut | None = None) -> Iterator[tuple[str, int]]:
        for key, entry in self._list_user_objects(LeftOut() if left_out is None else left_out):
            yield key, entry["Size"]

    def list_fingerprints(self) -> Iterator[tuple[str, str]]:
        for key, entry in self._list_user_objects(LeftOut()):
            yield key, f"{entry['Size']}-{entry['ETag'].strip(chr(34))}"

    def _list_user_objects(self, left_out: LeftOut) -> Iterator[tuple[str, dict[str, Any]]]:
        last_companion = ""  # a companion folder counts once
        for key, entry in self._list_objects(""):
            if key.endswith("/"):
                if entry["Size"]:  # an empty object only marks a folder
                    left_out.add(SPECIAL, key, "an object with the name of a folder")
            elif companion := find_companion(key):
                if companion != last_companion:
                    left_out.add(COMPANIONS, companion)
                last_companion = companion
            elif key.rpartition("/")[2].startswith(TEMPORARY):
                left_out.add(UNFINISHED, key)
            else:
                yield key, entry

    def _list_objects(self, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """(key, entry of ListObjectsV2) of all pages."""
        folder = f"{check_key(prefix)}/" if prefix else ""
        arguments = {"Bucket": self.bucket, "Prefix": self.prefix + folder}
        while True:
            page = self._request("list", prefix or "the objects", functools.partial(list_objects, arguments))
            for entry in page.get("Contents", ()):
                yield entry["Key"][len(self.prefix) :], entry
            if not page.get("IsTruncated"):
                return
            arguments = {**arguments, "ContinuationToken": page["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        self._request(
            "delete", key, lambda: client().delete_object(Bucket=self.bucket, Key=self._object_key(key))
        )

    def subfolder(self, prefix: str) -> S3Storage:
        return S3Storage(f"{self.uri}/{check_key(prefix)}", self.bucket, f"{self.prefix}{prefix}/")

    def check_writable(self) -> None:
        probe = f"{TEMPORARY}{uuid.uuid4().hex}"
        self.write(probe, b"probe")
        self.delete(probe)

    def _object_key(self, key: str) -> str:
        return self.prefix + check_key(key)

    def _get(self, key: str, **options: Any) -> dict[str, Any]:
        def get() -> dict[str, Any]:
            response = client().get_object(Bucket=self.bucket, Key=self._object_key(key), **options)
            return {**response, "Body": response["Body"].read()}

        return self._request("read", key, get)

    def _head(self, key: str) -> dict[str, Any] | None:
        try:
            return self._request(
                "read", key, lambda: client().head_object(Bucket=self.bucket, Key=self._object_key(key))
            )
        except MissingKey:
            return None

    def _put(self, key: str, data: bytes, **options: Any) -> dict[str, Any]:
        return self._request(
            "write",
            key,
            lambda: client().put_object(Bucket=self.bucket, Key=self._object_key(key), Body=data, **options),
        )

    def _conditional_put(self, key: str, data: bytes, **condition: str) -> bool:
        """One conditional PUT. False if the server says that the condition does not hold.

        If the response to a successful PUT is lost, the retry fails on our own object: a token in its metadata tells.
        """
        token = uuid.uuid4().hex
        try:
            self._put(key, data, Metadata={"claim": token}, **condition)
        except StorageError as error:
            if isinstance(error.__cause__, ClientError) and http_status(error.__cause__) in (404, 409, 412):
                return self._owns_object(key, token, data)
            raise
        return True

    def _write_with_token(self, key: str, data: bytes) -> bool:
        """Without conditional writes: write a token, wait, and check whose token is stored."""
        token = uuid.uuid4().hex
        self._put(key, data, Metadata={"claim": token})
        time.sleep(CLAIM_SECONDS)
        return self._owns_object(key, token, data)

    def _owns_object(self, key: str, token: str, data: bytes) -> bool:
        """Whether the stored object is ours: by its token, or by its bytes if the server keeps no metadata."""
        response = self._head(key)
        if response is None:
            return False
        stored_token = response["Metadata"].get("claim")
        return stored_token == token if stored_token else self.read(key) == data

    def _request(self, operation: str, key: str, call: Callable[[], Result]) -> Result:
        """Runs a boto3 call with retries. Raises StorageError."""
        with self._wrap_errors(operation, key):
            if not is_endpoint_known():
                check_endpoint(self.bucket, self.prefix)
            return with_retries(call, self.uri)

    @contextmanager
    def _wrap_errors(self, operation: str, key: str) -> Iterator[None]:
        """Turns boto3's errors into StorageErrors that name the key and what to do."""
        start = f"cannot {operation} {'a file' if key.startswith(TEMPORARY) else key} in {self.uri}"
        try:
            yield
        except StorageError:
            raise
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in ("NoSuchKey", "404"):
                raise MissingKey(f"{key} is not in {self.uri}") from error
            denied = operation == "read" and code in ("AccessDenied", "403")
            error_type = DeniedKey if denied else StorageError
            message = str(error.response.get("Error", {}).get("Message", ""))
            answer = f"the server answered {code}" + (f": {message}" if message and message != code else "")
            raise error_type(f"{start}: {HINTS.get(code, answer)}") from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            hint = "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            raise StorageError(f"{start}: {hint}") from error
        except (ConnectionError, HTTPClientError, TimeoutError) as error:
            raise StorageError(f"{start}: {explain_connection_error(error)}") from error
        except (BotoCoreError, boto3.exceptions.Boto3Error, OSError) as error:
            cause = error.__context__ if isinstance(error.__context__, ClientError) else error
            if isinstance(cause, OSError) and cause.errno:  # of the local file, not of the object
                raise StorageError(f"{start}: on this machine {explain_os_error(cause)}") from cause
            text = " ".join(str(cause).split()) or type(cause).__name__
            if isinstance(cause, ParamValidationError) and "bucket name" in text:
                text = f"{self.bucket!r} is not a valid bucket name: use 3 to 63 lower-case letters, digits, '.' and '-'"
            if isinstance(cause, ProfileNotFound):
                text += "; correct AWS_PROFILE, or unset it"
            raise StorageError(f"{start}: {text}") from cause
        except ValueError as error:  # boto3's, for an invalid endpoint URL
            raise StorageError(
                f"{start}: {error}; set AWS_ENDPOINT_URL to a URL like http://host:9000"
            ) from error


def _supports_conditional_put(storage: S3Storage) -> bool:
    return _probe_conditional_put(endpoint_url(), storage)


@functools.lru_cache(maxsize=16)
def _probe_conditional_put(endpoint: str | None, storage: S3Storage) -> bool:
    """Whether the server rejects a PUT whose condition does not hold: some accept the header and ignore it.

    Cached per endpoint.
    """
    probe = f"{TEMPORARY}{uuid.uuid4().hex}"
    storage.write(probe, b"probe")
    try:
        return not storage._conditional_put(
            probe, b"again", IfNoneMatch="*"
        ) and not storage._conditional_put(probe, b"again", IfMatch='"00000000000000000000000000000000"')
    except StorageError:
        return False  # the server answers such requests with another error
    finally:
        storage.delete(probe)


def _server_time(response: dict[str, Any]) -> float:
    date = response["ResponseMetadata"]["HTTPHeaders"].get("date")
    return parsedate_to_datetime(date).timestamp() if date else time.time()
