"""Damage of every kind is found and named; whole shards pass."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

from data_prep.canny import assemble_edges, write_edge_shard
from data_prep.shards import load_manifest
from data_prep.storage import open_storage
from data_prep.tars import read_index
from pipelines.looking import Check, contact_sheet, facts, hole_areas, known_sigmas, mask_picture, repeated

SIGMA = 1.5


@pytest.fixture
def whole(shards, tmp_path):
    """Shards with edges beside them."""
    out = open_storage(tmp_path)
    for key, _ in shards.list():
        out.write(key, shards.read(key))
    manifest, edges = load_manifest(out), out.sub(f"edges/sigma-{SIGMA:g}")
    made = [write_edge_shard(out, entry, {SIGMA: edges})[SIGMA] for entry in manifest["shards"]]
    assemble_edges(made, SIGMA, manifest["digest"], edges)
    return out


def found(shards):
    check = Check.of(shards)
    results = [check.tar(entry) for entry in check.manifest["shards"]]
    names = [entry["name"] for entry in check.manifest["shards"]]
    listed = [str(finding) for findings, _ in results for finding in findings]
    return listed + [str(finding) for finding in repeated(list(zip(names, [keys for _, keys in results])))]


def rewritten(shards, name, change):
    """The tar with other members, and its manifest entry and index as they were."""
    with tarfile.open(fileobj=io.BytesIO(shards.read(name))) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for info, data in change(members):
            tar.addfile(info, io.BytesIO(data))
    shards.write(name, body.getvalue())


def test_whole_shards_pass(whole):
    assert found(whole) == []
    assert list(known_sigmas(whole)) == [SIGMA]


def test_a_flipped_byte_names_the_sample(whole):
    index, data = read_index(whole, "train-00001.tar"), bytearray(whole.read("train-00001.tar"))
    data[index["offsets"][1] + 30] ^= 4
    whole.write("train-00001.tar", bytes(data))
    told = found(whole)
    assert any(line == "train-00001.tar: its bytes are not those that were written (sha256)" for line in told)
    assert any(index["keys"][1] in line and "CRC-32" in line for line in told)
    assert len(told) == 2


def test_a_cut_tar_and_missing_ones(whole):
    whole.write("train-00000.tar", whole.read("train-00000.tar")[:-11_000])
    whole.delete("train-00002.tar")
    whole.delete(f"edges/sigma-{SIGMA:g}/train-00003.tar")
    whole.write("train-00004.json", b"{}")
    told = found(whole)
    assert any("train-00000.tar: has" in line and "bytes instead of" in line for line in told)
    assert any(line.startswith("train-00000.tar") and "lies beyond the tar's end" in line for line in told)
    assert any(line.startswith("train-00002.tar: train-00002.tar is not in") for line in told)
    assert any(line.startswith("edges of sigma 1.5, train-00003.tar: ") for line in told)
    assert any("train-00004.json" in line and "damaged" in line for line in told)


@pytest.mark.parametrize("kind", ["../../evil.png", "/etc/evil.png", "pipe:cat evil.png", "link", "folder"])
def test_members_that_do_not_belong_are_named(whole, kind):
    def change(members):
        info = tarfile.TarInfo({"link": "0" * 16 + ".png", "folder": "sub"}.get(kind, kind))
        if kind == "link":
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        if kind == "folder":
            info.type = tarfile.DIRTYPE
        return [*members, (info, b"")]

    rewritten(whole, "train-00000.tar", change)
    told = found(whole)
    assert any("do not unpack it" in line and "does not belong in a shard" in line for line in told)


def test_edges_out_of_step_are_found(whole):
    edges = whole.sub(f"edges/sigma-{SIGMA:g}")
    index = read_index(edges, "train-00001.tar")
    for column in ("keys", "offsets", "sizes", "crc32"):
        index[column] = index[column][::-1]
    edges.write("train-00001.json", json.dumps(index).encode())
    listed = json.loads(edges.read("edges.json"))
    listed["shards"] = [entry for entry in listed["shards"] if entry["name"] != "train-00000.tar"]
    edges.write("edges.json", json.dumps(listed).encode())
    told = found(whole)
    assert "edges of sigma 1.5, train-00000.tar: edges.json does not name it" in told
    assert any("train-00001.tar: its keys are not those of the photographs" in line for line in told)


def test_a_photograph_in_two_tars_is_found():
    told = repeated([("a.tar", ["1", "2"]), ("b.tar", ["3", "2"])])
    assert [str(finding) for finding in told] == ["b.tar 2: is in a.tar too"]


def test_a_contact_sheet_of_stored_and_of_new_edges(whole, shards):
    sheet, edges = contact_sheet(whole, "train", 5, None, "brush", 0)
    assert sheet.startswith(b"\x89PNG")
    assert edges == "edges of sigma 1.5, stored"
    assert "computed now" in contact_sheet(shards, "train", 100, 2.0, "center", 0)[1]
    assert facts(whole)["photographs"] == load_manifest(whole)["splits"]
    with pytest.raises(ValueError, match="split test"):
        contact_sheet(whole, "test", 5, None, "brush", 0)


def test_hole_areas_are_those_of_the_masks():
    found = hole_areas({"center": 1, "half": 1}, 64, 200, 0)
    assert found["bands"]["20-30"] + found["bands"]["40-50"] == 1
    assert found["mean"] == pytest.approx(0.25 * found["bands"]["20-30"] + 0.5 * found["bands"]["40-50"])
    assert mask_picture(found).startswith(b"\x89PNG")
