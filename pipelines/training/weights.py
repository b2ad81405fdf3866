"""Checkpoint folders: `model.safetensors` and `model.json`, all that a trained model is."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_prep.storage import Storage, check_key
from models import build_model
from models.base import Model

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"


def save_weights(
    folder: Path, model: Model, ema: Mapping[str, Tensor], about: Mapping[str, Any]
) -> list[str]:
    """Write the checkpoint folder; `ema` (network.key -> tensor) replaces the weights that it averages.

    `about` needs `name` and `options`, from which the model is built again. Returns the files' names.
    """
    state = model.state_dict() | {f"networks.{key}": value for key, value in ema.items()}
    save_file(
        {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}, folder / WEIGHTS
    )
    (folder / DESCRIPTION).write_text(
        json.dumps(dict(about), indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )
    return [WEIGHTS, DESCRIPTION]


def load_weights(folder: Path) -> tuple[Model, dict[str, Any]]:
    """The model of a checkpoint folder, in evaluation mode, and what `model.json` says about it.

    Raises what reading, building and strict loading raise (ValueError: no safetensors file); never unpickles.
    """
    about = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    model = build_model(about["name"], **about.get("options", {}))
    try:
        state = load_file(folder / WEIGHTS)
    except SafetensorError as error:  # derived from Exception alone
        raise ValueError(f"{folder / WEIGHTS} is damaged, or no safetensors file: {error}") from error
    model.load_state_dict(state, strict=True)
    return model.eval(), about


@contextmanager
def local_folder(storage: Storage, folder: str) -> Iterator[Path]:
    """A folder of the storage on this machine: itself, or a download from a bucket."""
    here = storage.sub(folder)
    path = here.path()
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory() as temporary:
        for key, _ in here.list():
            target = Path(temporary) / check_key(key)
            target.parent.mkdir(parents=True, exist_ok=True)
            here.download(key, target)
        yield Path(temporary)
