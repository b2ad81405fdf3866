"""AlexNet, VGG-16, LPIPS and the Inception of FID, against independent formulations with the same random weights."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import metric_networks
from models.metric_networks import (
    LPIPS_LAYERS,
    LPIPS_MIN_SIZE,
    FidInception,
    Lpips,
    load_fid_inception,
    load_lpips,
    lpips_heads_file,
    tf1_resize_bilinear,
)
from support.metric_weights import write_alexnet, write_inception, write_vgg16

# of the keys and shapes of torch-fidelity 0.4.0's FeatureExtractorInceptionV3, one line each, sorted
INCEPTION_NAMES_SHA256 = "8cdd2faeb41211e17f0fb47e66168d0cb1f981aa773b5f44e5b9cc93857fe492"
HEADS_SHA256 = {  # LPIPS v0.1's, as in the repository of its authors
    "alexnet": "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
    "vgg16": "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
}
PARAMETER_COUNTS = {"alexnet": 2_469_696, "vgg16": 14_714_688}  # of torchvision's `features`


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Sequential, Path]]:
    folder = tmp_path_factory.mktemp("backbones")
    paths = {name: folder / f"{name}.pth" for name in ("alexnet", "vgg16")}
    return {
        "alexnet": (write_alexnet(paths["alexnet"]), paths["alexnet"]),
        "vgg16": (write_vgg16(paths["vgg16"]), paths["vgg16"]),
    }


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], Path]:
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    return write_inception(path), path


def random_pictures(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, height, width, generator=generator) * 2 - 1


# -- LPIPS ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alexnet", "vgg16"])
def test_lpips_reads_torchvisions_layers(backbones, name: str) -> None:
    network, path = backbones[name]
    lpips = load_lpips(name, path)
    assert sum(p.numel() for p in lpips.stack.parameters()) == PARAMETER_COUNTS[name]
    assert not any(p.requires_grad for p in lpips.parameters())
    x = random_pictures(1, 70, 80)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    y, relus = (x - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1), []
    with torch.no_grad():
        for layer in network:
            y = layer(y)
            relus += [y] if isinstance(layer, nn.ReLU) else []
        features = lpips.stack(x, LPIPS_LAYERS[name])
    chosen = range(5) if name == "alexnet" else (1, 3, 6, 9, 12)
    for feature, index in zip(features.values(), chosen, strict=True):
        torch.testing.assert_close(feature, relus[index])


@pytest.mark.parametrize("name", ["alexnet", "vgg16"])
def test_lpips_agrees_with_torchmetrics(backbones, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = pytest.importorskip("torchmetrics.functional.image.lpips")
    network, path = backbones[name]
    monkeypatch.setattr(reference, "_get_tv_model_features", lambda net, pretrained: network)
    theirs = reference._LPIPS(net={"alexnet": "alex", "vgg16": "vgg"}[name], pnet_rand=True)
    a, b = random_pictures(4, 64, 72).chunk(2)
    with torch.no_grad():
        ours, expected = load_lpips(name, path)(a, b), theirs(a, b).flatten()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    assert ours.min() > 0


def test_lpips_by_hand() -> None:
    """One layer that shows the channels as they are: a pixel's direction counts, not its length."""

    class Channels(nn.Module):
        def forward(self, x: Tensor, layers: tuple[str, ...]) -> dict[str, Tensor]:
            return {"channels": x}

    lpips = Lpips(Channels(), ("channels",), [torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)])  # type: ignore[arg-type]
    a, b = torch.zeros(1, 3, 1, 2), torch.zeros(1, 3, 1, 2)
    a[0, :, 0, 0], b[0, :, 0, 0] = torch.tensor([3.0, 0, 4]), torch.tensor([0.0, 5, 0])
    a[0, :, 0, 1], b[0, :, 0, 1] = torch.tensor([1.0, 1, 1]), torch.tensor([7.0, 7, 7])
    first = 1 * 0.6**2 + 2 * 1**2 + 3 * 0.8**2
    assert float(lpips(a, b)) == pytest.approx((first + 0) / 2, abs=1e-6)
    assert float(lpips(a, a)) == 0


@pytest.mark.parametrize("name", ["alexnet", "vgg16"])
def test_the_smallest_picture_reaches_the_last_layer(backbones, name: str) -> None:
    lpips, size = load_lpips(name, backbones[name][1]), LPIPS_MIN_SIZE[name]
    x = random_pictures(2, size, size + 3)
    assert torch.isfinite(lpips(x[:1], x[1:])).all()
    with pytest.raises(RuntimeError):
        lpips(x[:1, :, 1:], x[1:, :, 1:])


