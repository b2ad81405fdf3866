"""URIs of storages (folders, s3://), MLflow tracking servers, SQLite databases and files: parsing, building, redacting.

Only this module puts paths into URLs, quoted as each reader of the URL needs it, and parses the URIs that users type.
Invalid ones raise UriError, which says what was probably meant.

    sqlite:////folder/mlflow.db            SQLAlchemy's; it unquotes %XX, and a '?' ends the path
    sqlite+pysqlite:////r%2520a/mlflow.db  the same with an explicit driver, for paths in which something is quoted: from
                                           sqlite:/// MLflow takes the path as it stands, and creates that folder
    file:///folder/mlflow.db?mode=ro       SQLite's own; %XX is unquoted, '?' and '#' end the path
    file:///folder/mlflow-artifacts        MLflow's artifacts; the same
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

QUOTED_SQLITE_PREFIX = "sqlite+pysqlite:///"
STORAGE_FORMS = "a folder or s3://bucket/prefix"
TRACKING_FORMS = "http://host:port, https://host or sqlite:////folder/mlflow.db"
DATABASE_SCHEMES = ("postgresql", "mysql", "mssql", "sqlite")
KNOWN_SCHEMES = frozenset(
    [
        "s3",
        "file",
        "http",
        "https",
        "gs",
        "gcs",
        "az",
        "abfs",
        "abfss",
        "wasbs",
        "hdfs",
        "ftp",
        "dbfs",
        "hf",
        "sqlite",
        "postgresql",
        "postgres",
        "mysql",
        "mssql",
        "models",
        "runs",
        "databricks",
        "ray",
    ]
)
SQLALCHEMY_QUERY = re.compile(r"\?\w+=[^/]*$")  # options after the path


class UriError(ValueError):
    """An invalid URI; one line with what was probably meant."""


def is_s3_uri(uri: str) -> bool:
    return uri.startswith("s3://")


def normalize_storage_uri(text: str, setting: str = "storage") -> str:
    """The absolute path of a folder (symbolic links kept), or s3://bucket/prefix without a trailing slash.

    `setting` names the setting in errors. Raises UriError for another kind of URI, a misspelt s3 URI, and characters
    that URIs cannot hold.
    """
    _check_printable(text, setting, STORAGE_FORMS)
    if is_s3_uri(text):
        bucket, _, prefix = text.removeprefix("s3://").partition("/")
        if "@" in bucket:
            raise UriError(
                f"{setting} contains a user name or key: give s3://bucket/prefix, and AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY in the environment"
            )
        if not bucket:
            raise UriError(f"{setting} {text!r} names no bucket: write s3://bucket/prefix")
        if not re.fullmatch(r"[A-Za-z0-9._:/-]+", bucket):
            raise UriError(
                f"{setting} {text!r}: {bucket!r} is not a valid bucket name; write s3://bucket/prefix"
            )
        return f"s3://{bucket}/{prefix.strip('/')}".rstrip("/")
    if text.startswith("file:"):
        return str(path_from_file_url(text, setting))
    if re.match(r"(?i)s3[an]?\s*(?:[:;]+\s*[/\\]*|//|\\\\)", text):
        bucket_and_prefix = re.sub(r"(?i)^s3[an]?\s*[:;]*\s*[/\\]*", "", text)
        suggestion = f"s3://{bucket_and_prefix or 'bucket/prefix'}"
        raise UriError(
            f"{setting} {text!r} is not a valid URI: probably {suggestion}, or the folder ./{text}"
        )
    if re.match(r"(?i)https?:/", text):
        parts = urlsplit(text)
        bucket = parts.path.strip("/") or "bucket/prefix"
        raise UriError(
            f"{setting} {redact_uri(text)!r} is a web address: give {STORAGE_FORMS}; for an S3-compatible server "
            f"probably s3://{bucket}, with AWS_ENDPOINT_URL={parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        )
    return str(_folder_path(text, setting))


def _folder_path(text: str, setting: str) -> Path:
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", text)
    if scheme:
        tail = text[scheme.end() :]
        if len(scheme[1]) == 1 and tail[:1] in ("\\", "/"):
            raise UriError(
                f"{setting} {text!r} is a Windows path, which does not exist on this system: give {STORAGE_FORMS} "
                f"(in WSL /mnt/{scheme[1].lower()}/{tail.strip('/').strip(chr(92)).replace(chr(92), '/')})"
            )
        if tail.startswith("//") or (tail.startswith("/") and scheme[1].lower() in KNOWN_SCHEMES):
            raise UriError(
                f"{setting} {redact_uri(text)!r}: only folders and s3://bucket/prefix are supported; for a folder of "
                "that name write ./ before it"
            )
    if text.startswith("\\\\"):
        raise UriError(f"{setting} {text!r} is a Windows path: mount it, and give the folder")
    return Path(expand_user(text, setting)).absolute()


def expand_user(text: str, setting: str = "path") -> str:
    """The path with a leading ~ replaced. Raises UriError if there is no such user."""
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        raise UriError(
            f"{setting} {text!r}: there is no user {text[1:].partition('/')[0]!r} here; for a folder of that name "
            "write ./ before it"
        ) from None


def normalize_tracking_uri(text: str, setting: str = "tracking") -> str:
    """A tracking URI as MLflow reads it; for SQLite with an absolute, quoted path.

    A SQLite path may be given quoted or unquoted: the one that exists is taken. Other databases, `databricks` and
    schemes of MLflow plugins stay as they are. Raises UriError for an invalid URI.
    """
    text = text.strip()
    _check_printable(text, setting, TRACKING_FORMS)
    scheme, colon, tail = text.partition(":")
    kind = scheme.lower().partition("+")[0]
    if kind == "sqlite" and colon:
        return _sqlite_tracking_uri(text, tail, setting)
    if server := re.match(r"(?i)(https?)(?=[:;/])", text):
        return _server_uri(text, server[1].lower(), text[server.end() :].lstrip(";"), setting)
    if kind in DATABASE_SCHEMES and tail.startswith("//"):
        return text
    if text == "databricks" or kind in ("databricks", "databricks-uc", "uc"):
        return text
    if kind == "postgres" and tail.startswith("//"):
        raise UriError(
            f"{setting} {redact_uri(text)!r} is not a valid URI: probably {redact_uri('postgresql:' + tail)}"
        )
    if kind in ("s3", "s3a", "gs", "models", "runs", "ray") and colon:
        raise UriError(f"{setting} {text!r} is not an MLflow tracking URI: give {TRACKING_FORMS}")
    if tail.startswith("//") and kind != "file":
        similar = difflib.get_close_matches(kind, ("http", "https", *DATABASE_SCHEMES), n=1, cutoff=0.7)
        if similar:
            raise UriError(
                f"{setting} {redact_uri(text)!r} is not a valid URI: probably {redact_uri(similar[0] + ':' + tail)}"
            )
        return text  # an MLflow plugin's
    return _file_store_uri(text, kind, setting)


def _server_uri(text: str, scheme: str, tail: str, setting: str) -> str:
    host = tail.lstrip(":;/")
    suggestion = f"{scheme}://{'localhost:' if tail.startswith('://:') else ''}{host or 'host:port'}"
    try:
        parts = urlsplit(f"{scheme}{tail}")
        valid = tail.startswith("://") and parts.hostname and not re.search(r"\s", parts.netloc)
        valid = bool(valid) and (parts.port is None or parts.port > 0)
    except ValueError:  # of the port
        raise UriError(
            f"{setting} {redact_uri(text)!r}: its port is not a number from 1 to 65535; give {TRACKING_FORMS}"
        ) from None
    if not valid:
        raise UriError(
            f"{setting} {redact_uri(text)!r} is not a valid URI: probably {redact_uri(suggestion)}"
        )
    return f"{scheme}{tail}"


def _file_store_uri(text: str, kind: str, setting: str) -> str:
    """The path of MLflow's file store, if MLFLOW_ALLOW_FILE_STORE allows it. Raises UriError for anything else."""
    if kind == "file" and not text.startswith("file:/"):
        raise UriError(f"{setting} {text!r} is not a valid URI: give {TRACKING_FORMS}")
    path = (
        path_from_file_url(text, setting) if kind == "file" else Path(expand_user(text, setting)).absolute()
    )
    if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("1", "true") and path.is_dir():
        return text
    is_database = path.is_file() or path.suffix in (".db", ".sqlite", ".sqlite3")
    if is_database or path.is_dir():
        suggestion = sqlite_url(path if is_database else path / "mlflow.db")
        raise UriError(f"{setting} {text!r} is a path, not a URI: probably {shlex.quote(suggestion)}")
    host = redact_uri(text)
    if re.fullmatch(r"\[?[\w.:-]*\w\]?:\d+(/.*)?", host) or re.match(
        r"(localhost|[\w-]+(\.[\w-]+)+)(/|$)", host
    ):
        raise UriError(f"{setting} {redact_uri(text)!r} is not a valid URI: probably http://{host}")
    raise UriError(f"{setting} {redact_uri(text)!r} is not an MLflow tracking URI: give {TRACKING_FORMS}")


