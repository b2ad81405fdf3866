"""ONNX exports of all models: onnxruntime completes images as the model does."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import list_models
from models.base import Completion, Model
from pipelines.registry.onnx_export import CHECKED_SHAPES, export_onnx
from support.small_models import disable_torch_trace, scale_activations

onnxruntime = pytest.importorskip(
    "onnxruntime", reason="onnxruntime is not installed: pip install 'inpaint-pipelines[onnx]'"
)

# The dynamic dimensions of a model's file: any "size", or only the "batch". Models not listed here: any size.
EXPORTED_FOR = {
    "context_encoder": "size",
    "context_encoder_region": "size",
    "deepfill_v1": "size",
    "deepfill_v2": "size",
    "edge_connect": "size",
    "glcic": "size",
    "partial_conv": "size",
}
SIZES = [(1, 35, 49), (3, 52, 40), (2, 64, 64), (1, 21, 45)]  # none of them is checked by the export


@pytest.fixture(autouse=True)
def _fast_and_seeded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    disable_torch_trace(monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gc.disable()  # an export takes a seventh less time
    yield
    gc.enable()
    torch.set_num_threads(threads)


def random_batch(b: int, h: int, w: int) -> Tensor:
    """Input [B,5,H,W]: smooth colours, with a hole of NaN that differs in size and position per image; edges everywhere,
    in the first image only outside the hole."""
    colors = torch.rand(b, 3, 5, 5)
    x = torch.cat(
        [nn.functional.interpolate(colors, (h, w), mode="bicubic").clamp(0, 1), torch.zeros(b, 2, h, w)], 1
    )
    for i in range(b):
        x[i, 3, h // 4 : h // 4 + h // 5 + i, w // 3 + i : w // 3 + i + w // 5] = 1
    x[:, 4] = torch.rand(b, h, w) > 0.9
    x[0, 4] *= 1 - x[0, 3]
    return torch.where((x[:, 3:4] > 0) & (torch.arange(5) < 3).view(1, 5, 1, 1), torch.nan, x)


def onnx_session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def assert_agrees(program: Any, model: Model, x: Tensor) -> Tensor:
    """Checks the file's output, known pixels bit for bit and holes within 1e-5 of the model's; returns the holes'."""
    completed = torch.from_numpy(program.run(None, {"x": x.numpy()})[0])
    hole = (x[:, 3:4] > 0).expand_as(completed)
    assert torch.equal(completed[~hole], x[:, :3][~hole])
    torch.testing.assert_close(completed, model.complete(*x.split([3, 1, 1], dim=1)), atol=1e-5, rtol=0)
    return completed[hole]


