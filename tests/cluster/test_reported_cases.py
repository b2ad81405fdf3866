"""Small inputs on which a release failed for a new user, each with the correct outcome."""

from __future__ import annotations

import re
import shutil
import sqlite3
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from data_prep.images import decode_photo
from data_prep.sources import open_source
from data_prep.uris import sqlite_url
from pipelines.durable.memory import explain_out_of_memory
from pipelines.inference.fill import fill
from pipelines.registry import load_model
from support.cluster_harness import FinishedDemo, clean_environment
from support.mlflow_server import MlflowServer

TINY = [
    "context_encoder-small",
    "--set=models.context_encoder.width=0.125",
    *(f"--set=train.{key}=4" for key in ("steps.train", "checkpoint_every", "log_every", "batch")),
    *("--set=data.val=0.2", "--set=data.test=0.2"),
    *("--set=evaluate.max_photos=2", "--set=evaluate.grid_rows=1", "--set=evaluate.distance=null"),
]
PATIENCE = 60.0  # seconds on a busy machine; the reported case took 14 minutes
HOLE = np.zeros((120, 160), bool)
HOLE[40:70, 50:90] = True
RAYS_MESSAGE = """1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 127.0.0.1, \
ID: 5c5e8d7a93c5) was 21.32GB used / 23.54GB limit (0.905693)
Selected to kill: (Task: job ID=01000000, lease ID=0100000001000000, task name=train-context_encoder, required \
resources={CPU: 1}, pid=13610, actual memory used=0.33GB, worker ID=2772563afeb5)
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
12295\t7.34\t/home/somebody/venv/bin/python df2.py
12299\t6.36\t/home/somebody/venv/bin/python df1.py
13610\t0.33\tray::train-context_encoder
13533\t0.06\tray::Board
Refer to the documentation on how to address the out of memory issue"""
CHAMPION = "models:/context_encoder@champion"


