"""Checks find and name every kind of damage; intact shards pass."""

from __future__ import annotations

import io
import json
import tarfile
import zlib

import numpy as np
import pytest

from data_prep.edge_maps import write_edge_manifest, write_edge_tars
from data_prep.manifest import load_manifest
from data_prep.preprocess import ShardOptions
from data_prep.shards import merge_partitions, plan_shards, write_partition
from data_prep.sources import open_source
from data_prep.storage import open_storage
from data_prep.tars import read_index
from pipelines.data.check import ShardCheck, find_cross_tar_duplicates
from pipelines.data.inspect import (
    contact_sheet,
    finished_edge_datasets,
    hole_area_stats,
    overlay_mask,
    plot_hole_areas,
    summarize_shards,
)
from pipelines.plots.images import DRAWN_EDGE_COLOR, decode_png

SIGMA = 1.5


@pytest.fixture(scope="session")
def intact_shards(photos, tmp_path_factory):
    """Shards with an edge dataset beside them, as the steps write them."""
    out = open_storage(tmp_path_factory.mktemp("shards"))
    source, options = open_source(str(photos)), ShardOptions(size=32, margin=4, format="png", val=0.2, test=0)
    partitions, _ = plan_shards(source, out, options, 5)
    manifest = merge_partitions(
        [write_partition(source, partition, out, options) for partition in partitions],
        options,
        source.uri,
        out,
    )
    edges = out.subfolder(f"edges/sigma-{SIGMA:g}")
    tars = [write_edge_tars(out, entry, {SIGMA: edges})[SIGMA] for entry in manifest.shards]
    write_edge_manifest(tars, SIGMA, manifest.digest, edges)
    return out


@pytest.fixture
def shards(intact_shards, tmp_path):
    """A copy of `intact_shards` to damage."""
    out = open_storage(tmp_path)
    for key, _ in intact_shards.list():
        out.write(key, intact_shards.read(key))
    return out


def find_problems(shards):
    check = ShardCheck.load(shards)
    problems = [str(finding) for finding in check.check_manifests()]
    results = [check.check_tar(entry) for entry in check.manifest.shards]
    names = [entry.name for entry in check.manifest.shards]
    problems += [str(finding) for findings, _ in results for finding in findings]
    return problems + [
        str(finding) for finding in find_cross_tar_duplicates(list(zip(names, [keys for _, keys in results])))
    ]


def rewrite_tar(shards, name, change):
    """Change the tar's members, but not its manifest entry and index."""
    with tarfile.open(fileobj=io.BytesIO(shards.read(name))) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for info, data in change(members):
            tar.addfile(info, io.BytesIO(data))
    shards.write(name, body.getvalue())


def test_intact_shards_pass(shards):
    assert find_problems(shards) == []
    assert list(finished_edge_datasets(shards, load_manifest(shards))) == [SIGMA]
    shards.write("edges/notes/read me.txt", b"no edges")
    assert find_problems(shards) == []


def test_a_flipped_byte_names_the_sample(shards):
    index, data = read_index(shards, "train-00001.tar"), bytearray(shards.read("train-00001.tar"))
    data[index["offsets"][1] + 30] ^= 4
    shards.write("train-00001.tar", bytes(data))
    problems = find_problems(shards)
    assert any(
        line == "train-00001.tar: its bytes are not those that were written (sha256)" for line in problems
    )
    assert any(index["keys"][1] in line and "CRC-32" in line for line in problems)
    assert len(problems) == 2


def test_truncated_and_missing_tars_are_named(shards):
    shards.write("train-00000.tar", shards.read("train-00000.tar")[:-11_000])
    shards.delete("train-00002.tar")
    shards.delete(f"edges/sigma-{SIGMA:g}/train-00003.tar")
    shards.write("train-00004.json", b"{}")
    problems = find_problems(shards)
    assert any("train-00000.tar: has" in line and "bytes instead of" in line for line in problems)
    assert any(
        line.startswith("train-00000.tar") and "lies beyond the tar's end" in line for line in problems
    )
    assert any(line.startswith("train-00002.tar: train-00002.tar is not in") for line in problems)
    assert any(line.startswith("edges of sigma 1.5, train-00003.tar: ") for line in problems)
    assert any("train-00004.json" in line and "damaged" in line for line in problems)


KINDS = {
    "link": tarfile.SYMTYPE,
    "hard link": tarfile.LNKTYPE,
    "folder": tarfile.DIRTYPE,
    "device": tarfile.CHRTYPE,
    "pipe": tarfile.FIFOTYPE,
}


