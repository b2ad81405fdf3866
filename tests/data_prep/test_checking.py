"""Damage of every kind is found and named; whole shards pass."""

from __future__ import annotations

import io
import json
import tarfile
import zlib

import numpy as np
import pytest

from data_prep.canny import assemble_edges, write_edge_shard
from data_prep.preparing import ShardOptions
from data_prep.shards import assemble, load_manifest, make_slice, plan
from data_prep.sources import open_source
from data_prep.storage import open_storage
from data_prep.tars import read_index
from pipelines.data.looking import (
    Check,
    contact_sheet,
    facts,
    hole_areas,
    known_sigmas,
    mask_picture,
    overlaid,
    repeated,
)
from pipelines.evaluation.figures import DRAWN_EDGE, decode_png

SIGMA = 1.5


@pytest.fixture(scope="session")
def made(photos, tmp_path_factory):
    """Shards with edges beside them, as the steps make them."""
    out = open_storage(tmp_path_factory.mktemp("whole"))
    source, options = open_source(str(photos)), ShardOptions(size=32, margin=4, format="png", val=0.2, test=0)
    slices, _ = plan(source, out, options, 5)
    manifest = assemble(
        [make_slice(source, piece, out, options) for piece in slices], options, source.uri, out
    )
    edges = out.sub(f"edges/sigma-{SIGMA:g}")
    tars = [write_edge_shard(out, entry, {SIGMA: edges})[SIGMA] for entry in manifest["shards"]]
    assemble_edges(tars, SIGMA, manifest["digest"], edges)
    return out


@pytest.fixture
def whole(made, tmp_path):
    """A copy of them."""
    out = open_storage(tmp_path)
    for key, _ in made.list():
        out.write(key, made.read(key))
    return out


def found(shards):
    check = Check.of(shards)
    lists = [str(finding) for finding in check.lists()]
    results = [check.tar(entry) for entry in check.manifest["shards"]]
    names = [entry["name"] for entry in check.manifest["shards"]]
    listed = lists + [str(finding) for findings, _ in results for finding in findings]
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
    assert list(known_sigmas(whole, load_manifest(whole))) == [SIGMA]
    whole.write("edges/notes/read me.txt", b"no edges")
    assert found(whole) == []


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
def test_members_that_do_not_belong_are_named(whole, kind):
    def change(members):
        info = tarfile.TarInfo("0" * 16 + ".png" if kind in KINDS else kind)
        if kind in KINDS:
            info.type, info.linkname = KINDS[kind], "/etc/passwd"
        return [*members, (info, b"")]

    rewritten(whole, "train-00000.tar", change)
    told = found(whole)
    assert any("do not unpack it" in line and "does not belong in a shard" in line for line in told)
    assert not any("\n" in line for line in told)


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


def changed(shards, key, change):
    told = json.loads(shards.read(key))
    change(told)
    shards.write(key, json.dumps(told).encode())


def turned(index):
    for column in index.values():
        column.reverse()


TAR, SET = "train-00001", f"edges/sigma-{SIGMA:g}/edges.json"


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        (f"{TAR}.json", lambda index: index.pop("shapes"), "does not give each sample one of its shapes"),
        (f"{TAR}.json", lambda index: index["names"].pop(), "does not give each sample one of its names"),
        (f"{TAR}.json", lambda index: index["shapes"].__setitem__(0, 3), "instead of 3 as the index says"),
        (f"{TAR}.json", lambda index: index["shapes"][0].reverse(), "as the index says"),
        (f"{TAR}.json", lambda index: index["offsets"].__setitem__(0, "0"), "holds other things than"),
        (f"{TAR}.json", lambda index: index["sizes"].__setitem__(0, -1), "holds other things than"),
        (f"{TAR}.json", lambda index: index["keys"].__setitem__(0, 7), "holds other things than"),
        (f"{TAR}.json", turned, "not in the tar's order"),
        (f"{TAR}.json", lambda index: index["crc32"].__setitem__(0, 1), "(CRC-32)"),
        (SET, lambda told: told.update(shards_digest="0" * 64), "edges.json: was made from other shards"),
        (SET, lambda told: told["shards"][0].pop("bytes"), "sigma 1.5, edges.json: is damaged"),
        (SET, lambda told: told["shards"][0].update(photos_sha256="0"), "was made from other photographs"),
        ("manifest.json", lambda told: told["splits"].update(train=99), "says 99 train photographs"),
        ("manifest.json", lambda told: told["shards"].append(told["shards"][0]), "2 times"),
    ],
)
def test_lists_that_do_not_agree_are_named(whole, key, change, words):
    changed(whole, key, change)
    told = found(whole)
    assert any(words in line for line in told)


