"""Malicious models and checkpoints: every reader refuses them with one line, and none of their code runs."""

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

from data_prep.storage import open_storage
from models.features import load_feature_stack
from pipelines.cli.main import main
from pipelines.durable.task import PERMANENT_ERRORS, to_attempt_error
from pipelines.importing.import_checkpoint import import_checkpoint
from pipelines.registry import RegistryError, load_model
from pipelines.registry.export import export_version
from pipelines.registry.program_check import sanitize_program
from pipelines.training.checkpoint import read_checkpoint, read_resume_state, write_resume_state
from pipelines.weights import load_weights
from support.mlflow_stores import MlflowStore, photograph

GRAPH, CONFIG = "model/models/model.json", "model/data/weights/model_weights_config.json"
Records = dict[str, bytes]


class Trap:
    """Runs code when it is unpickled: it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (self.folder,)


@pytest.fixture
def trap_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a Trap makes when its code runs. MLflow and torch have their default settings."""
    for name in ("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "MLFLOW_ALLOW_MODEL_CODE_EXECUTION"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "sprung"


# -- checkpoints -----------------------------------------------------------------------------------------------


def malicious_checkpoint(folder: Path, trap: Trap) -> Path:
    """A checkpoint folder in which every weight file is a pickle that triggers the trap."""
    folder.mkdir()
    torch.save({"step": 1, "networks": trap}, folder / "state.pt")
    (folder / "journal.json").write_text("[]")
    (folder / "model.safetensors").write_bytes(pickle.dumps(trap))
    (folder / "model.json").write_text(json.dumps({"name": "context_encoder", "options": {"size": 32}}))
    return folder


READERS: dict[str, Callable[[Path], Any]] = {
    "resume": lambda folder: read_checkpoint(Checkpoint(str(folder))),
    "go on": lambda folder: read_resume_state(open_storage(folder)),
    "weights": load_weights,
    "load": load_model,
    "import": lambda folder: import_checkpoint("deepfill_v1", [folder / "state.pt"]),
    "features": lambda folder: load_feature_stack("vgg19", folder / "state.pt"),
    "lite features": lambda folder: load_feature_stack("efficientnet_lite0", folder / "model.safetensors"),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_pickled_checkpoint_is_refused(reader: str, tmp_path: Path, trap_folder: Path) -> None:
    folder = malicious_checkpoint(tmp_path / "checkpoint", Trap(trap_folder))
    with pytest.raises(Exception) as error:
        READERS[reader](folder)
    assert "\n" not in to_attempt_error(error.value).message  # as a step reports it
    assert not trap_folder.exists()


@pytest.mark.parametrize("remaining_bytes", [0, 100, 900])
def test_a_damaged_checkpoint_is_refused_by_name(remaining_bytes: int, tmp_path: Path) -> None:
    folder = tmp_path / "training" / "step-1"
    folder.mkdir(parents=True)
    write_resume_state(open_storage(folder), {"step": 1, "weights": torch.arange(100.0)}, [])
    content = (folder / "state.pt").read_bytes()
    (folder / "state.pt").write_bytes(content[:remaining_bytes])
    with pytest.raises(
        ValueError, match=f"{folder}/state.pt is damaged.* delete {folder.parent} to"
    ) as error:
        read_checkpoint(Checkpoint(str(folder)))
    assert isinstance(error.value, PERMANENT_ERRORS)  # a retry would fail again


def test_the_malicious_checkpoint_runs_code_if_it_is_not_refused(tmp_path: Path, trap_folder: Path) -> None:
    folder = malicious_checkpoint(tmp_path / "checkpoint", Trap(trap_folder))
    torch.load(folder / "state.pt", weights_only=False)
    assert trap_folder.exists()


@pytest.mark.parametrize("command", ["fill", "import"])
def test_the_commands_refuse_a_malicious_checkpoint_in_one_line(
    command: str, tmp_path: Path, trap_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = malicious_checkpoint(tmp_path / "checkpoint", Trap(trap_folder))
    arguments = {
        "fill": [str(folder), *write_images(tmp_path), "--out", str(tmp_path / "out.png")],
        "import": [
            "deepfill_v1",
            str(folder / "state.pt"),
            "--tracking-uri",
            f"sqlite:///{tmp_path}/mlflow.db",
        ],
    }
    assert run_command(command, *arguments[command]) == 1
    error = capsys.readouterr().err
    assert (error.count("\n"), error.startswith(f"inpaint {command}: ")) == (1, True), error
    assert not trap_folder.exists()


def write_images(folder: Path) -> list[str]:
    for name, pixels in zip(("photo.png", "mask.png"), photograph()):
        cv2.imwrite(str(folder / name), pixels * np.uint8(255) if pixels.ndim == 2 else pixels)
    return [str(folder / "photo.png"), str(folder / "mask.png")]


def run_command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        raise SystemExit(main(list(arguments)))
    return int(exit_info.value.code or 0)


# -- versions of the registry ----------------------------------------------------------------------------------


def torch_pickle(value: Any) -> bytes:
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
    edit_mlmodel(folder, lambda mlmodel: mlmodel.update(flavors={"python_function": flavor}))


def own_loader(folder: Path, trap: Trap) -> None:
    """Code beside the program that the MLmodel file tells MLflow to load."""
    for subfolder in ("code", "data/code"):
        (folder / subfolder).mkdir()
        for name in ("inpaint_loader.py", "onnxscript.py"):
            (folder / subfolder / name).write_text(
                f"import os\nos.makedirs({trap.folder!r}, exist_ok=True)\n"
            )
    (folder / "data" / "model.pth").write_bytes(torch_pickle(trap))
    (folder / "data" / "pickle_module_info.txt").write_text("inpaint_loader")

    def change(mlmodel: dict[str, Any]) -> None:
        mlmodel["flavors"]["pytorch"]["code"] = "data/code"
        mlmodel["flavors"]["python_function"] |= {"loader_module": "inpaint_loader", "code": "code"}

    edit_mlmodel(folder, change)


def code_beside(folder: Path, trap: Trap) -> None:
    """The same without a pickled model: MLflow would put the code's folder first in sys.path."""
    own_loader(folder, trap)
    for name in ("model.pth", "pickle_module_info.txt"):
        (folder / "data" / name).unlink()


def program_elsewhere(folder: Path, trap: Trap) -> None:
    """The MLmodel file names a program elsewhere, with other files beside it."""
    own_loader(folder, trap)
    edit_mlmodel(
        folder,
        lambda mlmodel: mlmodel["flavors"]["pytorch"].update(code=None, model_data=str(folder / "data")),
    )


def pickled_model(folder: Path, trap: Trap) -> None:
    (folder / "data" / "model.pth").write_bytes(torch_pickle(trap))
    (folder / "data" / "pickle_module_info.txt").write_text("mlflow.pytorch.pickle_module")


def description(folder: Path, trap: Trap) -> None:
    (folder / "MLmodel").write_text(f"flavors: !!python/object/apply:os.makedirs [{trap.folder}]\n")


def bare_pickle(folder: Path, trap: Trap) -> None:
    (folder / "data" / "model.pt2").write_bytes(pickle.dumps(trap))


def saved_pickle(folder: Path, trap: Trap) -> None:
    """A zip archive of torch.save."""
    (folder / "data" / "model.pt2").write_bytes(torch_pickle(trap))


def edit_mlmodel(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    mlmodel = yaml.safe_load((folder / "MLmodel").read_text())
    change(mlmodel)
    (folder / "MLmodel").write_text(yaml.safe_dump(mlmodel))


def weight_as_pickle(records: Records, trap: Trap) -> None:
    """A weight that the archive's table declares as a pickle."""
    records["model/data/weights/weight_0"] = torch_pickle(trap)
    edit_record(records, CONFIG, lambda table: first_value(table["config"]).update(use_pickle=True))


def weight_in_upper_case(records: Records, trap: Trap) -> None:
    """torch's zip reader ignores case."""
    records["model/data/weights/weight_0"] = torch_pickle(trap)
    entry = {"path_name": "WEIGHT_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    edit_record(records, CONFIG, lambda table: table["config"].update(other=entry))


def opaque_constant(records: Records, trap: Trap) -> None:
    records["model/data/constants/opaque_obj_0"] = pickle.dumps(trap)
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    edit_record(
        records, CONFIG.replace("weights", "constants"), lambda table: table["config"].update(other=entry)
    )


def pickled_example_inputs(records: Records, trap: Trap) -> None:
    records["model/data/sample_inputs/model.pt"] = torch_pickle(trap)


def compiled_library(records: Records, trap: Trap) -> None:
    """A compiled library, which torch would load."""
    records["model/data/aotinductor/model/code.so"] = b"\x7fELF"


def python_operator(records: Records, trap: Trap) -> None:
    """A Python function instead of an operator on tensors."""

    def change(program: dict[str, Any]) -> None:
        nodes = program["graph_module"]["graph"]["nodes"]
        argument = {"name": "", "arg": {"as_string": trap.folder}, "kind": 1}
        nodes.insert(
            0,
            {**nodes[0], "target": "torch.os.makedirs", "inputs": [argument], "outputs": [], "name": "made"},
        )

    edit_record(records, GRAPH, change)


def size_expression(records: Records, trap: Trap) -> None:
    """sympy evaluates the expression of a size."""
    number = next(n for n, kind in enumerate(object.__subclasses__()) if kind.__name__ == "_wrap_close")
    module_globals = f"().__class__.__base__.__subclasses__()[{number}].__init__.__globals__"
    code = f"{module_globals}['makedirs']({trap.folder!r})"

    def change(program: dict[str, Any]) -> None:
        for entry in nested_dicts(program):
            if "expr_str" in entry:
                entry["expr_str"] = code

    edit_record(records, GRAPH, change)


def name(records: Records, trap: Trap) -> None:
    """torch generates Python code from the names of inputs."""
    code = f"x=__import__('os').makedirs({trap.folder!r}, exist_ok=True)"

    def change(program: dict[str, Any]) -> None:
        graph = program["graph_module"]["graph"]
        text = json.dumps(graph["inputs"][-1])
        old = first_value(graph["inputs"][-1])["name"]
        graph["inputs"][-1] = json.loads(text.replace(f'"{old}"', json.dumps(code)))

    edit_record(records, GRAPH, change)


def edit_record(records: Records, record: str, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(records[record])
    change(content)
    records[record] = json.dumps(content).encode()


def first_value(table: dict[str, Any]) -> dict[str, Any]:
    return next(iter(table.values()))


def nested_dicts(value: Any) -> list[dict[str, Any]]:
    """All dictionaries nested in the value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    dicts = [value] if isinstance(value, dict) else []
    return dicts + [entry for item in inner for entry in nested_dicts(item)]


FOLDERS = {
    "python_function": (python_function, "it is not just an exported program"),
    "own loader": (own_loader, "names code or files of its own"),
    "code beside": (code_beside, "names code or files of its own"),
    "elsewhere": (program_elsewhere, "names code or files of its own"),
    "pickled model": (pickled_model, "it holds model.pth: a pickled model, or code"),
    "description": (description, "could not determine a constructor"),
    "pickle": (bare_pickle, "it is not an exported program"),
    "saved pickle": (saved_pickle, "does not belong in a program"),
}
ARCHIVES = {
    "weights": (weight_as_pickle, "data/weights/weight_0 is a pickle"),
    "other case": (weight_in_upper_case, "data/weights/WEIGHT_0 is a pickle"),
    "opaque": (opaque_constant, "opaque_obj_0"),
    "examples": (pickled_example_inputs, "a pickle of other things than tensors"),
    "library": (compiled_library, "code.so' does not belong"),
    "operator": (python_operator, "it calls 'torch.os.makedirs'"),
    "size": (size_expression, "it has the invalid size"),
    "name": (name, "it has the invalid name"),
}


def register_malicious(store: MlflowStore, exported: Path, folder: Path, case: str, trap: Trap) -> str:
    """Register a version with the malicious files of a case; returns a part of the expected error."""
    shutil.copytree(exported, folder)
    if case in FOLDERS:
        change_folder, message = FOLDERS[case]
        change_folder(folder, trap)
    else:
        change, message = ARCHIVES[case]
        with zipfile.ZipFile(folder / "data" / "model.pt2") as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        change(records, trap)
        write_zip(folder / "data" / "model.pt2", records)
    store.client.create_registered_model("bad")
    store.client.create_model_version("bad", folder.as_uri())
    return message


def write_zip(path: Path, records: Records) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for record, content in records.items():
            archive.writestr(record, content)


@pytest.mark.parametrize("case", [*FOLDERS, *ARCHIVES])
def test_a_malicious_version_is_refused(
    case: str, quick: MlflowStore, exported: Path, tmp_path: Path, trap_folder: Path
) -> None:
    message = register_malicious(quick, exported, tmp_path / "bad", case, Trap(trap_folder))
    for load in (
        load_model,
        lambda uri, **options: export_version(uri, "pt2", tmp_path / "out.pt2", **options),
    ):
        with pytest.raises(RegistryError) as error:
            load("models:/bad/1", tracking_uri=quick.uri)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert not trap_folder.exists()
    assert not (tmp_path / "out.pt2").exists()


def test_the_commands_refuse_a_malicious_version_in_one_line(
    quick: MlflowStore, exported: Path, tmp_path: Path, trap_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = register_malicious(quick, exported, tmp_path / "bad", "own loader", Trap(trap_folder))
    quick.client.create_model_version("bad", (tmp_path / "bad").as_uri())
    out, uri, images = str(tmp_path / "out.png"), "models:/bad/1", write_images(tmp_path)
    for command in (
        ["fill", uri, *images, "--out", out],
        ["evaluate", uri, "--images", "bundled", "--masks", "center", "--out", out],
        ["models", "compare", "bad/1", "bad/2", "--out", out],
        ["models", "export", "bad/1", "--pt2", "--out", out],
    ):
        assert run_command(*command, "--tracking-uri", quick.uri) == 1, command
        error = capsys.readouterr().err.splitlines()[-1]
        name = " ".join(command[: 2 if command[0] == "models" else 1])
        assert error.startswith(f"inpaint {name}: ")
        assert message in error
    assert not trap_folder.exists()


def test_a_malicious_checkpoint_beside_a_valid_program_is_refused(
    quick: MlflowStore, exported: Path, tmp_path: Path, trap_folder: Path
) -> None:
    """The checkpoint is read for exports to other formats."""
    shutil.copytree(exported, tmp_path / "bad")
    (tmp_path / "bad" / "checkpoint" / "model.safetensors").write_bytes(pickle.dumps(Trap(trap_folder)))
    quick.client.create_registered_model("bad")
    quick.client.create_model_version("bad", (tmp_path / "bad").as_uri())
    with pytest.raises(RegistryError, match="checkpoint") as error:
        export_version("models:/bad/1", "safetensors", tmp_path / "out", tracking_uri=quick.uri)
    assert "\n" not in str(error.value)
    assert not trap_folder.exists()


def test_torch_reads_the_bytes_that_were_checked(exported: Path, tmp_path: Path) -> None:
    """Two zips in one file: Python reads the directory at the end, torch the one at the offset stored there."""
    path, x = tmp_path / "model.pt2", torch.rand(1, 5, 64, 64)
    with zipfile.ZipFile(exported / "data" / "model.pt2") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    write_zip(path, records)
    visible = path.read_bytes()
    write_zip(path, {n: bytes(len(c)) if "/weight_" in n else c for n, c in records.items()})
    hidden = path.read_bytes()
    path.write_bytes(hidden[:-22] + visible)  # without its end record
    good, bad = exported / "data" / "model.pt2", tmp_path / "bad.pt2"
    bad.write_bytes(path.read_bytes())
    sanitize_program(path)
    expected, from_hidden, from_sanitized = (
        torch.export.load(file).module()(x) for file in (good, bad, path)
    )
    assert not torch.equal(from_hidden, expected)
    assert torch.equal(from_sanitized, expected)


def test_a_duplicate_record_is_refused(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    shutil.copy(exported / "data" / "model.pt2", path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(CONFIG.upper().replace("MODEL/", "model/", 1), b"{}")
    with pytest.raises(ValueError, match="occurs twice"):
        sanitize_program(path)