@pytest.mark.parametrize(
    "kind", ["../../evil.png", "/etc/evil.png", "pipe:cat evil.png", "two\nlines.png", *KINDS]
)
def test_members_that_do_not_belong_are_named(shards, kind):
    def change(members):
        info = tarfile.TarInfo("0" * 16 + ".png" if kind in KINDS else kind)
        if kind in KINDS:
            info.type, info.linkname = KINDS[kind], "/etc/passwd"
        return [*members, (info, b"")]

    rewrite_tar(shards, "train-00000.tar", change)
    problems = find_problems(shards)
    assert any("do not unpack it" in line and "does not belong in a shard" in line for line in problems)
    assert not any("\n" in line for line in problems)


def test_edges_that_do_not_match_their_photographs_are_found(shards):
    edges = shards.subfolder(f"edges/sigma-{SIGMA:g}")
    index = read_index(edges, "train-00001.tar")
    for column in ("keys", "offsets", "sizes", "crc32"):
        index[column] = index[column][::-1]
    edges.write("train-00001.json", json.dumps(index).encode())
    listed = json.loads(edges.read("edges.json"))
    listed["shards"] = [entry for entry in listed["shards"] if entry["name"] != "train-00000.tar"]
    edges.write("edges.json", json.dumps(listed).encode())
    problems = find_problems(shards)
    assert "edges of sigma 1.5, train-00000.tar: edges.json does not name it" in problems
    assert any("train-00001.tar: its keys are not those of the photographs" in line for line in problems)


def rewrite_json(shards, key, change):
    record = json.loads(shards.read(key))
    change(record)
    shards.write(key, json.dumps(record).encode())


def reverse_columns(index):
    for column in index.values():
        column.reverse()


TAR, EDGES = "train-00001", f"edges/sigma-{SIGMA:g}/edges.json"


@pytest.mark.parametrize(
    ("key", "change", "problem"),
    [
        (f"{TAR}.json", lambda index: index.pop("shapes"), "does not give each sample one of its shapes"),
        (f"{TAR}.json", lambda index: index["names"].pop(), "does not give each sample one of its names"),
        (f"{TAR}.json", lambda index: index["shapes"].__setitem__(0, 3), "instead of 3 as the index says"),
        (f"{TAR}.json", lambda index: index["shapes"][0].reverse(), "as the index says"),
        (f"{TAR}.json", lambda index: index["offsets"].__setitem__(0, "0"), "have the wrong type"),
        (f"{TAR}.json", lambda index: index["sizes"].__setitem__(0, -1), "have the wrong type"),
        (f"{TAR}.json", lambda index: index["keys"].__setitem__(0, 7), "have the wrong type"),
        (f"{TAR}.json", reverse_columns, "not in the tar's order"),
        (f"{TAR}.json", lambda index: index["crc32"].__setitem__(0, 1), "(CRC-32)"),
        (
            EDGES,
            lambda record: record.update(shards_digest="0" * 64),
            "edges.json: was made from other shards",
        ),
        (EDGES, lambda record: record["shards"][0].pop("bytes"), "sigma 1.5, edges.json: is damaged"),
        (
            EDGES,
            lambda record: record["shards"][0].update(photos_sha256="0"),
            "was made from other photographs",
        ),
        ("manifest.json", lambda record: record["splits"].update(train=99), "says 99 train photographs"),
        ("manifest.json", lambda record: record["shards"].append(record["shards"][0]), "2 times"),
    ],
)
def test_contradictory_manifests_and_indexes_are_named(shards, key, change, problem):
    rewrite_json(shards, key, change)
    problems = find_problems(shards)
    assert any(problem in line for line in problems)


def test_lost_and_unreadable_records_are_named(shards, intact_shards):
    shards.write("partitions/00001.json", b"{")
    shards.delete("partitions/00002.json")
    problems = find_problems(shards)
    assert [line.split(":")[0] for line in problems] == ["partitions/00001.json", "partitions/00002.json"]
    for number in (1, 2):
        shards.write(f"partitions/{number:05d}.json", intact_shards.read(f"partitions/{number:05d}.json"))
    shards.write(EDGES, b"{")
    (problem,) = find_problems(shards)
    assert problem.startswith("edges of sigma 1.5, edges.json: is damaged (is not JSON: ")
    assert problem.endswith("): rebuild the edges")
    shards.delete(EDGES)
    assert find_problems(shards) == [
        "edges of sigma 1.5, edges.json: is missing: these edges were never finished, or it was lost"
    ]
    rewrite_json(shards, "manifest.json", lambda record: record["shards"][0].pop("sha256"))
    with pytest.raises(
        ValueError, match=r"manifest.json in .* damaged \(shards\[0\].sha256 is missing\): remove it"
    ):
        find_problems(shards)