def test_lost_and_unreadable_lists_are_named(whole, made):
    whole.write("slices/00001.json", b"{")
    whole.delete("slices/00002.json")
    told = found(whole)
    assert [line.split(":")[0] for line in told] == ["slices/00001.json", "slices/00002.json"]
    for number in (1, 2):
        whole.write(f"slices/{number:05d}.json", made.read(f"slices/{number:05d}.json"))
    whole.write(SET, b"{")
    assert found(whole) == ["edges of sigma 1.5, edges.json: is damaged"]
    whole.delete(SET)
    assert found(whole) == [
        "edges of sigma 1.5, edges.json: is missing: these edges were never finished, or it was lost"
    ]
    changed(whole, "manifest.json", lambda told: told["shards"][0].pop("sha256"))
    with pytest.raises(ValueError, match=r"manifest.json in .* damaged: remove it"):
        found(whole)


def test_only_the_sigmas_asked_for_are_checked(whole):
    whole.delete(f"edges/sigma-{SIGMA:g}/{TAR}.tar")
    assert Check.of(whole, [SIGMA]).edges[0].sigma == SIGMA
    with pytest.raises(ValueError, match=r"no edges of sigma 3 \(there are: 1.5\): make them with"):
        Check.of(whole, [3])


def test_pictures_and_headers_made_to_do_harm_are_findings(whole):
    """With sums that agree: a PNG that says it is two million pixels wide, and a header tarfile raises ValueError at."""
    index, data = read_index(whole, f"{TAR}.tar"), bytearray(whole.read(f"{TAR}.tar"))
    start, end = index["offsets"][0], index["offsets"][0] + index["sizes"][0]
    data[start + 16 : start + 20] = (1 << 21).to_bytes(4, "big")
    data[start + 29 : start + 33] = zlib.crc32(data[start + 12 : start + 29]).to_bytes(4, "big")
    index["crc32"][0] = zlib.crc32(data[start:end])
    whole.write(f"{TAR}.json", json.dumps(index).encode())
    whole.write(f"{TAR}.tar", bytes(data))
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("0" * 16 + ".png")
        info.pax_headers = {"GNU.sparse.map": "not,numbers"}
        tar.addfile(info)
    whole.write("train-00002.tar", body.getvalue())
    told = found(whole)
    assert any(
        line.startswith(f"{TAR}.tar {index['keys'][0]}: ") and "cannot be decoded" in line for line in told
    )
    assert any(line.startswith("train-00002.tar: is no whole tar (") for line in told)


def test_a_photograph_in_two_tars_is_found():
    told = repeated([("a.tar", ["1", "2"]), ("b.tar", ["3", "2"])])
    assert [str(finding) for finding in told] == ["b.tar 2: is in a.tar too"]


def test_a_contact_sheet_of_stored_and_of_new_edges(whole):
    sheet = contact_sheet(whole, "train", 5, None, "brush", 0)
    assert sheet.edges == "edges of sigma 1.5, stored"
    held = [
        key for entry in load_manifest(whole)["shards"] for key in read_index(whole, entry["name"])["keys"]
    ]
    assert len(set(sheet.keys)) == 5
    assert set(sheet.keys) < set(held)
    picture = decode_png(sheet.png)
    assert picture.shape[1] > 3 * 3 * 128
    assert contact_sheet(whole, "train", 5, None, "brush", 1).keys != sheet.keys
    everything = contact_sheet(whole, "train", 100, SIGMA, "brush", 0)
    whole.delete_tree("edges")
    computed = contact_sheet(whole, "train", 100, SIGMA, "brush", 0)
    assert "computed now" in computed.edges
    assert computed.png == everything.png  # the stored ones are no others
    assert facts(whole)["photographs"] == load_manifest(whole)["splits"]
    with pytest.raises(ValueError, match="split test"):
        contact_sheet(whole, "test", 5, None, "brush", 0)
    with pytest.raises(ValueError, match="count 0"):
        contact_sheet(whole, "train", 0, None, "brush", 0)


def test_the_hole_is_tinted_and_nothing_else_is():
    photo, mask = np.full((8, 9, 3), 100, np.uint8), np.zeros((8, 9), np.uint8)
    mask[2:4, 5:] = 1
    picture = overlaid(photo, mask)
    assert (picture[mask == 0] == 100).all()
    expected = 0.3 * 100 + 0.7 * np.array(DRAWN_EDGE)
    assert np.abs(picture[mask == 1] - expected).max() <= 1


def test_hole_areas_are_those_of_the_masks():
    found = hole_areas({"center": 1, "half": 1}, 64, 200, 0)
    assert found["bands"]["20-30"] + found["bands"]["40-50"] == 1
    assert found["mean"] == pytest.approx(0.25 * found["bands"]["20-30"] + 0.5 * found["bands"]["40-50"])
    assert mask_picture(found).startswith(b"\x89PNG")
    for count, size in ((0, 64), (5, 7)):
        with pytest.raises(ValueError, match=f"count {count}, size {size}"):
            hole_areas("brush", size, count, 0)
