"""One webdataset tar and its index: written in one pass, with fixed times and owners, so that the same samples give the
same bytes; read by position.

The index (the same name, .json) says where each member's bytes lie and what their CRC-32 is: one positioned read
fetches a sample, and tells a flipped byte.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

from data_prep.storage import Storage

_BLOCK, _RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE


@dataclass
class TarWriter:
    """Members go to `file` as they come; only their names and places stay in memory."""

    file: IO[bytes]
    keys: list[str] = field(default_factory=list)
    suffixes: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    sums: list[int] = field(default_factory=list)
    size: int = 0
    _ended: bool = False
    _hash: Any = field(default_factory=hashlib.sha256)

    def add(self, member: str, data: bytes) -> None:
        """`member` is key.suffix."""
        info = tarfile.TarInfo(member)
        info.size, info.mode = len(data), 0o444
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        key, _, suffix = member.partition(".")
        self.keys.append(key)
        self.suffixes.append(suffix)
        self.offsets.append(self.size)
        self.sizes.append(len(data))
        self.sums.append(zlib.crc32(data))
        self._write(data)
        self._write(bytes(-len(data) % _BLOCK))

    def with_another(self, size: int) -> int:
        """The whole tar's bytes, were a member of this many bytes its last one."""
        content = self.size + _BLOCK + size + -size % _BLOCK + 2 * _BLOCK
        return content + -content % _RECORD

    def end(self) -> None:
        """Two empty blocks, and up to a whole record, as tar has it; once."""
        if not self._ended:
            self._ended = True
            self._write(bytes(2 * _BLOCK + -(self.size + 2 * _BLOCK) % _RECORD))

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self._hash.update(data)
        self.size += len(data)

    @property
    def index(self) -> dict[str, list]:
        return {
            "keys": self.keys,
            "suffixes": self.suffixes,
            "offsets": self.offsets,
            "sizes": self.sizes,
            "crc32": self.sums,
        }

    def entry(self, name: str) -> dict[str, Any]:
        """The tar in a manifest."""
        return {
            "name": name,
            "count": len(self.keys),
            "bytes": self.size,
            "sha256": self._hash.hexdigest(),
        }


@contextmanager
def writing_tar(out: Storage, name: str, more: dict[str, Any]) -> Iterator[TarWriter]:
    """A tar that is published when the block ends well, just after its index; `more` goes into the index then."""
    with out.writing(name) as file:
        tar = TarWriter(file)
        yield tar
        tar.end()
        out.write(index_name(name), json.dumps({**tar.index, **more}).encode())


def write_tar(
    out: Storage, name: str, members: Iterable[tuple[str, bytes]], more: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Publish a tar of (file name, bytes); its entry in a manifest: {name, count, bytes, sha256}."""
    with writing_tar(out, name, more or {}) as tar:
        for member, data in members:
            tar.add(member, data)
    return tar.entry(name)


def index_name(shard: str) -> str:
    return shard.removesuffix(".tar") + ".json"


def read_index(shards: Storage, shard: str) -> dict[str, list]:
    """keys, suffixes, offsets, sizes, crc32 of a tar's samples; photographs' tars also have shapes ([height, width])
    and names. ValueError when it is damaged.
    """
    try:
        index = json.loads(shards.read(index_name(shard)))
        lengths = {len(index[field]) for field in ("keys", "suffixes", "offsets", "sizes", "crc32")}
    except (ValueError, KeyError, TypeError):
        lengths = set()
    if len(lengths) != 1:
        raise ValueError(f"{index_name(shard)} in {shards.uri} is damaged: make {shard} again")
    return index