def test_only_the_requested_sigmas_are_checked(shards):
    shards.delete(f"edges/sigma-{SIGMA:g}/{TAR}.tar")
    assert ShardCheck.load(shards, [SIGMA]).edge_datasets[0].sigma == SIGMA
    with pytest.raises(ValueError, match=r"no edges of sigma 3 \(there are: 1.5\): make them with"):
        ShardCheck.load(shards, [3])


def test_malicious_images_and_headers_are_findings(shards):
    """With matching checksums: a PNG two million pixels wide, and a header on which tarfile raises ValueError."""
    index, data = read_index(shards, f"{TAR}.tar"), bytearray(shards.read(f"{TAR}.tar"))
    start, end = index["offsets"][0], index["offsets"][0] + index["sizes"][0]
    data[start + 16 : start + 20] = (1 << 21).to_bytes(4, "big")
    data[start + 29 : start + 33] = zlib.crc32(data[start + 12 : start + 29]).to_bytes(4, "big")
    index["crc32"][0] = zlib.crc32(data[start:end])
    shards.write(f"{TAR}.json", json.dumps(index).encode())
    shards.write(f"{TAR}.tar", bytes(data))
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("0" * 16 + ".png")
        info.pax_headers = {"GNU.sparse.map": "not,numbers"}
        tar.addfile(info)
    shards.write("train-00002.tar", body.getvalue())
    problems = find_problems(shards)
    assert any(
        line.startswith(f"{TAR}.tar {index['keys'][0]}: ") and "cannot be decoded" in line
        for line in problems
    )
    assert any(line.startswith("train-00002.tar: is not a complete tar (") for line in problems)


def test_a_photograph_in_two_tars_is_found():
    problems = find_cross_tar_duplicates([("a.tar", ["1", "2"]), ("b.tar", ["3", "2"])])
    assert [str(finding) for finding in problems] == ["b.tar 2: is in a.tar too"]


@pytest.mark.slow
def test_a_contact_sheet_of_stored_and_of_new_edges(shards):
    sheet = contact_sheet(shards, "train", 5, None, "brush", 0)
    assert sheet.edges == "edges of sigma 1.5, stored"
    stored_keys = [
        key for entry in load_manifest(shards).shards for key in read_index(shards, entry.name)["keys"]
    ]
    assert len(set(sheet.keys)) == 5
    assert set(sheet.keys) < set(stored_keys)
    picture = decode_png(sheet.png)
    assert picture.shape[1] > 3 * 3 * 128
    assert contact_sheet(shards, "train", 5, None, "brush", 1).keys != sheet.keys
    everything = contact_sheet(shards, "train", 100, SIGMA, "brush", 0)
    shards.delete_tree("edges")
    computed = contact_sheet(shards, "train", 100, SIGMA, "brush", 0)
    assert "computed now" in computed.edges
    assert computed.png == everything.png  # identical to the stored edges
    assert summarize_shards(shards).photographs == load_manifest(shards).splits
    with pytest.raises(ValueError, match="split test"):
        contact_sheet(shards, "test", 5, None, "brush", 0)
    with pytest.raises(ValueError, match="count 0"):
        contact_sheet(shards, "train", 0, None, "brush", 0)


def test_only_the_hole_is_tinted():
    photo, mask = np.full((8, 9, 3), 100, np.uint8), np.zeros((8, 9), np.uint8)
    mask[2:4, 5:] = 1
    picture = overlay_mask(photo, mask)
    assert (picture[mask == 0] == 100).all()
    expected = 0.3 * 100 + 0.7 * np.array(DRAWN_EDGE_COLOR)
    assert np.abs(picture[mask == 1] - expected).max() <= 1


def test_hole_areas_are_those_of_the_masks():
    areas = hole_area_stats({"center": 1, "half": 1}, 64, 200, 0)
    assert areas["bands"]["20-30"] + areas["bands"]["40-50"] == 1
    assert areas["mean"] == pytest.approx(0.25 * areas["bands"]["20-30"] + 0.5 * areas["bands"]["40-50"])
    assert plot_hole_areas(areas).startswith(b"\x89PNG")
    for count, size in ((0, 64), (5, 7)):
        with pytest.raises(ValueError, match=f"count {count}, size {size}"):
            hole_area_stats("brush", size, count, 0)
