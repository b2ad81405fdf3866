"""S3 clients configured by the AWS variables, with retries, and error messages that say what to do.

Messages never contain credentials.
"""

from __future__ import annotations

import functools
import os
import random
import re
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectionError, HTTPClientError, IncompleteReadError
from botocore.parsers import ResponseParserError

from data_prep.network import (
    FIRST_RESPONSE_SECONDS,
    bypass_proxy_for_loopback,
    call_with_timeout,
    describe_proxy,
    long_retries_enabled,
    proxy_hint,
    proxy_variable,
)
from data_prep.storage.base import StorageError
from data_prep.uris import redact_uri

RETRY_SECONDS = 60.0  # limit of retries at an endpoint that has answered before
FIRST_CONTACT_SECONDS = 5.0  # limit of retries at an endpoint that has never answered
READ_TIMEOUTS = 60.0, 8.0  # seconds: at a known and at an unknown endpoint
BACKOFF_SECONDS = 0.5, 8.0  # the first and the longest pause between two tries

CREDENTIAL_VARIABLES = (  # a client reads them once, when it is created
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)
_REGION_HINT = "the bucket is in another region than AWS_REGION says; set the bucket's"
HINTS = {  # by S3 error code
    "NoSuchBucket": "there is no such bucket; create it or correct the uri",
    "AccessDenied": "access is denied; check the credentials' rights on this bucket",
    "403": "access is denied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's rights",
    "InvalidAccessKeyId": "the server does not know this access key; check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the session token has expired; fetch new credentials",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "PermanentRedirect": _REGION_HINT,
    "301": _REGION_HINT,
    "AuthorizationHeaderMalformed": _REGION_HINT,
    "IllegalLocationConstraintException": _REGION_HINT,
}
_TRANSIENT_CODES = {
    "SlowDown",
    "InternalError",
    "ServiceUnavailable",
    "RequestTimeout",
    "Throttling",
    "ThrottlingException",
}
_UNKNOWN_HOST_TEXTS = (
    "Name or service not known",
    "name resolution",
    "NameResolution",
    "nodename nor servname",
)
_LIST_RESPONSE_FIELDS = {"Name", "KeyCount", "MaxKeys", "IsTruncated", "Contents"}  # every listing has one
_CONNECTION_ERRORS = (
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    boto3.exceptions.RetriesExceededError,
)
Result = TypeVar("Result")


