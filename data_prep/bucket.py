"""S3 buckets as a Storage, by boto3 and the usual AWS variables (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...).

Retries and timeouts are bounded: what passes (no answer, 5xx, SlowDown, a cut answer) is tried for a minute once the
server has answered this process, and briefly before, so that a wrong address is told at once. INPAINT_S3_PATIENCE, in
seconds, overrides both. No credential ever enters a message.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)

from data_prep.storage import TEMPORARY, DeniedKey, MissingKey, Storage, StorageError, Tagged, check_key

PATIENCE, BRIEF = 60.0, 5.0  # seconds for which a server is tried that has answered before, or never
SILENCE = 60.0, 8.0  # seconds without a byte after which such a server's answer is given up
PAUSE = 0.5, 8.0  # seconds between two tries at first and at most
SETTLE = 1.0  # seconds: how long a claim must stand on a server without conditional writes

_MENDS = {
    "NoSuchBucket": "there is no such bucket; create it or correct the uri",
    "AccessDenied": "access is denied; check the credentials' rights on this bucket",
    "403": "access is denied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's rights",
    "InvalidAccessKeyId": "the server does not know this access key; check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the session token has expired; fetch new credentials",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
}
_PASSING = {
    "SlowDown",
    "InternalError",
    "ServiceUnavailable",
    "RequestTimeout",
    "Throttling",
    "ThrottlingException",
}
_NO_ANSWER = (ConnectionError, HTTPClientError, IncompleteReadError, boto3.exceptions.RetriesExceededError)
_Result = TypeVar("_Result")


def open_bucket(uri: str) -> Bucket:
    """The storage at s3://bucket/prefix."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise ValueError(f"storage {uri!r} names no bucket: write s3://bucket/prefix")
    prefix = prefix.strip("/")
    return Bucket(f"s3://{bucket}/{prefix}".rstrip("/"), bucket, f"{check_key(prefix)}/" if prefix else "")


