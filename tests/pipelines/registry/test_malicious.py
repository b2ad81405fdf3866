"""Models and checkpoints that were made to do harm: refused in one line by every way in, and nothing of theirs runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from ray.train import Checkpoint
from stores import Store, photograph

from data_prep.storage import open_storage
from models.features import load_features
from pipelines.__main__ import main
from pipelines.durable.attempt import FINAL, failure
from pipelines.registry import RegistryError, load_model
from pipelines.registry.export_version import export_version
from pipelines.registry.importing import import_checkpoint
from pipelines.registry.program import clean_program
from pipelines.training.train import read_checkpoint, read_part, write_part
from pipelines.training.weights import load_weights

GRAPH, CONFIG = "model/models/model.json", "model/data/weights/model_weights_config.json"
Records = dict[str, bytes]


class Trap:
    """What a pickle can do when it is read: make a folder, here."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (self.folder,)


@pytest.fixture
def sprung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that is there when a trap has sprung. MLflow and torch are as they come."""
    for name in ("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "MLFLOW_ALLOW_MODEL_CODE_EXECUTION"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "sprung"


# -- checkpoints -----------------------------------------------------------------------------------------------


def checkpoint(folder: Path, trap: Trap) -> Path:
    """Every file that somebody might read as weights, each a pickle that springs the trap."""
    folder.mkdir()
    torch.save({"step": 1, "networks": trap}, folder / "state.pt")
    (folder / "journal.json").write_text("[]")
    (folder / "model.safetensors").write_bytes(pickle.dumps(trap))
    (folder / "model.json").write_text(json.dumps({"name": "context_encoder", "options": {"size": 32}}))
    return folder


WAYS: dict[str, Callable[[Path], Any]] = {
    "resume": lambda folder: read_checkpoint(Checkpoint(str(folder))),
    "go on": lambda folder: read_part(open_storage(folder)),
    "weights": load_weights,
    "load": load_model,
    "import": lambda folder: import_checkpoint("deepfill_v1", [folder / "state.pt"]),
    "features": lambda folder: load_features("vgg19", folder / "state.pt"),
    "lite features": lambda folder: load_features("efficientnet_lite0", folder / "model.safetensors"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_pickled_checkpoint_is_refused(way: str, tmp_path: Path, sprung: Path) -> None:
    folder = checkpoint(tmp_path / "checkpoint", Trap(sprung))
    with pytest.raises(Exception) as error:
        WAYS[way](folder)
    assert "\n" not in failure(error.value)["error"]  # as a step says it
    assert not sprung.exists()


@pytest.mark.parametrize("left", [0, 100, 900])
def test_a_damaged_checkpoint_is_refused_by_name(left: int, tmp_path: Path) -> None:
    folder = tmp_path / "training" / "step-1"
    folder.mkdir(parents=True)
    write_part(open_storage(folder), {"step": 1, "weights": torch.arange(100.0)}, [])
    whole = (folder / "state.pt").read_bytes()
    (folder / "state.pt").write_bytes(whole[:left])
    with pytest.raises(
        ValueError, match=f"{folder}/state.pt is damaged.* delete {folder.parent} to"
    ) as error:
        read_checkpoint(Checkpoint(str(folder)))
    assert isinstance(error.value, FINAL)  # it would only come again


def test_the_trap_springs_where_it_is_not_refused(tmp_path: Path, sprung: Path) -> None:
    folder = checkpoint(tmp_path / "checkpoint", Trap(sprung))
    torch.load(folder / "state.pt", weights_only=False)
    assert sprung.exists()


@pytest.mark.parametrize("command", ["fill", "import"])
def test_the_commands_refuse_it_in_one_line(
    command: str, tmp_path: Path, sprung: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(tmp_path / "checkpoint", Trap(sprung))
    arguments = {
        "fill": [str(folder), *pictures(tmp_path), "--out", str(tmp_path / "out.png")],
        "import": ["deepfill_v1", str(folder / "state.pt"), "--tracking", f"sqlite:///{tmp_path}/mlflow.db"],
    }
    assert call(command, *arguments[command]) == 1
    told = capsys.readouterr().err
    assert (told.count("\n"), told.startswith(f"inpaint {command}: ")) == (1, True), told
    assert not sprung.exists()


def pictures(folder: Path) -> list[str]:
    for name, pixels in zip(("photo.png", "mask.png"), photograph()):
        cv2.imwrite(str(folder / name), pixels * np.uint8(255) if pixels.ndim == 2 else pixels)
    return [str(folder / "photo.png"), str(folder / "mask.png")]


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        raise SystemExit(main(list(arguments)))
    return int(end.value.code or 0)


# -- versions of the registry ----------------------------------------------------------------------------------


def pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def python_function(folder: Path, trap: Trap) -> None:
    """A python_function with a pickled model, and no exported program."""
    shutil.rmtree(folder / "data")
    (folder / "data").mkdir()
    for name in ("python_model.pkl", "data/python_model.pkl"):
        (folder / name).write_bytes(pickle.dumps(trap))
    flavor = {"loader_module": "mlflow.pyfunc.model", "python_model": "python_model.pkl"}
    describe(folder, lambda about: about.update(flavors={"python_function": flavor}))


def own_loader(folder: Path, trap: Trap) -> None:
    """Code beside the program, under a name as ours are, which the description has loaded."""
    for place in ("code", "data/code"):
        (folder / place).mkdir()
        for name in ("inpaint_loader.py", "onnxscript.py"):
            (folder / place / name).write_text(f"import os\nos.makedirs({trap.folder!r}, exist_ok=True)\n")
    (folder / "data" / "model.pth").write_bytes(pickled(trap))
    (folder / "data" / "pickle_module_info.txt").write_text("inpaint_loader")

    def change(about: dict[str, Any]) -> None:
        about["flavors"]["pytorch"]["code"] = "data/code"
        about["flavors"]["python_function"] |= {"loader_module": "inpaint_loader", "code": "code"}

    describe(folder, change)


def code_beside(folder: Path, trap: Trap) -> None:
    """The same without a pickled model: the path to its code would be the first in sys.path."""
    own_loader(folder, trap)
    for name in ("model.pth", "pickle_module_info.txt"):
        (folder / "data" / name).unlink()


def elsewhere(folder: Path, trap: Trap) -> None:
    """The program is somewhere else, where another file lies beside it."""
    own_loader(folder, trap)
    describe(
        folder, lambda about: about["flavors"]["pytorch"].update(code=None, model_data=str(folder / "data"))
    )


def pickled_model(folder: Path, trap: Trap) -> None:
    (folder / "data" / "model.pth").write_bytes(pickled(trap))
    (folder / "data" / "pickle_module_info.txt").write_text("mlflow.pytorch.pickle_module")


def description(folder: Path, trap: Trap) -> None:
    (folder / "MLmodel").write_text(f"flavors: !!python/object/apply:os.makedirs [{trap.folder}]\n")


def bare_pickle(folder: Path, trap: Trap) -> None:
    (folder / "data" / "model.pt2").write_bytes(pickle.dumps(trap))


def saved_pickle(folder: Path, trap: Trap) -> None:
    """A zip, as torch.save makes it."""
    (folder / "data" / "model.pt2").write_bytes(pickled(trap))


def describe(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    about = yaml.safe_load((folder / "MLmodel").read_text())
    change(about)
    (folder / "MLmodel").write_text(yaml.safe_dump(about))


def weights(records: Records, trap: Trap) -> None:
    """A weight that the archive's table says is a pickle."""
    records["model/data/weights/weight_0"] = pickled(trap)
    edit(records, CONFIG, lambda table: first(table["config"]).update(use_pickle=True))


