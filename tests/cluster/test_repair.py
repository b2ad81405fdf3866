"""Checks and repairs on a real Ray: every kind of damage at once, and all bytes as they were."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_prep.checking import Finding
from data_prep.preparing import ShardOptions
from data_prep.sources import bundled_photo
from data_prep.storage import Storage, open_storage
from pipelines.cluster.session import ray_session
from pipelines.data.fanout import check_shards, make_edges, shard_photographs
from pipelines.data.looking import Check
from pipelines.data.repairing import repair


def sums(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """48 crops of the bundled photographs, one of them twice, and a file that is none."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for number in range(48):
        photo = bundled_photo(("astronaut", "coffee", "china")[number % 3])
        top, left = (int(rng.integers(length - 64)) for length in photo.shape[:2])
        cv2.imwrite(str(folder / f"{number:02d}.png"), photo[top : top + 64, left : left + 64, ::-1])
    (folder / "49.png").write_bytes((folder / "07.png").read_bytes())
    (folder / "notes.txt").write_text("no photograph")
    return folder


def found(out: Storage, sigmas: Sequence[float] = ()) -> tuple[Check, list[Finding]]:
    check = Check.of(out, sigmas)
    return check, check.lists() + check_shards(check, lambda *_: None)


def damage(shards: Path, tars: list[str], unique: str) -> None:
    """A flipped byte, a cut tar, missing ones, an index and edges out of step, a lost edges.json."""
    flipped = bytearray((shards / tars[0]).read_bytes())
    flipped[700] ^= 1
    (shards / tars[0]).write_bytes(flipped)
    (shards / tars[1]).write_bytes((shards / tars[1]).read_bytes()[:3000])
    (shards / tars[2]).unlink()
    (shards / unique).unlink()
    index = json.loads((shards / tars[3].replace(".tar", ".json")).read_text())
    index["keys"].reverse()
    (shards / tars[3].replace(".tar", ".json")).write_text(json.dumps(index))
    (shards / "edges/sigma-1" / tars[5]).write_bytes((shards / "edges/sigma-1" / tars[0]).read_bytes())
    (shards / "edges/sigma-1" / tars[4]).unlink()
    (shards / "edges/sigma-2.5/edges.json").unlink()


def test_repairs_bring_every_byte_back(photos: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    out = open_storage(shards)
    with ray_session():
        shard_photographs(str(photos), out, ShardOptions(size=48, val=0, test=0), 8, lambda *_: None)
        make_edges(out, {s: out.sub(f"edges/sigma-{s:g}") for s in (1.0, 2.5)}, lambda *_: None)
        whole = sums(shards)
        assert found(out)[1] == []

        (unique,) = (path.name for path in shards.glob("*-unique.tar"))
        tars = sorted(path.name for path in shards.glob("*.tar") if path.name != unique)
        damage(shards, tars, unique)
        damaged = sums(shards)
        check, findings = found(out)
        named = {(finding.shard, finding.sigma) for finding in findings}
        photographs = {(name, None) for name in (*tars[:4], unique)}
        edges = {(tars[4], 1.0), (tars[5], 1.0), ("edges.json", 2.5)}
        assert named >= photographs | edges
        assert {name for name, _ in named - photographs - edges} <= {
            tars[3]
        }  # its edges are out of step with it
        assert {finding.sigma for finding in found(out, [1.0])[1]} == {None, 1.0}
        assert sums(shards) == damaged  # a check changes nothing

        record = json.loads((shards / "slices/00000.json").read_text())
        lost = photos / record["names"][0]
        lost.rename(tmp_path / "aside")
        (photos / "later.png").write_bytes((photos / "08.png").read_bytes()[:-1])
        (reason,) = repair(check, findings, lambda *_: None)
        assert f"no longer gives {lost.name}" in reason
        assert {name for name, digest in sums(shards).items() if whole[name] != digest} == {tars[0]}

        (tmp_path / "aside").rename(lost)
        assert repair(*found(out), lambda *_: None) == []
        assert found(out)[1] == []
    assert sums(shards) == whole
