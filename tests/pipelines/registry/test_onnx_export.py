"""Each model as an ONNX file: run by onnxruntime, it completes what the model does."""

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
from small import liven, without_traces
from torch import Tensor, nn

from models import list_models
from models.base import Completion, Model
from pipelines.registry.onnx_export import CHECKED, export_onnx

onnxruntime = pytest.importorskip(
    "onnxruntime", reason="onnxruntime is not installed: pip install 'inpaint-pipelines[onnx]'"
)

# What a model's file takes: any "size", or only the "batch" is free. A model that is not here is expected to take any.
TAKES = {
    "context_encoder": "size",
    "context_encoder_region": "size",
    "deepfill_v1": "size",
    "deepfill_v2": "size",
    "edge_connect": "size",
    "glcic": "size",
    "partial_conv": "size",
}
SIZES = [(1, 35, 49), (3, 52, 40), (2, 64, 64), (1, 21, 45)]  # none of which the export itself looks at


@pytest.fixture(autouse=True)
def _fast_and_seeded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    without_traces(monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gc.disable()  # a seventh of what an export takes
    yield
    gc.enable()
    torch.set_num_threads(threads)


def request(b: int, h: int, w: int) -> Tensor:
    """[B,5,H,W]: smooth colours, a hole of another size and place in every photograph and NaN in it, edges everywhere, in
    the first photograph not in the hole."""
    low = torch.rand(b, 3, 5, 5)
    x = torch.cat(
        [nn.functional.interpolate(low, (h, w), mode="bicubic").clamp(0, 1), torch.zeros(b, 2, h, w)], 1
    )
    for i in range(b):
        x[i, 3, h // 4 : h // 4 + h // 5 + i, w // 3 + i : w // 3 + i + w // 5] = 1
    x[:, 4] = torch.rand(b, h, w) > 0.9
    x[0, 4] *= 1 - x[0, 3]
    return torch.where((x[:, 3:4] > 0) & (torch.arange(5) < 3).view(1, 5, 1, 1), torch.nan, x)


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def agrees(program: Any, model: Model, x: Tensor) -> Tensor:
    """The file's output, known pixels bit for bit and the holes within 1e-5 of the model's."""
    done = torch.from_numpy(program.run(None, {"x": x.numpy()})[0])
    hole = (x[:, 3:4] > 0).expand_as(done)
    assert torch.equal(done[~hole], x[:, :3][~hole])
    torch.testing.assert_close(done, model.complete(*x.split([3, 1, 1], dim=1)), atol=1e-5, rtol=0)
    return done[hole]


@pytest.mark.parametrize("name", list_models())
def test_onnxruntime_completes_what_the_model_does(
    name: str, small: Callable[..., Model], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = liven(small(name), request(3, 64, 64))
    size = None if TAKES.get(name, "size") == "size" else 32
    result = export_onnx(model, tmp_path / "model.onnx", size, {"sigma": 1.5})
    assert capfd.readouterr() == ("", "")
    assert [*tmp_path.iterdir()] == [tmp_path / "model.onnx"]  # one file, whole
    assert result["bytes"] == (tmp_path / "model.onnx").stat().st_size

    program = session(tmp_path / "model.onnx")
    (x,), (y,) = program.get_inputs(), program.get_outputs()
    sides = ["height", "width"] if size is None else [size, size]
    assert (x.name, x.type, x.shape) == ("x", "tensor(float)", ["batch", 5, *sides])
    assert (y.name, y.type, y.shape) == ("y", "tensor(float)", ["batch", 3, *sides])
    for shape in SIZES if size is None else [(b, size, size) for b in (1, 3)]:
        filled = agrees(program, model, request(*shape))
    assert filled.std() > 0.03, "the model gives one colour: that the file does too proves little"


def test_a_file_of_a_fixed_size_takes_any_batch(small: Callable[..., Model], tmp_path: Path) -> None:
    model = liven(small("context_encoder_region"), request(3, 64, 64))
    result = export_onnx(model, tmp_path / "made" / "model.onnx", 40)
    assert (result["size"], [found["shape"] for found in result["checked"]]) == (
        40,
        [[1, 40, 40], [2, 40, 40], [3, 40, 40]],
    )
    program = session(tmp_path / "made" / "model.onnx")
    assert program.get_inputs()[0].shape == ["batch", 5, 40, 40]
    for batch in (1, 4):
        agrees(program, model, request(batch, 40, 40))
    with pytest.raises(Exception, match=r"index: 3 Got: 41 Expected: 40"):
        program.run(None, {"x": np.zeros((1, 5, 40, 41), np.float32)})


# -- exports that go wrong -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    width: float = 0.5


class Filling(Completion):
    def __init__(self, fill: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.paint = fill

    def fill(self, image: Tensor, hole: Tensor, edge: Tensor) -> Tensor:
        return self.paint(image)


def model_of(fill: Callable[[Tensor], Tensor]) -> Any:
    return SimpleNamespace(
        name="stub", options=Options(), needs_edges=False, takes_edges=False, completion=lambda: Filling(fill)
    )


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    metadata = {"sigma": 1.5, "license": "CC-BY-4.0", "hole_range": [0.1, 0.5], "model": "not this"}
    result = export_onnx(model_of(lambda image: 1 - image), tmp_path / "m.onnx", metadata=metadata)
    assert [tuple(found["shape"]) for found in result["checked"]] == [*CHECKED]
    said = session(tmp_path / "m.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(said.pop("options")) == {"width": 0.5}
    assert said == {
        "model": "stub",
        "needs_edges": "false",
        "takes_edges": "false",
        "sigma": "1.5",
        "license": "CC-BY-4.0",
        "hole_range": "[0.1, 0.5]",
    }
    assert str(Path(__file__).parents[3]).encode() not in (tmp_path / "m.onnx").read_bytes()
    with pytest.raises(ValueError, match=r"^metadata.sigma cannot be kept as JSON: "):
        export_onnx(model_of(lambda image: image), tmp_path / "n.onnx", metadata={"sigma": float("nan")})


def rough(image: Tensor) -> Tensor:
    """float32's own error, which depends on the order of a sum, is far larger than 1e-5."""
    sums = nn.functional.conv2d(image, torch.ones(3, 3, 7, 7, dtype=image.dtype), padding=3)
    return 0.5 + (30 * sums).sin() / 2


def test_a_model_as_rough_as_float32_is_is_not_refused(tmp_path: Path) -> None:
    for found in export_onnx(model_of(rough), tmp_path / "m.onnx")["checked"]:
        assert 1e-5 < found["difference"] <= 10 * found["rounding"] < 0.1


def wrong_when_exported(image: Tensor) -> Tensor:
    return image + 0.5 + 1e-4 * torch.compiler.is_exporting()


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
def test_what_is_not_the_model_is_not_written(
    fill: Callable[[Tensor], Tensor], error: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.onnx").write_text("an earlier one")
    with pytest.raises(ValueError, match=error) as caught:
        export_onnx(model_of(fill), tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an earlier one"]
    assert capfd.readouterr() == ("", "")


def test_sizes_and_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="0x0 px: size is at least 1"):
        export_onnx(model_of(lambda image: image), tmp_path / "m.onnx", 0)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeError, match=r"\(onnxruntime\): pip install 'inpaint-pipelines\[onnx\]'$"):
        export_onnx(model_of(lambda image: image), tmp_path / "m.onnx")