@pytest.mark.parametrize("name", ["alexnet", "vgg16"])
def test_the_heads_are_those_of_lpips(name: str) -> None:
    assert hashlib.sha256(lpips_heads_file(name).read_bytes()).hexdigest() == HEADS_SHA256[name]


def test_missing_heads_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric_networks, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"torchmetrics is not installed: pip install 'inpaint-pip"):
        lpips_heads_file("alexnet")


def test_the_weights_of_another_network_are_refused(backbones, inception, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"features\.0\.weight has shape .* not alexnet's|not (this|alexnet)"
    ):
        load_lpips("alexnet", backbones["vgg16"][1])
    with pytest.raises(ValueError, match=r"not this network's state dict|it is not vgg16's"):
        load_lpips("vgg16", backbones["alexnet"][1])
    with pytest.raises(
        ValueError, match=r"has no 'Conv2d_1a_3x3\.conv\.weight': it is not the Inception v3 of"
    ):
        load_fid_inception(backbones["vgg16"][1])
    with pytest.raises(ValueError, match=r"not LPIPS's heads for vgg16"):
        load_lpips("vgg16", backbones["vgg16"][1], heads=lpips_heads_file("alexnet"))
    state = {**inception[0], "fc.weight": torch.zeros(1000, 2048)}
    torch.save(state, tmp_path / "torchvision.pth")
    with pytest.raises(ValueError, match=r"fc\.weight has shape \[1000, 2048\], not \[1008, 2048\]"):
        load_fid_inception(tmp_path / "torchvision.pth")
    with pytest.raises(ValueError, match="sha256"):
        load_fid_inception(inception[1], "0" * 64)


# -- Inception ------------------------------------------------------------------------------------------------


def test_inceptions_parameters_have_the_published_names_and_shapes() -> None:
    network = FidInception()
    lines = sorted(f"{key} {list(value.shape)}" for key, value in network.state_dict().items())
    assert len(lines) == 94 * 6 + 2  # convolutions with batch norm, and the classifier
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == INCEPTION_NAMES_SHA256
    # torchvision's without auxiliary classifier has 23,834,568 parameters with 1000 classes
    assert sum(p.numel() for p in network.parameters()) == 23_834_568 + 8 * (2048 + 1)
    assert not network.training


