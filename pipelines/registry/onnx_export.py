"""Exports a model's completion to an ONNX file and checks the file against the model before it is moved into place.

The file maps one float32 tensor x [B,5,H,W] (RGB in [0,1]; mask, 1 = hole; edge) to y [B,3,H,W]. It needs an ONNX
runtime, but nothing of this project, torch or Python.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.base import Completion, Model
from pipelines.errors import error_text

OPSET = 18  # the first with Col2Im, which contextual attention needs to paste its patches
TOLERANCE = 1e-5  # maximum absolute difference from the eager completion
EXAMPLE_SHAPE = (2, 61, 91)  # B, H, W from which torch.export specializes no dimension
CHECKED_SHAPES = ((1, 33, 47), (3, 64, 64), (2, 90, 130), (1, 20, 24), (1, 270, 140))


def export_onnx(
    model: Model, path: Path, size: int | None = None, metadata: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write the completion to `path`, for any batch and any size, or for `size` x `size` pixels and any batch.

    The file's metadata_props are `model`, `options` (JSON), `needs_edges`, `takes_edges` and those of `metadata`
    (sigma, size ...): strings as they are, other values as JSON.
    Returns path, opset, size, bytes and `checked`: for inputs of several shapes [B,H,W], the largest absolute
    `difference` between the file's output and the eager completion's. It is at most 1e-5; if it is larger, `rounding`
    is the eager completion's own error against float64, and the difference is at most ten times that (contextual
    attention over many patches is that sensitive).
    ValueError, and no file is written: the model cannot be exported (the message names the operator), the file cannot
    be run or its output differs, or the metadata is not JSON. RuntimeError: the packages of the extra `onnx` are not
    installed.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"ONNX needs packages that are not installed ({error.name}): pip install 'inpaint-pipelines[onnx]'"
        ) from None
    if size is not None and size < 1:
        raise ValueError(f"an ONNX file for {size}x{size} px: size is at least 1")
    properties = _metadata_props(model, metadata or {})
    completion = model.frozen_completion().cpu().float()
    program = _export_program(completion, model.name, size)
    program.model.metadata_props.update(properties)
    shapes = CHECKED_SHAPES if size is None else tuple((b, size, size) for b in (1, 2, 3))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=path.parent) as folder:
        unchecked = Path(folder, path.name)
        program.save(unchecked, external_data=False)
        try:
            onnx.checker.check_model(unchecked, full_check=True)
            exported = load_onnx(unchecked)
            checks = [
                check_equal(exported, completion, synthetic_batch(*shape), f"the ONNX file of {model.name}")
                for shape in shapes
            ]
        except OutputMismatch:
            raise
        except Exception as error:  # onnxruntime's exceptions have no base class of their own
            raise ValueError(
                f"the ONNX file of {model.name} does not run: {_short_message(error)}"
            ) from error
        os.replace(unchecked, path)
    return {
        "path": str(path),
        "opset": OPSET,
        "size": size,
        "bytes": path.stat().st_size,
        "checked": checks,
    }


def _metadata_props(model: Model, metadata: Mapping[str, Any]) -> dict[str, str]:
    model_fields = {
        "model": model.name,
        "options": dataclasses.asdict(model.options),
        "needs_edges": bool(model.needs_edges),
        "takes_edges": bool(model.takes_edges),
    }
    properties = {}
    for key, value in {**metadata, **model_fields}.items():
        try:
            properties[key] = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"metadata.{key} cannot be written as JSON: {error}") from None
    return properties


def _export_program(completion: Completion, name: str, size: int | None) -> Any:
    """The completion as a torch.onnx.ONNXProgram. ValueError: ONNX lacks an operator, which the message names."""
    dynamic_dims = {0: "batch"} if size else {0: "batch", 2: "height", 3: "width"}
    example = (
        synthetic_batch(*EXAMPLE_SHAPE) if size is None else synthetic_batch(EXAMPLE_SHAPE[0], size, size)
    )
    try:
        with _silence_torch():
            program = torch.onnx.export(
                completion,
                (example,),
                input_names=["x"],
                output_names=["y"],
                dynamo=True,
                dynamic_shapes=(dynamic_dims,),
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        operator = re.search(r"OpOverload\(op='([\w.]+)'", str(cause))
        reason = f"ONNX has no operator for {operator[1]}" if operator else _short_message(cause)
        raise ValueError(f"{name} cannot be exported to ONNX: {reason}") from error
    assert program is not None
    for node in program.model.graph.all_nodes():  # they hold stack traces with paths of this machine
        node.metadata_props.clear()
    return program


class OutputMismatch(ValueError):
    """The exported model and its reference give different outputs."""


def load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """The ONNX file as a function x [B,5,H,W] -> y [B,3,H,W] on one CPU thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # fatal only: errors are raised anyway
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["y"], {"x": x.numpy()})[0])


def check_equal(
    exported: Callable[[Tensor], Tensor],
    completion: Completion,
    x: Tensor,
    label: str,
    reference: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """Compare the output of `exported` for x with that of `reference` (None: the completion).

    Returns one entry of export_onnx's `checked`. OutputMismatch: they differ by more than TOLERANCE and by more than
    ten times the eager completion's own error.
    """
    check: dict[str, Any] = {"shape": [len(x), *x.shape[2:]]}
    with torch.no_grad():
        y, expected = exported(x), (reference or completion)(x)
        if y.shape != expected.shape:
            raise OutputMismatch(f"{label} gives {tuple(y.shape)} for an input of {tuple(x.shape)}")
        check["difference"] = float((y - expected).abs().max())
        if not check["difference"] <= TOLERANCE:
            exact = copy.deepcopy(completion).double()(x.double())
            check["rounding"] = float((completion(x) - exact).abs().max())
            if not check["difference"] <= 10 * check["rounding"]:
                raise OutputMismatch(
                    f"{label} differs from the model by {check['difference']:.1e} on an input of {tuple(x.shape)}"
                )
    return check


def synthetic_batch(b: int, h: int, w: int) -> Tensor:
    """Input x [B,5,H,W] for the check: smooth images with NaN inside their holes.

    The first hole is inside the image, the second in a corner; further images have none. Edges are everywhere, but
    images with an even index have none in the hole.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(b, 5, h, w, generator=generator)
    colors = torch.rand(b, 3, 4, 4, generator=generator)
    x[:, :3] = 0.9 * F.interpolate(colors, (h, w), mode="bilinear") + 0.1 * x[:, :3]
    side = max(1, min(h, w) // 4)
    x[:, 3] = 0
    for i, (top, left) in enumerate(((h // 3, w // 2), (0, w - side))[:b]):
        x[i, 3, top : top + side, left : left + side] = 1
    x[:, 4] = x[:, 4] > 0.9
    x[::2, 4] *= 1 - x[::2, 3]
    x[:, :3] = torch.where(x[:, 3:4] > 0, torch.nan, x[:, :3])
    return x


@contextmanager
def _silence_torch() -> Iterator[None]:
    """Suppress torch's warnings (about operators that no model uses, and its own deprecated calls) and the program that it
    prints if an export fails."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _short_message(error: BaseException) -> str:
    text = error_text(error)
    return text if len(text) <= 300 else text[:297] + "..."