@dataclass(frozen=True)
class Case:
    """A test's own folder, and the finished run that all tests share (read-only)."""

    folder: Path
    photos: Path
    finished: Path

    @property
    def tracking(self) -> str:
        return sqlite_url(self.finished / "mlflow.db")

    def inpaint(self, *arguments: object, **environment: str) -> tuple[int, str]:
        """Run a command in the folder; return its exit status and output."""
        process = subprocess.run(
            [sys.executable, "-m", "pipelines", *map(str, arguments)],
            cwd=self.folder,
            env=clean_environment() | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert "Traceback" not in process.stdout, process.stdout
        return process.returncode, process.stdout

    def run(self, storage: object, *options: str, source: Path | None = None) -> tuple[int, str]:
        options_of_run = ["--storage", str(storage), "--set", f"data.source={source or self.photos}"]
        return self.inpaint("run", *TINY, *options_of_run, *options)

    def fill(self, photo: object, mask: object, out: str, *options: str) -> tuple[int, str]:
        return self.inpaint(
            "fill", CHAMPION, photo, mask, "--out", out, "--tracking-uri", self.tracking, *options
        )

    def photograph(self) -> np.ndarray:
        """Save photo.png and mask.png (white hole on black); return the photograph, uint8 [120,160,3]."""
        pixels = cv2.resize(decode_photo(next(self.photos.glob("*.png")).read_bytes()), (160, 120))
        Image.fromarray(pixels).save(self.folder / "photo.png")
        Image.fromarray(np.where(HOLE, 255, 0).astype(np.uint8)).save(self.folder / "mask.png")
        return pixels


def bundled_photographs(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    source = open_source("bundled", tile_size=96)
    names = source.names()
    for number, name in enumerate(names[:: len(names) // count][:count]):
        (folder / f"img_{number}.png").write_bytes(source.read(name))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundled_photographs(tmp_path_factory.mktemp("reported") / "photos", 12)


@pytest.fixture
def case(finished: FinishedDemo, photos: Path, tmp_path: Path) -> Case:
    return Case(tmp_path, photos, finished.run.storage)


def colours_and_class_numbers(case: Case) -> None:
    photo = case.photograph()
    masks = case.folder / "masks"
    masks.mkdir()
    red = np.zeros((120, 160, 3), np.uint8)
    red[HOLE] = (255, 0, 0)
    Image.fromarray(red).save(masks / "red.png")
    voc = Image.fromarray(HOLE.astype(np.uint8), "P")
    voc.putpalette([0, 0, 0, 128, 0, 0] + [0] * 762)
    voc.save(masks / "voc.png")
    Image.fromarray(np.where(HOLE, 2, 0).astype(np.uint8)).save(masks / "class2.png")
    Image.fromarray(HOLE.astype(np.uint16)).save(masks / "u16_01.png")
    for mask in ("red", "voc"):  # all kinds of masks are tested in tests/data_prep
        status, output = case.fill("photo.png", masks / f"{mask}.png", f"{mask}-filled.png")
        assert status == 0, output
        changed = (np.asarray(Image.open(case.folder / f"{mask}-filled.png")) != photo).any(2)
        assert changed.any()
        assert not changed[~HOLE].any()
    (masks / "nothing.png").write_bytes(cv2.imencode(".png", np.zeros((120, 160), np.uint8))[1].tobytes())
    options = (f"--set=masks={{{masks}: 1}}", f"--set=evaluate.masks=[{masks}]")
    images = ("--images", case.photos, "--masks", masks, "--out", "scores", "--tracking-uri", case.tracking)
    for status, output in (case.run("r", *options), case.inpaint("evaluate", CHAMPION, *images)):
        assert status == 1
        assert "nothing.png" in output.splitlines()[-1]
        assert "hole" in output.splitlines()[-1]
        assert "Ray" not in output
    assert not (case.folder / "scores").exists()


def storages_named_like_addresses(case: Case) -> None:
    """Each storage has its own database, also if its name is the URL-decoded name of a neighbour."""
    run_count = runs_of(case.finished)
    folder = case.finished.parent
    assert "%20" in folder.name
    neighbour = folder.with_name(folder.name.replace("%", "%25")) / case.finished.name
    status, output = case.run(neighbour, "--set=scaling.gpus_per_worker=1")  # fails after the start of Ray
    assert status == 1
    assert "GPU" in output.splitlines()[-1]
    assert runs_of(neighbour) == 1
    assert runs_of(case.finished) == run_count
    tracking = sqlite_url(neighbour / "mlflow.db")
    status, output = case.inpaint("models", "list", "--tracking-uri", tracking)
    assert (status, "context_encoder" in output) == (0, False), output


def runs_of(storage: Path) -> int:
    with closing(sqlite3.connect(storage / "mlflow.db")) as database:
        ((count,),) = database.execute("select count(*) from runs").fetchall()
    return count


def the_address_of_a_cluster_that_is_gone(case: Case) -> None:
    started_at = time.monotonic()
    status, output = case.inpaint("shard", case.photos, "s", RAY_ADDRESS="127.0.0.1:1")
    assert status == 1
    assert time.monotonic() - started_at < PATIENCE
    last_line = output.splitlines()[-1]
    assert "no Ray cluster answers at 127.0.0.1:1 (RAY_ADDRESS)" in last_line
    assert "unset RAY_ADDRESS" in last_line
    assert "gcs_client" not in output


def sixteen_bits_with_alpha(case: Case) -> None:
    deep = case.photograph().astype(np.uint16) * 257 + np.arange(160, dtype=np.uint16)[:, None]
    opaque = np.full((120, 160), 65535, np.uint16)
    layouts = {"rgb16": (deep, 2), "rgba16": (np.dstack([deep, opaque]), 6)}
    layouts["la16"] = (np.dstack([deep[..., 0], opaque]), 4)
    for name, (pixels, colour_type) in layouts.items():
        (case.folder / f"{name}.png").write_bytes(png16(pixels, colour_type))
    model = load_model(CHAMPION, tracking_uri=case.tracking)
    for name, (pixels, colour_type) in layouts.items():
        paths = [case.folder / file for file in (f"{name}.png", "mask.png", f"filled-{name}.png")]
        result = fill(model, *paths)
        assert "16 bits per channel are kept" in " ".join(result.notes)
        written = unpng16((case.folder / f"filled-{name}.png").read_bytes(), colour_type)
        assert np.array_equal(written[~HOLE], pixels[~HOLE])
        assert not np.array_equal(written[HOLE], pixels[HOLE])


def png16(pixels: np.ndarray, colour_type: int) -> bytes:
    """A PNG of 16 bits per channel, which Pillow cannot write."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def unpng16(data: bytes, colour_type: int) -> np.ndarray:
    """uint16 [120,160,C] of a PNG that must have 16 bits per channel and this colour type (2 RGB, 4 LA, 6 RGBA)."""
    assert struct.unpack(">BB", data[24:26]) == (16, colour_type)
    if colour_type == 4:  # OpenCV gives grey with alpha as BGRA
        bgra = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        assert (bgra[..., 0] == bgra[..., 2]).all()
        return bgra[..., [0, 3]]
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    return pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]


def a_proxy_and_a_server_on_loopback(case: Case) -> None:
    with MlflowServer(case.folder) as server:
        proxy = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
        status, output = case.inpaint("models", "list", "--tracking-uri", server.uri, **proxy)
    assert status == 0, output


def memory_of_other_programs(case: Case) -> None:
    """With the message that Ray wrote in the reported case, without filling this machine's memory."""
    message, retryable = explain_out_of_memory(RAYS_MESSAGE, "set scaling.micro_batch_size = 4")
    assert message.startswith(
        "the machine ran out of memory; this training held 0.3 GB of 23.5, others most of the rest (python df2.py 7.3 GB)"
    )
    assert "micro_batch_size" not in message
    assert retryable


def a_deleted_experiment(case: Case) -> None:
    storage = case.folder / "r"
    storage.mkdir()
    client = MlflowClient(sqlite_url(storage / "mlflow.db"))
    experiment_id = client.create_experiment(
        "inpaint", artifact_location=(storage / "mlflow-artifacts").as_uri()
    )
    client.delete_experiment(experiment_id)
    status, output = case.run("r")
    assert status == 1
    last_line = output.splitlines()[-1]
    assert "the experiment inpaint was deleted" in last_line
    assert (
        f"mlflow experiments restore -x {experiment_id}" in last_line
        or f"restore --experiment-id {experiment_id}" in last_line
    )


def a_name_that_cannot_be_registered(case: Case) -> None:
    name = "--set=models.context_encoder.register_as=my model"
    for status, output in (case.inpaint("plan", *TINY, name), case.run("r", name)):
        assert status == 1
        assert "'my model' is not a valid name for a registered model" in output.splitlines()[-1]
        assert "shard" not in output


def no_photographs_held_out(case: Case) -> None:
    """Reported right after sharding and, in the next run, before Ray starts. The storage's name contains a `?`."""
    (case.folder / "one").mkdir()
    shutil.copy(case.photos / "img_0.png", case.folder / "one")
    for starts in (True, False):
        status, output = case.run("x?1", source=case.folder / "one")
        assert status == 1
        words = "the split (test|train) of .*one holds no photographs; give more, or "
        assert re.search(words, output.splitlines()[-1])
        assert ("starting Ray" in output) == starts
        assert "train-context_encoder" not in output
    attempted = {path.name.partition("-")[2] for path in (case.folder / "x?1/attempts").iterdir()}
    assert attempted == {"shard"}
    assert sorted(path.name for path in case.folder.iterdir()) == ["one", "x?1"]
    assert runs_of(case.folder / "x?1") >= 1


CASES = (
    colours_and_class_numbers,
    storages_named_like_addresses,
    the_address_of_a_cluster_that_is_gone,
    sixteen_bits_with_alpha,
    a_proxy_and_a_server_on_loopback,
    memory_of_other_programs,
    a_deleted_experiment,
    a_name_that_cannot_be_registered,
    no_photographs_held_out,
)


@pytest.mark.parametrize("check", CASES, ids=lambda check: check.__name__)
def test_a_reported_case(case: Case, check: Callable[[Case], None]) -> None:
    check(case)