@pytest.mark.slow
@pytest.mark.soak_for("context_encoder_region", "deepfill_v1", "deepfill_v2", "glcic", "partial_conv")
@pytest.mark.parametrize("name", list_models())
def test_the_onnx_file_completes_like_the_model(
    name: str, small: Callable[..., Model], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = scale_activations(small(name), random_batch(3, 64, 64))
    size = None if EXPORTED_FOR.get(name, "size") == "size" else 32
    result = export_onnx(model, tmp_path / "model.onnx", size, {"sigma": 1.5})
    assert capfd.readouterr() == ("", "")
    assert [*tmp_path.iterdir()] == [tmp_path / "model.onnx"]  # a single, complete file
    assert result["bytes"] == (tmp_path / "model.onnx").stat().st_size

    program = onnx_session(tmp_path / "model.onnx")
    (x,), (y,) = program.get_inputs(), program.get_outputs()
    sides = ["height", "width"] if size is None else [size, size]
    assert (x.name, x.type, x.shape) == ("x", "tensor(float)", ["batch", 5, *sides])
    assert (y.name, y.type, y.shape) == ("y", "tensor(float)", ["batch", 3, *sides])
    for shape in SIZES if size is None else [(b, size, size) for b in (1, 3)]:
        filled = assert_agrees(program, model, random_batch(*shape))
    assert filled.std() > 0.03, "the model's output is a single colour: the comparison proves little"


@pytest.mark.slow
def test_a_file_for_one_size_takes_any_batch(small: Callable[..., Model], tmp_path: Path) -> None:
    model = scale_activations(small("context_encoder_region"), random_batch(3, 64, 64))
    result = export_onnx(model, tmp_path / "made" / "model.onnx", 40)
    assert (result["size"], [check["shape"] for check in result["checked"]]) == (
        40,
        [[1, 40, 40], [2, 40, 40], [3, 40, 40]],
    )
    program = onnx_session(tmp_path / "made" / "model.onnx")
    assert program.get_inputs()[0].shape == ["batch", 5, 40, 40]
    for batch in (1, 4):
        assert_agrees(program, model, random_batch(batch, 40, 40))
    with pytest.raises(Exception, match=r"index: 3 Got: 41 Expected: 40"):
        program.run(None, {"x": np.zeros((1, 5, 40, 41), np.float32)})


# -- failing exports -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    width: float = 0.5


class StubCompletion(Completion):
    def __init__(self, fill: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.paint = fill

    def inpaint_hole(self, image: Tensor, hole: Tensor, edge: Tensor) -> Tensor:
        return self.paint(image)


def stub_model(fill: Callable[[Tensor], Tensor]) -> Any:
    return SimpleNamespace(
        name="stub",
        options=Options(),
        needs_edges=False,
        takes_edges=False,
        frozen_completion=lambda: StubCompletion(fill),
    )


@pytest.mark.slow
def test_the_metadata_is_written_to_the_file(tmp_path: Path) -> None:
    metadata = {"sigma": 1.5, "license": "CC-BY-4.0", "hole_range": [0.1, 0.5], "model": "not this"}
    result = export_onnx(stub_model(lambda image: 1 - image), tmp_path / "m.onnx", metadata=metadata)
    assert [tuple(check["shape"]) for check in result["checked"]] == [*CHECKED_SHAPES]
    properties = onnx_session(tmp_path / "m.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(properties.pop("options")) == {"width": 0.5}
    assert properties == {
        "model": "stub",
        "needs_edges": "false",
        "takes_edges": "false",
        "sigma": "1.5",
        "license": "CC-BY-4.0",
        "hole_range": "[0.1, 0.5]",
    }
    assert str(Path(__file__).parents[3]).encode() not in (tmp_path / "m.onnx").read_bytes()
    with pytest.raises(ValueError, match=r"^metadata.sigma cannot be written as JSON: "):
        export_onnx(stub_model(lambda image: image), tmp_path / "n.onnx", metadata={"sigma": float("nan")})


def sensitive(image: Tensor) -> Tensor:
    """Its float32 rounding error, which depends on the order of a sum, is far larger than 1e-5."""
    sums = nn.functional.conv2d(image, torch.ones(3, 3, 7, 7, dtype=image.dtype), padding=3)
    return 0.5 + (30 * sums).sin() / 2


@pytest.mark.slow
def test_a_difference_within_float32_rounding_is_accepted(tmp_path: Path) -> None:
    for check in export_onnx(stub_model(sensitive), tmp_path / "m.onnx")["checked"]:
        assert 1e-5 < check["difference"] <= 10 * check["rounding"] < 0.1


def wrong_when_exported(image: Tensor) -> Tensor:
    return image + 0.5 + 1e-4 * torch.compiler.is_exporting()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fill", "error"),
    [
        (wrong_when_exported, r"^the ONNX file of stub differs from the model by 1\.0e-04 on an input of "),
        (
            lambda x: x.kthvalue(3, 2, keepdim=True)[0] + x,
            r"^stub .*ONNX has no operator for aten\.kthvalue$",
        ),
        (lambda x: x if bool(x.sum() > 0) else x + 1, r"^stub cannot be exported to ONNX: .*data-dependent"),
        (lambda x: x.view(-1, 3, 61, 91), r"^stub cannot be .* static shape of 61 for dimension"),
    ],
)
def test_a_failed_export_keeps_the_existing_file(
    fill: Callable[[Tensor], Tensor], error: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.onnx").write_text("an earlier one")
    with pytest.raises(ValueError, match=error) as caught:
        export_onnx(stub_model(fill), tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an earlier one"]
    assert capfd.readouterr() == ("", "")


def test_errors_name_invalid_sizes_and_missing_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="0x0 px: size is at least 1"):
        export_onnx(stub_model(lambda image: image), tmp_path / "m.onnx", 0)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeError, match=r"\(onnxruntime\): pip install 'inpaint-pipelines\[onnx\]'$"):
        export_onnx(stub_model(lambda image: image), tmp_path / "m.onnx")