def weights_by_another_case(records: Records, trap: Trap) -> None:
    """torch's reader of zips does not tell cases apart."""
    records["model/data/weights/weight_0"] = pickled(trap)
    entry = {"path_name": "WEIGHT_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    edit(records, CONFIG, lambda table: table["config"].update(other=entry))


def opaque(records: Records, trap: Trap) -> None:
    records["model/data/constants/opaque_obj_0"] = pickle.dumps(trap)
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    edit(records, CONFIG.replace("weights", "constants"), lambda table: table["config"].update(other=entry))


def examples(records: Records, trap: Trap) -> None:
    records["model/data/sample_inputs/model.pt"] = pickled(trap)


def library(records: Records, trap: Trap) -> None:
    """A compiled one, which torch would load."""
    records["model/data/aotinductor/model/code.so"] = b"\x7fELF"


def operator(records: Records, trap: Trap) -> None:
    """A function of Python's in place of one on tensors."""

    def change(program: dict[str, Any]) -> None:
        nodes = program["graph_module"]["graph"]["nodes"]
        argument = {"name": "", "arg": {"as_string": trap.folder}, "kind": 1}
        nodes.insert(
            0,
            {**nodes[0], "target": "torch.os.makedirs", "inputs": [argument], "outputs": [], "name": "made"},
        )

    edit(records, GRAPH, change)


def size(records: Records, trap: Trap) -> None:
    """sympy evaluates how a size is written."""
    number = next(n for n, kind in enumerate(object.__subclasses__()) if kind.__name__ == "_wrap_close")
    reach = f"().__class__.__base__.__subclasses__()[{number}].__init__.__globals__"
    code = f"{reach}['makedirs']({trap.folder!r})"

    def change(program: dict[str, Any]) -> None:
        for found in everything(program):
            if "expr_str" in found:
                found["expr_str"] = code

    edit(records, GRAPH, change)


def name(records: Records, trap: Trap) -> None:
    """Names of inputs are written into Python code."""
    code = f"x=__import__('os').makedirs({trap.folder!r}, exist_ok=True)"

    def change(program: dict[str, Any]) -> None:
        graph = program["graph_module"]["graph"]
        text = json.dumps(graph["inputs"][-1])
        old = first(graph["inputs"][-1])["name"]
        graph["inputs"][-1] = json.loads(text.replace(f'"{old}"', json.dumps(code)))

    edit(records, GRAPH, change)


def edit(records: Records, record: str, change: Callable[[dict[str, Any]], Any]) -> None:
    told = json.loads(records[record])
    change(told)
    records[record] = json.dumps(told).encode()


def first(table: dict[str, Any]) -> dict[str, Any]:
    return next(iter(table.values()))


def everything(value: Any) -> list[dict[str, Any]]:
    """Every mapping in it."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = [value] if isinstance(value, dict) else []
    return own + [found for each in inner for found in everything(each)]


FOLDERS = {
    "python_function": (python_function, "no exported program"),
    "own loader": (own_loader, "names code or files of its own"),
    "code beside": (code_beside, "names code or files of its own"),
    "elsewhere": (elsewhere, "names code or files of its own"),
    "pickled model": (pickled_model, "it holds model.pth: a pickled model, or code"),
    "description": (description, "could not determine a constructor"),
    "pickle": (bare_pickle, "it is no exported program"),
    "saved pickle": (saved_pickle, "does not belong in a program"),
}
ARCHIVES = {
    "weights": (weights, "data/weights/weight_0 is a pickle"),
    "other case": (weights_by_another_case, "data/weights/WEIGHT_0 is a pickle"),
    "opaque": (opaque, "opaque_obj_0"),
    "examples": (examples, "a pickle of other things than tensors"),
    "library": (library, "code.so' does not belong"),
    "operator": (operator, "it calls 'torch.os.makedirs'"),
    "size": (size, "it has the size"),
    "name": (name, "it names something"),
}


def register(store: Store, exported: Path, folder: Path, case: str, trap: Trap) -> str:
    """A version with these files; what its refusal says."""
    shutil.copytree(exported, folder)
    if case in FOLDERS:
        spoil, said = FOLDERS[case]
        spoil(folder, trap)
    else:
        change, said = ARCHIVES[case]
        with zipfile.ZipFile(folder / "data" / "model.pt2") as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        change(records, trap)
        write(folder / "data" / "model.pt2", records)
    store.client.create_registered_model("bad")
    store.client.create_model_version("bad", folder.as_uri())
    return said


def write(path: Path, records: Records) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for record, content in records.items():
            archive.writestr(record, content)


@pytest.mark.parametrize("case", [*FOLDERS, *ARCHIVES])
def test_a_malicious_version_is_refused(
    case: str, quick: Store, exported: Path, tmp_path: Path, sprung: Path
) -> None:
    said = register(quick, exported, tmp_path / "bad", case, Trap(sprung))
    for load in (load_model, lambda uri, **more: export_version(uri, "pt2", tmp_path / "out.pt2", **more)):
        with pytest.raises(RegistryError) as error:
            load("models:/bad/1", tracking_uri=quick.uri)
        assert said in str(error.value)
        assert "\n" not in str(error.value)
    assert not sprung.exists()
    assert not (tmp_path / "out.pt2").exists()


def test_the_commands_refuse_one_in_one_line(
    quick: Store, exported: Path, tmp_path: Path, sprung: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = register(quick, exported, tmp_path / "bad", "own loader", Trap(sprung))
    quick.client.create_model_version("bad", (tmp_path / "bad").as_uri())
    out, uri, images = str(tmp_path / "out.png"), "models:/bad/1", pictures(tmp_path)
    for command in (
        ["fill", uri, *images, "--out", out],
        ["evaluate", uri, "--images", "bundled", "--masks", "center", "--out", out],
        ["models", "compare", "bad/1", "bad/2", "--out", out],
        ["models", "export", "bad/1", "--pt2", "--out", out],
    ):
        assert call(*command, "--tracking", quick.uri) == 1, command
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith(f"inpaint {command[0]}: ")
        assert said in told
    assert not sprung.exists()


def test_a_checkpoint_beside_a_good_program(
    quick: Store, exported: Path, tmp_path: Path, sprung: Path
) -> None:
    """What a version is built again from, for other formats."""
    shutil.copytree(exported, tmp_path / "bad")
    (tmp_path / "bad" / "checkpoint" / "model.safetensors").write_bytes(pickle.dumps(Trap(sprung)))
    quick.client.create_registered_model("bad")
    quick.client.create_model_version("bad", (tmp_path / "bad").as_uri())
    with pytest.raises(RegistryError, match="checkpoint") as error:
        export_version("models:/bad/1", "safetensors", tmp_path / "out", tracking_uri=quick.uri)
    assert "\n" not in str(error.value)
    assert not sprung.exists()


def test_what_torch_reads_is_what_was_checked(exported: Path, tmp_path: Path) -> None:
    """Two zips in one file: Python takes the table of contents at the end, torch the one at the offset that it names."""
    path, x = tmp_path / "model.pt2", torch.rand(1, 5, 64, 64)
    with zipfile.ZipFile(exported / "data" / "model.pt2") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    write(path, records)
    seen = path.read_bytes()
    write(path, {n: bytes(len(c)) if "/weight_" in n else c for n, c in records.items()})
    hidden = path.read_bytes()
    path.write_bytes(hidden[:-22] + seen)  # without its last record
    good, bad = exported / "data" / "model.pt2", tmp_path / "bad.pt2"
    bad.write_bytes(path.read_bytes())
    clean_program(path)
    wanted, hidden_one, cleaned = (torch.export.load(file).module()(x) for file in (good, bad, path))
    assert not torch.equal(hidden_one, wanted)
    assert torch.equal(cleaned, wanted)


def test_a_record_that_is_there_twice_is_refused(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    shutil.copy(exported / "data" / "model.pt2", path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(CONFIG.upper().replace("MODEL/", "model/", 1), b"{}")
    with pytest.raises(ValueError, match="there twice"):
        clean_program(path)
