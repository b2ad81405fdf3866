"""A model's completion as one ONNX file, checked against the model before it is there.

The file takes one float32 tensor x [B,5,H,W] (RGB in [0,1]; mask, 1 = hole; edge) and gives y [B,3,H,W]; it needs an
ONNX runtime, and nothing of this project, torch or Python.
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
from pipelines.errors import in_a_line

OPSET = 18  # the first with Col2Im, by which contextual attention pastes its patches
TOLERANCE = 1e-5  # of the file's output against the eager completion's
EXAMPLE = (2, 61, 91)  # a batch and a size from which torch.export concludes nothing
CHECKED = ((1, 33, 47), (3, 64, 64), (2, 90, 130), (1, 20, 24), (1, 270, 140))


def export_onnx(
    model: Model, path: Path, size: int | None = None, metadata: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write the completion to `path`, for any batch and any size, or for `size` x `size` pixels and any batch.

    The file's metadata_props are `model`, `options` (JSON), `needs_edges`, `takes_edges`, and what `metadata` says
    (sigma, size ...), as it is when it is a string, else as JSON.
    Keys of what is returned: path, opset, size, bytes, and checked: for inputs of several shapes [B,H,W], the largest
    `difference` of the file's output from the eager completion's. It is at most 1e-5; or, where it is not,
    `rounding` is the eager completion's own error (against itself in float64), and it is at most ten times that:
    contextual attention over many places is that sensitive.
    ValueError in one line, and no file is written: what cannot be exported (naming the operator), run or kept, or
    differs. RuntimeError: the packages of the extra `onnx` are not installed.
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
    properties = _properties(model, metadata or {})
    completion = model.completion().cpu().float()
    program = _program(completion, model.name, size)
    program.model.metadata_props.update(properties)
    shapes = CHECKED if size is None else tuple((b, size, size) for b in (1, 2, 3))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=path.parent) as folder:
        unchecked = Path(folder, path.name)
        program.save(unchecked, external_data=False)
        try:
            onnx.checker.check_model(unchecked, full_check=True)
            compute = runner(unchecked)
            checked = [
                compared(compute, completion, request(*shape), f"the ONNX file of {model.name}")
                for shape in shapes
            ]
        except Different:
            raise
        except Exception as error:  # onnxruntime's have no base of their own
            raise ValueError(f"the ONNX file of {model.name} does not run: {_line(error)}") from error
        os.replace(unchecked, path)
    return {
        "path": str(path),
        "opset": OPSET,
        "size": size,
        "bytes": path.stat().st_size,
        "checked": checked,
    }


def _properties(model: Model, metadata: Mapping[str, Any]) -> dict[str, str]:
    own = {
        "model": model.name,
        "options": dataclasses.asdict(model.options),
        "needs_edges": bool(model.needs_edges),
        "takes_edges": bool(model.takes_edges),
    }
    properties = {}
    for key, value in {**metadata, **own}.items():
        try:
            properties[key] = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"metadata.{key} cannot be kept as JSON: {error}") from None
    return properties


def _program(completion: Completion, name: str, size: int | None) -> Any:
    """torch.onnx.ONNXProgram. ValueError, naming the operator: there is none for it in ONNX."""
    free = {0: "batch"} if size else {0: "batch", 2: "height", 3: "width"}
    example = request(*EXAMPLE) if size is None else request(EXAMPLE[0], size, size)
    try:
        with _quiet():
            program = torch.onnx.export(
                completion,
                (example,),
                input_names=["x"],
                output_names=["y"],
                dynamo=True,
                dynamic_shapes=(free,),
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        operator = re.search(r"OpOverload\(op='([\w.]+)'", str(cause))
        reason = f"ONNX has no operator for {operator[1]}" if operator else _line(cause)
        raise ValueError(f"{name} cannot be exported to ONNX: {reason}") from error
    assert program is not None
    for node in program.model.graph.all_nodes():  # stack traces, with the paths of this machine
        node.metadata_props.clear()
    return program


class Different(ValueError):
    """Two forms of a model do not compute the same."""


def runner(path: Path) -> Callable[[Tensor], Tensor]:
    """What an ONNX file computes, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # nothing but what is fatal: errors are raised as well
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["y"], {"x": x.numpy()})[0])


def compared(
    compute: Callable[[Tensor], Tensor],
    completion: Completion,
    x: Tensor,
    what: str,
    program: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """What `checked` says of one input: `compute` against the completion, or against its exported program.

    Different: they differ by more than TOLERANCE, and by more than ten times the eager completion's own error.
    """
    found: dict[str, Any] = {"shape": [len(x), *x.shape[2:]]}
    with torch.no_grad():
        y, wanted = compute(x), (program or completion)(x)
        if y.shape != wanted.shape:
            raise Different(f"{what} gives {tuple(y.shape)} for an input of {tuple(x.shape)}")
        found["difference"] = float((y - wanted).abs().max())
        if not found["difference"] <= TOLERANCE:
            exact = copy.deepcopy(completion).double()(x.double())
            found["rounding"] = float((completion(x) - exact).abs().max())
            if not found["difference"] <= 10 * found["rounding"]:
                raise Different(
                    f"{what} differs from the model by {found['difference']:.1e} on an input of {tuple(x.shape)}"
                )
    return found


def request(b: int, h: int, w: int) -> Tensor:
    """[B,5,H,W]: smooth photographs with NaN in their holes: one inside, the next in a corner, the third without; edges
    everywhere, but in every second one none in the hole."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(b, 5, h, w, generator=generator)
    colours = torch.rand(b, 3, 4, 4, generator=generator)
    x[:, :3] = 0.9 * F.interpolate(colours, (h, w), mode="bilinear") + 0.1 * x[:, :3]
    side = max(1, min(h, w) // 4)
    x[:, 3] = 0
    for i, (top, left) in enumerate(((h // 3, w // 2), (0, w - side))[:b]):
        x[i, 3, top : top + side, left : left + side] = 1
    x[:, 4] = x[:, 4] > 0.9
    x[::2, 4] *= 1 - x[::2, 3]
    x[:, :3] = torch.where(x[:, 3:4] > 0, torch.nan, x[:, :3])
    return x


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings (of operators in packages that no model uses, of its own deprecated calls), and without the
    program that it prints when it cannot export one."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _line(error: BaseException) -> str:
    text = in_a_line(error)
    return text if len(text) <= 300 else text[:297] + "..."