@dataclass(frozen=True)
class Bucket(Storage):
    """A bucket, or the part of it under a prefix ('' or ending in '/')."""

    uri: str
    bucket: str
    prefix: str

    def read(self, key: str) -> bytes:
        return self._get(key)["Body"]

    def read_range(self, key: str, offset: int, size: int) -> bytes:
        data: bytes = self._get(key, Range=f"bytes={offset}-{offset + size - 1}")["Body"] if size else b""
        if len(data) != size:
            raise StorageError(
                f"{key} in {self.uri} ends before byte {offset + size}: it was cut; make it again"
            )
        return data

    def read_tagged(self, key: str) -> Tagged:
        answer = self._get(key)
        body = answer["Body"]
        etag = answer.get("ETag") or hashlib.sha256(body).hexdigest()  # not every server makes tags
        return Tagged(body, etag, answer["LastModified"].timestamp(), _server_time(answer))

    def write(self, key: str, data: bytes) -> None:
        self._put(key, data)

    def create(self, key: str, data: bytes) -> bool:
        if self.exists(key):
            return False
        if _obeys_conditions(self):
            return self._put_when(key, data, IfNoneMatch="*")
        return self._claim(key, data)

    def replace_if(self, key: str, data: bytes, etag: str) -> bool:
        if _obeys_conditions(self):
            return self._put_when(key, data, IfMatch=etag)
        return self.exists(key) and self.read_tagged(key).etag == etag and self._claim(key, data)

    def upload(self, path: Path, key: str) -> None:
        self._do("write", key, lambda: _client().upload_file(str(path), self.bucket, self._full(key)))

    def copy(self, key: str, to: str) -> None:
        source = {"Bucket": self.bucket, "Key": self._full(key)}
        self._do("copy", key, lambda: _client().copy(source, self.bucket, self._full(to)))

    def download(self, key: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            self._do(
                "read", key, lambda: _client().download_file(self.bucket, self._full(key), str(temporary))
            )
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def size(self, key: str) -> int | None:
        answer = self._head(key)
        return None if answer is None else answer["ContentLength"]

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        asked = {"Bucket": self.bucket, "Prefix": self.prefix + (f"{check_key(prefix)}/" if prefix else "")}
        while True:
            page = self._do(
                "list", prefix or "the objects", functools.partial(_client().list_objects_v2, **asked)
            )
            for entry in page.get("Contents", ()):
                key = entry["Key"][len(self.prefix) :]
                if not key.endswith("/") and not key.rpartition("/")[2].startswith(TEMPORARY):
                    yield key, entry["Size"]
            if not page.get("IsTruncated"):
                return
            asked = {**asked, "ContinuationToken": page["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        self._do("delete", key, lambda: _client().delete_object(Bucket=self.bucket, Key=self._full(key)))

    def sub(self, prefix: str) -> Bucket:
        return Bucket(f"{self.uri}/{check_key(prefix)}", self.bucket, f"{self.prefix}{prefix}/")

    def check_writable(self) -> None:
        probe = f"{TEMPORARY}{uuid.uuid4().hex}"
        self.write(probe, b"probe")
        self.delete(probe)

    def _full(self, key: str) -> str:
        return self.prefix + check_key(key)

    def _get(self, key: str, **options: Any) -> dict[str, Any]:
        def get() -> dict[str, Any]:
            answer = _client().get_object(Bucket=self.bucket, Key=self._full(key), **options)
            return {**answer, "Body": answer["Body"].read()}

        return self._do("read", key, get)

    def _head(self, key: str) -> dict[str, Any] | None:
        try:
            return self._do(
                "read", key, lambda: _client().head_object(Bucket=self.bucket, Key=self._full(key))
            )
        except MissingKey:
            return None

    def _put(self, key: str, data: bytes, **options: Any) -> dict[str, Any]:
        return self._do(
            "write",
            key,
            lambda: _client().put_object(Bucket=self.bucket, Key=self._full(key), Body=data, **options),
        )

    def _put_when(self, key: str, data: bytes, **condition: str) -> bool:
        """One conditional PUT; False when the server says that the condition does not hold.

        An answer may be lost on its way and the request sent again: then the condition fails by our own object, which
        its token tells.
        """
        token = uuid.uuid4().hex
        try:
            self._put(key, data, Metadata={"claim": token}, **condition)
        except StorageError as error:
            if isinstance(error.__cause__, ClientError) and _status(error.__cause__) in (404, 409, 412):
                return self._claimed(key, token, data)
            raise
        return True

    def _claim(self, key: str, data: bytes) -> bool:
        """Without conditional writes: write a token, wait, and see whose token stands."""
        token = uuid.uuid4().hex
        self._put(key, data, Metadata={"claim": token})
        time.sleep(SETTLE)
        return self._claimed(key, token, data)

    def _claimed(self, key: str, token: str, data: bytes) -> bool:
        """Whether what stands is ours, by its token, or by its bytes on a server that keeps no metadata."""
        answer = self._head(key)
        if answer is None:
            return False
        claim = answer["Metadata"].get("claim")
        return claim == token if claim else self.read(key) == data

    def _do(self, what: str, key: str, call: Callable[[], _Result]) -> _Result:
        with self._named(what, key):
            return _patiently(call, self.uri)

    @contextmanager
    def _named(self, what: str, key: str) -> Iterator[None]:
        """boto3's errors as one line that names the key and the mend."""
        start = f"cannot {what} {key} in {self.uri}"
        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in ("NoSuchKey", "404"):
                raise MissingKey(f"{key} is not in {self.uri}") from error
            kind = DeniedKey if what == "read" and code in ("AccessDenied", "403") else StorageError
            raise kind(f"{start}: {_MENDS.get(code, f'the server answered {code}')}") from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            mend = "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            raise StorageError(f"{start}: {mend}") from error
        except (ConnectionError, HTTPClientError) as error:
            place = _endpoint() or "the S3 service"
            mend = f"{place} does not answer; is it up, and AWS_ENDPOINT_URL right?"
            raise StorageError(f"{start}: {mend}") from error
        except (BotoCoreError, boto3.exceptions.Boto3Error, OSError) as error:
            cause = error.__context__ if isinstance(error.__context__, ClientError) else error
            first = (str(cause).splitlines() or [type(cause).__name__])[0]
            raise StorageError(f"{start}: {first}") from cause


def _patiently(call: Callable[[], _Result], uri: str) -> _Result:
    """The call's result; what fails in passing is tried again, with growing pauses."""
    began, pause, told = time.monotonic(), PAUSE[0], False
    while True:
        try:
            result = call()
        except Exception as error:
            if not _passes(error):
                if isinstance(_decisive(error), ClientError):  # it answers, if only to say no
                    _answered.add(_endpoint())
                raise
            left = began + _patience() - time.monotonic()
            if left <= 0:
                raise
            if not told and time.monotonic() - began > 5:
                told = True
                print(f"{uri} does not answer; trying for another {left:.0f} s", file=sys.stderr, flush=True)
            time.sleep(min(left, pause * random.uniform(0.5, 1)))
            pause = min(2 * pause, PAUSE[1])
        else:
            _answered.add(_endpoint())
            return result


_answered: set[str | None] = set()


def _trusted() -> bool:
    """Whether the address is known to be right: the server has answered, or whoever started this process says so."""
    return _endpoint() in _answered or "INPAINT_S3_PATIENCE" in os.environ


def _patience() -> float:
    given = os.environ.get("INPAINT_S3_PATIENCE")
    return float(given) if given else PATIENCE if _trusted() else BRIEF


def _passes(error: BaseException) -> bool:
    """Whether waiting may help: nobody answered, or the server had troubles of its own."""
    cause = _decisive(error)
    if isinstance(cause, ClientError):
        code = str(cause.response.get("Error", {}).get("Code", ""))
        return code in _PASSING or (_status(cause) >= 500 and _status(cause) != 501)  # 501: it never will
    return cause is not None


def _decisive(error: BaseException | None) -> BaseException | None:
    """The newest of the error's causes that tells what the server did: errors being handled meanwhile are older."""
    while error is not None and not isinstance(error, (ClientError, *_NO_ANSWER)):
        error = error.__cause__ or error.__context__
    return error


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _client() -> Any:
    return _client_for(os.getpid(), _endpoint(), os.environ.get("AWS_ACCESS_KEY_ID"), _trusted())


@functools.lru_cache(maxsize=8)
def _client_for(process: int, endpoint: str | None, user: str | None, trusted: bool) -> Any:
    """One client a process and set of variables; clients are safe to share among threads, not across a fork."""
    config = Config(
        connect_timeout=5,
        read_timeout=SILENCE[0] if trusted else SILENCE[1],
        retries={"mode": "standard", "total_max_attempts": 2 if trusted else 1},
        max_pool_connections=32,
        s3={"addressing_style": "path" if endpoint else "auto"},  # other servers seldom resolve bucket.host
        request_checksum_calculation="when_required",  # nor know the newest checksums
        response_checksum_validation="when_required",
    )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return boto3.session.Session().client("s3", endpoint_url=endpoint, region_name=region, config=config)


def _obeys_conditions(bucket: Bucket) -> bool:
    return _probe_conditions(_endpoint(), bucket)


@functools.lru_cache(maxsize=16)
def _probe_conditions(endpoint: str | None, bucket: Bucket) -> bool:
    """Whether the server refuses what a condition forbids: some accept the header and ignore it."""
    probe = f"{TEMPORARY}{uuid.uuid4().hex}"
    bucket.write(probe, b"probe")
    try:
        return not bucket._put_when(probe, b"again", IfNoneMatch="*") and not bucket._put_when(
            probe, b"again", IfMatch='"00000000000000000000000000000000"'
        )
    except StorageError:
        return False  # a server that answers such requests with an error of its own
    finally:
        bucket.delete(probe)


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _server_time(answer: dict[str, Any]) -> float:
    stamp = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    return parsedate_to_datetime(stamp).timestamp() if stamp else time.time()