def _sqlite_tracking_uri(text: str, tail: str, setting: str) -> str:
    if not tail.startswith("///"):
        path = tail.lstrip("/")
        if not path:
            raise UriError(
                f"{setting} {text!r} names no file, so nothing would be kept: give sqlite:////folder/mlflow.db"
            )
        root = "/" if tail.startswith("/") and not tail.startswith("//") else ""
        raise UriError(f"{setting} {text!r} is not a valid URI: probably sqlite:///{root}{path}")
    raw = tail.removeprefix("///")
    if raw in ("", ":memory:"):
        raise UriError(
            f"{setting} {text!r} names no file, so nothing would be kept: give sqlite:////folder/mlflow.db"
        )
    if raw.startswith(("file:", "~")):
        suggestion = (
            f"sqlite:///{expand_user(raw, setting)}" if raw.startswith("~") else "sqlite:////folder/mlflow.db"
        )
        raise UriError(f"{setting} {text!r}: SQLAlchemy does not read that as a path; probably {suggestion}")
    query = SQLALCHEMY_QUERY.search(raw)
    if query and not Path(raw).exists():
        raw = raw[: query.start()]
    else:
        query = None
    unquoted = unquote(raw)
    if text.startswith(QUOTED_SQLITE_PREFIX) or unquoted == raw:
        path = unquoted
    else:
        path = _existing_path(Path(unquoted), Path(raw), text, setting)
    return sqlite_url(Path(path).resolve()) + (query[0] if query else "")