def conv(
    state: dict[str, Tensor], name: str, x: Tensor, stride: int = 1, padding: tuple[int, int] = (0, 0)
) -> Tensor:
    y = F.conv2d(x, state[f"{name}.conv.weight"], None, stride, padding)
    norm = [state[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    return F.batch_norm(y, *norm, False, 0.0, 1e-3).relu()


def mean_of_neighbours(x: Tensor) -> Tensor:
    """3x3 means over the pixels inside the picture, as a sum over their number."""
    ones = torch.ones(1, 1, *x.shape[2:])
    kernel = torch.ones(1, 1, 3, 3)
    sums = F.conv2d(x.flatten(0, 1)[:, None], kernel, padding=1).view_as(x)
    return sums / F.conv2d(ones, kernel, padding=1)


def chain(state: dict[str, Tensor], x: Tensor, prefix: str, *steps: tuple[str, tuple[int, int]]) -> Tensor:
    for name, padding in steps:
        x = conv(state, f"{prefix}.{name}", x, padding=padding)
    return x


def reference_features(state: dict[str, Tensor], pictures: Tensor) -> Tensor:
    """The network of Szegedy et al. 2016 as TensorFlow's graph of 2015 has it, for pictures of 299x299 pixels."""
    x = pictures.float() / 128 - 1
    x = conv(state, "Conv2d_1a_3x3", x, 2)
    x = conv(state, "Conv2d_2a_3x3", x)
    x = F.max_pool2d(conv(state, "Conv2d_2b_3x3", x, padding=(1, 1)), 3, 2)
    x = conv(state, "Conv2d_3b_1x1", x)
    x = F.max_pool2d(conv(state, "Conv2d_4a_3x3", x), 3, 2)
    one, wide, tall, three, five = (0, 0), (0, 3), (3, 0), (1, 1), (2, 2)
    for m in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        parts = [
            chain(state, x, m, ("branch1x1", one)),
            chain(state, x, m, ("branch5x5_1", one), ("branch5x5_2", five)),
            chain(state, x, m, ("branch3x3dbl_1", one), ("branch3x3dbl_2", three), ("branch3x3dbl_3", three)),
            conv(state, f"{m}.branch_pool", mean_of_neighbours(x)),
        ]
        x = torch.cat(parts, 1)
    double = chain(state, x, "Mixed_6a", ("branch3x3dbl_1", one), ("branch3x3dbl_2", three))
    parts = [conv(state, "Mixed_6a.branch3x3", x, 2), conv(state, "Mixed_6a.branch3x3dbl_3", double, 2)]
    x = torch.cat([*parts, F.max_pool2d(x, 3, 2)], 1)
    for m in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        double_steps = zip("12345", (one, tall, wide, tall, wide), strict=True)
        parts = [
            chain(state, x, m, ("branch1x1", one)),
            chain(state, x, m, ("branch7x7_1", one), ("branch7x7_2", wide), ("branch7x7_3", tall)),
            chain(state, x, m, *((f"branch7x7dbl_{i}", padding) for i, padding in double_steps)),
            conv(state, f"{m}.branch_pool", mean_of_neighbours(x)),
        ]
        x = torch.cat(parts, 1)
    seven = chain(
        state, x, "Mixed_7a", ("branch7x7x3_1", one), ("branch7x7x3_2", wide), ("branch7x7x3_3", tall)
    )
    three_by_three = conv(state, "Mixed_7a.branch3x3_1", x)
    parts = [
        conv(state, "Mixed_7a.branch3x3_2", three_by_three, 2),
        conv(state, "Mixed_7a.branch7x7x3_4", seven, 2),
        F.max_pool2d(x, 3, 2),
    ]
    x = torch.cat(parts, 1)
    for m in ("Mixed_7b", "Mixed_7c"):
        single = conv(state, f"{m}.branch3x3_1", x)
        double = chain(state, x, m, ("branch3x3dbl_1", one), ("branch3x3dbl_2", three))
        pooled = mean_of_neighbours(x) if m == "Mixed_7b" else F.max_pool2d(x, 3, 1, 1)
        parts = [
            conv(state, f"{m}.branch1x1", x),
            conv(state, f"{m}.branch3x3_2a", single, padding=(0, 1)),
            conv(state, f"{m}.branch3x3_2b", single, padding=(1, 0)),
            conv(state, f"{m}.branch3x3dbl_3a", double, padding=(0, 1)),
            conv(state, f"{m}.branch3x3dbl_3b", double, padding=(1, 0)),
            conv(state, f"{m}.branch_pool", pooled),
        ]
        x = torch.cat(parts, 1)
    return x.mean((2, 3))


def test_inception_against_a_functional_formulation(inception) -> None:
    state, path = inception
    pictures = torch.randint(
        0, 256, (2, 3, 299, 299), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
    )
    with torch.no_grad():
        features = load_fid_inception(path)(pictures)
        expected = reference_features(state, pictures)
    assert features.shape == (2, 2048)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert float((features[0] - features[1]).abs().mean()) > 1e-3  # the pictures differ


def test_the_resize_is_tensorflow_1s() -> None:
    """Output pixel i is read at i * in / out: the first pixel stays, the last ones repeat."""
    row = torch.tensor([0.0, 10.0, 40.0]).view(1, 1, 1, 3).expand(1, 1, 2, 3)
    expected = [0, 5, 10, 25, 40, 40]  # at 0, 0.5, 1, 1.5, 2, 2.5
    assert tf1_resize_bilinear(row, 6)[0, 0].tolist() == [[float(v) for v in expected]] * 6
    picture = np.random.default_rng(0).integers(0, 256, (37, 50)).astype(np.float64)

    def pixel(i: int, j: int) -> float:
        y, x = i * 37 / 299, j * 50 / 299
        top, left = math.floor(y), math.floor(x)
        total = 0.0
        for dy, wy in ((0, 1 - (y - top)), (1, y - top)):
            for dx, wx in ((0, 1 - (x - left)), (1, x - left)):
                total += wy * wx * picture[min(top + dy, 36), min(left + dx, 49)]
        return total

    resized = tf1_resize_bilinear(torch.from_numpy(picture)[None, None].float(), 299)[0, 0]
    for i, j in ((0, 0), (1, 1), (150, 40), (298, 298), (297, 3)):
        assert float(resized[i, j]) == pytest.approx(pixel(i, j), abs=1e-2)
    assert torch.equal(
        tf1_resize_bilinear(torch.arange(299.0).expand(1, 1, 299, 299), 299)[0, 0, 0], torch.arange(299.0)
    )