def with_retries(call: Callable[[], Result], uri: str) -> Result:
    """The call's result. Retries transient errors with exponential backoff; raises the last error."""
    start, backoff, announced = time.monotonic(), BACKOFF_SECONDS[0], False
    while True:
        try:
            result = call()
        except Exception as error:
            if not _is_transient(error):
                if isinstance(_find_s3_error(error), ClientError):  # an error response is an answer too
                    _reachable_endpoints.add(endpoint_url())
                raise
            remaining = start + retry_seconds() - time.monotonic()
            if remaining <= 0:
                raise
            if not announced and time.monotonic() - start > 5:
                announced = True
                print(
                    f"{uri} does not answer; trying for another {remaining:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(min(remaining, backoff * random.uniform(0.5, 1)))
            backoff = min(2 * backoff, BACKOFF_SECONDS[1])
        else:
            _reachable_endpoints.add(endpoint_url())
            return result


def check_endpoint(bucket: str, prefix: str) -> None:
    """Raises within 10 s unless the endpoint answers like an S3 server.

    Raises StorageError for another kind of server, and boto3's errors or TimeoutError if there is no answer.
    """

    def list_one() -> dict[str, Any]:
        arguments = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": 1}
        return with_retries(lambda: list_objects(arguments), f"s3://{bucket}/{prefix}".rstrip("/"))

    try:
        if not _LIST_RESPONSE_FIELDS.isdisjoint(call_with_timeout(FIRST_RESPONSE_SECONDS, list_one)):
            return
        reason = "it lists no bucket"
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code and not code.isdigit():  # S3's own errors have names
            # credentials without the right to list may still read
            if code in HINTS and code != "AccessDenied":
                raise
            return
        status = http_status(error)
        reason = "it asks for a user name and a password" if status == 407 else f"it answers {status}"
    except (ResponseParserError, RecursionError):
        reason = "it answers with something else"
    _reachable_endpoints.discard(endpoint_url())
    endpoint = _endpoint_or_default()
    hint = proxy_hint(endpoint) or "check AWS_ENDPOINT_URL and the server"
    raise StorageError(
        f"the server at {redact_uri(endpoint)}{describe_proxy(endpoint)} is not an S3 server ({reason}); {hint}"
    )


def _endpoint_or_default() -> str:
    return endpoint_url() or "https://s3.amazonaws.com"


def explain_connection_error(error: BaseException) -> str:
    """Why the endpoint does not answer, and what to do."""
    endpoint = _endpoint_or_default()
    name = redact_uri(endpoint) if endpoint_url() else "the S3 service"
    text = str(error)
    host = urlsplit(endpoint).hostname
    if any(
        words in f"{text} {error.__cause__!r} {error.__context__!r}" for words in _UNKNOWN_HOST_TEXTS
    ) and not proxy_variable(endpoint):
        return f"there is no host {host}; is AWS_ENDPOINT_URL right?"
    if "CERTIFICATE_VERIFY_FAILED" in text or "certificate verify failed" in text:
        return f"the certificate of {name} is not trusted; set AWS_CA_BUNDLE to the file of its authority"
    if any(words in text.upper().replace(" ", "_") for words in ("WRONG_VERSION", "RECORD_LAYER")):
        return f"the server at {name} does not speak TLS; should AWS_ENDPOINT_URL begin with http://?"
    if hint := proxy_hint(endpoint):
        return f"{name} does not answer{describe_proxy(endpoint)}; {hint}"
    return f"{name} does not answer; is it up, and AWS_ENDPOINT_URL right?"


_reachable_endpoints: set[str | None] = set()


def is_endpoint_known() -> bool:
    """Whether the endpoint is known to be right: it has answered, or the environment asks for long retries."""
    return (
        endpoint_url() in _reachable_endpoints
        or long_retries_enabled()
        or "INPAINT_S3_RETRY_SECONDS" in os.environ
    )


def retry_seconds() -> float:
    override = os.environ.get("INPAINT_S3_RETRY_SECONDS")
    return float(override) if override else RETRY_SECONDS if is_endpoint_known() else FIRST_CONTACT_SECONDS


def _is_transient(error: BaseException) -> bool:
    """Whether a retry may help: there was no answer, or the server itself failed."""
    cause = _find_s3_error(error)
    if isinstance(cause, ClientError):
        code = str(cause.response.get("Error", {}).get("Code", ""))
        # 501, Not Implemented, is permanent
        return code in _TRANSIENT_CODES or (http_status(cause) >= 500 and http_status(cause) != 501)
    return cause is not None


def _find_s3_error(error: BaseException | None) -> BaseException | None:
    """The newest server or connection error in the chain of causes; older ones were being handled at the time."""
    while error is not None and not isinstance(error, (ClientError, *_CONNECTION_ERRORS)):
        error = error.__cause__ or error.__context__
    return error


def endpoint_url() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def list_objects(arguments: dict[str, Any]) -> dict[str, Any]:
    response: dict[str, Any] = client().list_objects_v2(**arguments)
    return response


def client() -> Any:
    """The boto3 client for the current environment variables."""
    credentials = tuple(os.environ.get(variable) for variable in CREDENTIAL_VARIABLES)
    return client_for(os.getpid(), endpoint_url(), credentials, is_endpoint_known())


@functools.lru_cache(maxsize=8)
def client_for(
    process: int, endpoint: str | None, credentials: tuple[str | None, ...], endpoint_known: bool
) -> Any:
    """One client per process and set of variables: threads can share a client, forked processes cannot."""
    if endpoint and not re.match(r"https?://[^/]", endpoint):
        suggestion = redact_uri(f"http://{endpoint.rpartition('//')[2]}")
        raise StorageError(f"AWS_ENDPOINT_URL {redact_uri(endpoint)} is not a URL: probably {suggestion}")
    bypass_proxy_for_loopback(endpoint or "")
    config = Config(
        connect_timeout=5,
        read_timeout=READ_TIMEOUTS[0] if endpoint_known else READ_TIMEOUTS[1],
        retries={"mode": "standard", "total_max_attempts": 2 if endpoint_known else 1},
        max_pool_connections=32,
        s3={"addressing_style": "path" if endpoint else "auto"},  # few other servers resolve bucket.host
        request_checksum_calculation="when_required",  # other servers may not know the newest checksums
        response_checksum_validation="when_required",
    )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return boto3.session.Session().client("s3", endpoint_url=endpoint, region_name=region, config=config)


def http_status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