def _existing_path(unquoted: Path, raw: Path, text: str, setting: str) -> str:
    """Which of the two readings of a path with a % exists; `unquoted` if neither does. Raises UriError if both do."""
    for exists in (Path.is_file, lambda path: path.parent.is_dir()):
        matches = [path for path in (unquoted, raw) if exists(path)]
        if len(matches) == 2 and exists is Path.is_file:
            first, second = (shlex.quote(sqlite_url(path.resolve())) for path in matches)
            raise UriError(
                f"{setting} {text!r} may be either of two files that exist: give {first} or {second}"
            )
        if len(matches) == 1:
            return str(matches[0])
    return str(unquoted)


def sqlite_url(path: Path) -> str:
    """SQLAlchemy's URL of a SQLite file, for MLflow and its commands too."""
    text = str(path)
    quoted = text.replace("%", "%25").replace("?", "%3F")
    return f"sqlite:///{text}" if quoted == text else f"{QUOTED_SQLITE_PREFIX}{quoted}"


def path_from_sqlite_url(url: str) -> Path | None:
    """The file of a URL from `normalize_tracking_uri` or `sqlite_url`; None if it is not a SQLite URL."""
    for prefix in ("sqlite:///", QUOTED_SQLITE_PREFIX):
        if url.startswith(prefix):
            return Path(unquote(SQLALCHEMY_QUERY.sub("", url.removeprefix(prefix))))
    return None


def sqlite_connect_uri(path: Path | str, mode: str = "ro") -> str:
    """The URI of a file for sqlite3.connect(uri=True). `mode` is SQLite's: ro, rw or rwc."""
    return f"file:{quote(os.fsencode(os.path.abspath(path)))}?mode={mode}"


def file_url(path: Path | str) -> str:
    """file:///... of a path, as MLflow's artifacts need it."""
    return Path(os.path.abspath(path)).as_uri()


def path_from_file_url(url: str, setting: str = "address") -> Path:
    """The unquoted path of file:///... Raises UriError if the URL names a host or has no absolute path."""
    parts = urlsplit(url.replace("?", "%3F").replace("#", "%23"))
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        path = re.sub(r"^file:/*", "", url)
        raise UriError(f"{setting} {url!r} is not the URL of a local file: probably file:///{path}")
    return Path(unquote(parts.path))


def redact_uri(uri: str) -> str:
    """The URI without the user name and password that it may contain."""
    scheme, separator, tail = uri.partition("://")
    if scheme.partition("+")[0] in ("sqlite", "file"):
        return uri
    if separator:
        return f"{scheme}{separator}{tail.rpartition('@')[2]}"
    return re.sub(r"^((?:https?:)?/*)[^/@\s]*:[^@\s]*@", r"\1", uri)


def quote_for_shell(uri: str) -> str:
    """The redacted URI, quoted so that it can be pasted into a shell."""
    return shlex.quote(redact_uri(uri))


def _check_printable(text: str, setting: str, forms: str) -> None:
    if not text.strip():
        raise UriError(f"{setting} is empty: give {forms}")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        raise UriError(
            f"{setting} {redact_uri(text)!r} contains a line break or another control character: rename it"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UriError(f"{setting} {text!r} is not UTF-8: rename it") from None
