"""Checks shards and edge tars against their manifests, one tar at a time, and names what is wrong."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from data_prep.edge_maps import EDGE_MANIFEST as EDGE_MANIFEST
from data_prep.edge_maps import EdgeTarEntry, decode_edges, read_edge_manifest
from data_prep.manifest import MANIFEST, Manifest, ShardEntry, TarEntry
from data_prep.partitions import IO_THREADS, Partition, read_partition_records
from data_prep.storage import MissingKey, Storage, StorageError
from data_prep.tars import index_name, read_index

SAFE_MEMBER_NAME = re.compile(r"[0-9a-f]{16}\.[a-z0-9]+")
"""Leads out of no folder, and has no scheme that a reader could run."""


@dataclass(frozen=True)
class Finding:
    """Something wrong with a sample of a tar, or with the tar itself (sample "")."""

    shard: str
    sample: str
    problem: str
    sigma: float | None = None
    """of the edge tar; None for a photograph tar"""

    def __str__(self) -> str:
        edges = "" if self.sigma is None else f"edges of sigma {self.sigma:g}, "
        return f"{edges}{' '.join(filter(None, (self.shard, self.sample)))}: {self.problem}"


@dataclass
class TarReport:
    """Findings in a tar, and the keys and shapes [height, width] of its samples (None if unreadable)."""

    findings: list[Finding] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    shapes: list[tuple[int, ...] | None] = field(default_factory=list)


@dataclass(frozen=True)
class EdgeDataset:
    """Edge tars of one sigma beside a folder of shards, as `inpaint edges` writes them."""

    sigma: float
    folder: Storage
    entries: Mapping[str, EdgeTarEntry] | None
    """of edges.json, by tar; None if it cannot be read"""
    problem: str = ""
    """what is wrong with edges.json"""


def find_edge_datasets(shards: Storage, shards_digest: str) -> list[EdgeDataset]:
    """All edge datasets in the folder edges/, sorted by sigma. Ignores other folders there."""
    datasets = []
    for name in sorted({key.split("/")[0] for key, _ in shards.subfolder("edges").list() if "/" in key}):
        folder = shards.subfolder(f"edges/{name}")
        named_sigma = re.fullmatch(r"sigma-(\d+(?:\.\d+)?)", name)
        try:
            manifest = read_edge_manifest(folder)
        except MissingKey:
            problem = "is missing: these edges were never finished, or it was lost"
        except ValueError as error:
            problem = str(error).removeprefix(f"edges.json in {folder.uri} ")
        else:
            problem = "" if manifest.shards_digest == shards_digest else "was made from other shards"
            entries = {entry.name: entry for entry in manifest.shards}
            datasets.append(EdgeDataset(manifest.sigma, folder, entries, problem))
            continue
        if named_sigma:
            datasets.append(EdgeDataset(float(named_sigma[1]), folder, None, problem))
    return sorted(datasets, key=lambda dataset: dataset.sigma)


def check_manifest(shards: Storage, manifest: Manifest) -> list[Finding]:
    """Checks that manifest.json agrees with itself, and that the partition records are readable."""
    hint = f"`inpaint shard {manifest.source} {shards.uri}` writes it again"
    findings = []
    for split, count in manifest.splits.items():
        actual_count = sum(entry.count for entry in manifest.shards_of_split(split))
        if actual_count != count:
            problem = f"says {count} {split} photographs, its tars hold {actual_count}; {hint}"
            findings.append(Finding(MANIFEST, "", problem))
    for name, occurrences in Counter(entry.name for entry in manifest.shards).items():
        if occurrences > 1:
            findings.append(Finding(MANIFEST, "", f"names {name} {occurrences} times; {hint}"))
    problem = "is damaged or missing: photographs can be neither added nor repaired; rebuild the shards"
    # in batches: the records hold the names of all photographs
    for start in range(0, manifest.partitions, IO_THREADS):
        stop = min(start + IO_THREADS, manifest.partitions)
        records = read_partition_records(shards, stop, start)
        for index, record in zip(range(start, stop), records, strict=True):
            if record is None:
                findings.append(Finding(Partition(index, (), ()).record_key, "", problem))
    return findings


def check_photographs(shards: Storage, entry: ShardEntry, decode: Callable[[bytes], np.ndarray]) -> TarReport:
    """Checks a photograph tar against its manifest entry and its index (hashes, members), and decodes every sample."""
    report, index = _check_tar(shards, entry, decode, None)
    if index is None:
        return report
    for column in ("shapes", "names"):
        values = index.get(column)
        if not isinstance(values, list) or len(values) != len(index["keys"]):
            problem = f"its index does not give each sample one of its {column}"
            report.findings.append(Finding(entry.name, "", problem))
            return report
    for key, shape, expected in zip(report.keys, report.shapes, index["shapes"]):
        if shape is not None and list(shape[:2]) != expected:
            problem = f"is {list(shape[:2])} instead of {expected} as the index says"
            report.findings.append(Finding(entry.name, key, problem))
    return report


def check_edges(
    edges: Storage,
    entry: EdgeTarEntry | None,
    photo_entry: ShardEntry,
    photo_report: TarReport,
    sigma: float,
) -> TarReport:
    """Checks an edge tar against its entry in edges.json (None: it has none) and against its photograph tar."""
    if entry is None:
        return TarReport([Finding(photo_entry.name, "", "edges.json does not name it", sigma)])
    report, _ = _check_tar(edges, entry, decode_edges, sigma)
    if entry.photos_sha256 != photo_entry.sha256:
        report.findings.append(Finding(entry.name, "", "was made from other photographs", sigma))
    elif photo_report.keys and report.keys and photo_report.keys != report.keys:
        problem = "its keys are not those of the photographs, in their order"
        report.findings.append(Finding(entry.name, "", problem, sigma))
    else:
        for key, shape, photo_shape in zip(report.keys, report.shapes, photo_report.shapes):
            if shape and photo_shape and shape != photo_shape[:2]:
                problem = f"is {list(shape)}, its photograph {list(photo_shape[:2])}"
                report.findings.append(Finding(entry.name, key, problem, sigma))
    return report


def _check_tar(
    storage: Storage, entry: TarEntry, decode: Callable[[bytes], np.ndarray], sigma: float | None
) -> tuple[TarReport, dict[str, list] | None]:
    """The report on a tar, and its index (None if it or the tar cannot be read)."""
    report, name = TarReport(), entry.name

    def add_finding(problem: str, sample: str = "") -> None:
        report.findings.append(Finding(name, sample, problem, sigma))

    try:
        data = storage.read(name)
        index = read_index(storage, name)
    except MissingKey as error:
        add_finding(str(error).split(";")[0])
        return report, None
    except (StorageError, ValueError) as error:
        add_finding(str(error))
        return report, None
    if not _has_valid_types(index):
        add_finding(f"{index_name(name)} is damaged: its keys, offsets, sizes or sums have the wrong type")
        return report, None
    if len(data) != entry.bytes:
        add_finding(f"has {len(data)} bytes instead of {entry.bytes}")
    elif hashlib.sha256(data).hexdigest() != entry.sha256:
        add_finding("its bytes are not those that were written (sha256)")
    if len(index["keys"]) != entry.count or len(set(index["keys"])) != len(index["keys"]):
        add_finding(f"its index names {len(set(index['keys']))} samples instead of {entry.count}")
    if index["offsets"] != sorted(index["offsets"]):
        add_finding("its index is not in the tar's order")  # it would change the order of training
    _check_members(data, index, add_finding)
    rows = zip(index["keys"], index["offsets"], index["sizes"], index["crc32"], strict=True)
    for key, offset, size, crc32 in rows:
        sample, shape = data[offset : offset + size], None
        if len(sample) != size:
            add_finding("lies beyond the tar's end", key)
        elif zlib.crc32(sample) != crc32:
            add_finding("its bytes are not those that were written (CRC-32)", key)
        else:
            try:
                shape = decode(sample).shape
            except Exception as error:  # decoders raise nearly anything on malicious images
                reason = str(error).split(":")[0] if isinstance(error, ValueError) else type(error).__name__
                add_finding(reason if isinstance(error, ValueError) else f"cannot be decoded ({reason})", key)
        report.keys.append(key)
        report.shapes.append(shape)
    return report, index


def _has_valid_types(index: Mapping[str, list]) -> bool:
    """Whether keys and suffixes are strings and the other columns non-negative integers; bool does not count as int."""
    texts, numbers = ("keys", "suffixes"), ("offsets", "sizes", "crc32")
    return all(isinstance(value, str) for column in texts for value in index[column]) and all(
        type(value) is int and value >= 0 for column in numbers for value in index[column]
    )


def _check_members(data: bytes, index: Mapping[str, list], add_finding: Callable[..., None]) -> None:
    """Checks the tar's own headers: regular files with safe names, where the index says."""
    expected = {
        f"{key}.{suffix}": (offset, size)
        for key, suffix, offset, size in zip(
            index["keys"], index["suffixes"], index["offsets"], index["sizes"], strict=True
        )
    }
    members = set()
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                members.add(member.name)
                if not member.isreg() or not SAFE_MEMBER_NAME.fullmatch(member.name):
                    kind = "link" if member.islnk() or member.issym() else "member"
                    add_finding(f"the {kind} {member.name!r} does not belong in a shard; do not unpack it")
                elif expected.get(member.name) != (member.offset_data, member.size):
                    add_finding(f"the member {member.name} is not where the index says")
    except Exception as error:  # tarfile raises more than its own errors on malicious headers
        add_finding(f"is not a complete tar ({' '.join(str(error).split())})")
    if missing := sorted(expected.keys() - members):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        add_finding(f"lacks {missing[0]}{more}")
