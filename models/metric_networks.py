"""The frozen networks of published scores: LPIPS on AlexNet and VGG-16, and the Inception v3 of FID.

They are rebuilt from layer tables, with the parameter names of the published files; only the weights come from elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from models.features import FeatureStack, MeanStd, build_alexnet, build_vgg, read_state_dict

INCEPTION_DIMENSIONS = 2048
INCEPTION_SIZE = 299
"""Side in pixels of the pictures that Inception sees."""


LPIPS_LAYERS = {  # Zhang et al. 2018, section 3: the outputs of the ReLUs that feed LPIPS's heads
    "alexnet": ("relu1", "relu2", "relu3", "relu4", "relu5"),
    "vgg16": ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3"),
}
LPIPS_MIN_SIZE = {"alexnet": 31, "vgg16": 16}
"""Smallest side in pixels of a picture that reaches the last layer."""
LPIPS_HEADS = {"alexnet": "alex", "vgg16": "vgg"}  # their names in torchmetrics and in the lpips package
# LPIPS's ScalingLayer, for pictures in [-1,1]: ImageNet's statistics of [0,1] there
LPIPS_SHIFT, LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
LPIPS_EPS = 1e-10


# -- LPIPS ----------------------------------------------------------------------------------------------------


class Lpips(nn.Module):
    """LPIPS v0.1 (Zhang et al. 2018): a distance between two pictures of the same size, 0 for equal ones.

    d = sum over layers of the mean over positions of w . (f_a - f_b)^2, with f the features of a position divided by
    their norm over channels.
    """

    def __init__(self, stack: FeatureStack, layers: tuple[str, ...], heads: list[Tensor]) -> None:
        super().__init__()
        self.stack, self.layers = stack, layers
        self.heads = nn.ParameterList([nn.Parameter(head, requires_grad=False) for head in heads])

    def features(self, x: Tensor) -> list[Tensor]:
        """Normalised features per layer, [B,C,h,w], of pictures [B,3,H,W] in [-1,1]."""
        return [f / (f.square().sum(1, keepdim=True).sqrt() + LPIPS_EPS) for f in self._raw(x)]

    def distance(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """LPIPS [B] of the features of two batches of pictures."""
        terms = [
            nn.functional.conv2d((fa - fb).square(), head).mean((1, 2, 3))
            for fa, fb, head in zip(a, b, self.heads, strict=True)
        ]
        return torch.stack(terms).sum(0)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """LPIPS [B] of pictures [B,3,H,W] in [-1,1]."""
        return self.distance(self.features(a), self.features(b))

    def _raw(self, x: Tensor) -> list[Tensor]:
        return list(self.stack(x, self.layers).values())


def load_lpips(
    network: str, weights: str | Path, sha256: str | None = None, heads: str | Path | None = None
) -> Lpips:
    """LPIPS on `alexnet` or `vgg16`.

    weights: the network's state dict with torchvision's names, written by torch.save; its classifier is not needed.
    heads: the linear layers; None: those in the installed torchmetrics. FileNotFoundError: a file is missing, with the
    way to get it. ValueError: a wrong checksum, or a file without these weights.
    """
    builders: dict[str, Callable[[Mapping[str, Tensor], MeanStd], FeatureStack]]
    builders = {"alexnet": build_alexnet, "vgg16": build_vgg}
    scaling = (LPIPS_SHIFT, LPIPS_SCALE)
    stack = builders[network](read_state_dict(Path(weights), sha256), scaling)
    layers = LPIPS_LAYERS[network]
    path = Path(heads) if heads else lpips_heads_file(network)
    state = read_state_dict(path)
    tensors = []
    for i, layer in enumerate(layers):
        key, shape = f"lin{i}.model.1.weight", (1, stack.layer_channels[layer], 1, 1)
        if key not in state or tuple(state[key].shape) != shape:
            raise ValueError(
                f"{path} has no {key!r} of shape {list(shape)}: it is not LPIPS's heads for {network}"
            )
        tensors.append(state[key].float())
    return Lpips(stack, layers, tensors).requires_grad_(False).eval()


def lpips_heads_file(network: str) -> Path:
    """The file with LPIPS's heads in the installed torchmetrics, which is not imported: that takes seconds.

    FileNotFoundError: torchmetrics is not installed, or has no such file.
    """
    spec = find_spec("torchmetrics")
    name = f"functional/image/lpips_models/{LPIPS_HEADS[network]}.pth"
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder, name)).is_file():
            return path
    missing = f"torchmetrics here has no {name}" if spec else "torchmetrics is not installed"
    raise FileNotFoundError(
        f"LPIPS's linear layers come with torchmetrics, and {missing}: pip install 'inpaint-pipelines[weights]'"
    )


# -- the Inception v3 of FID ----------------------------------------------------------------------------------

# A convolution: name -> (output channels, kernel [height, width], stride). The 3x3 kernels of stride 2 and those of the
# stem but one are without padding, all others keep the size.
_Conv = tuple[int, tuple[int, int], int]


def _conv(channels: int, height: int = 1, width: int | None = None, stride: int = 1) -> _Conv:
    return channels, (height, height if width is None else width), stride


def _block_a(pool: int) -> dict[str, _Conv]:
    """35x35 (Szegedy et al. 2016, figure 5)."""
    return {
        "branch1x1": _conv(64),
        "branch5x5_1": _conv(48),
        "branch5x5_2": _conv(64, 5),
        "branch3x3dbl_1": _conv(64),
        "branch3x3dbl_2": _conv(96, 3),
        "branch3x3dbl_3": _conv(96, 3),
        "branch_pool": _conv(pool),
    }


def _block_c(c: int) -> dict[str, _Conv]:
    """17x17 with kernels of 1x7 and 7x1 (figure 6)."""
    return {
        "branch1x1": _conv(192),
        "branch7x7_1": _conv(c),
        "branch7x7_2": _conv(c, 1, 7),
        "branch7x7_3": _conv(192, 7, 1),
        "branch7x7dbl_1": _conv(c),
        "branch7x7dbl_2": _conv(c, 7, 1),
        "branch7x7dbl_3": _conv(c, 1, 7),
        "branch7x7dbl_4": _conv(c, 7, 1),
        "branch7x7dbl_5": _conv(192, 1, 7),
        "branch_pool": _conv(192),
    }


_BLOCK_B = {  # 35x35 -> 17x17
    "branch3x3": _conv(384, 3, stride=2),
    "branch3x3dbl_1": _conv(64),
    "branch3x3dbl_2": _conv(96, 3),
    "branch3x3dbl_3": _conv(96, 3, stride=2),
}
_BLOCK_D = {  # 17x17 -> 8x8
    "branch3x3_1": _conv(192),
    "branch3x3_2": _conv(320, 3, stride=2),
    "branch7x7x3_1": _conv(192),
    "branch7x7x3_2": _conv(192, 1, 7),
    "branch7x7x3_3": _conv(192, 7, 1),
    "branch7x7x3_4": _conv(192, 3, stride=2),
}
_BLOCK_E = {  # 8x8: `_2a` and `_2b` (`_3a` and `_3b`) see the same input (figure 7)
    "branch1x1": _conv(320),
    "branch3x3_1": _conv(384),
    "branch3x3_2a": _conv(384, 1, 3),
    "branch3x3_2b": _conv(384, 3, 1),
    "branch3x3dbl_1": _conv(448),
    "branch3x3dbl_2": _conv(384, 3),
    "branch3x3dbl_3a": _conv(384, 1, 3),
    "branch3x3dbl_3b": _conv(384, 3, 1),
    "branch_pool": _conv(192),
}
INCEPTION_STEM: Mapping[str, tuple[_Conv, int]] = {  # name -> convolution, padding
    "Conv2d_1a_3x3": (_conv(32, 3, stride=2), 0),
    "Conv2d_2a_3x3": (_conv(32, 3), 0),
    "Conv2d_2b_3x3": (_conv(64, 3), 1),
    "Conv2d_3b_1x1": (_conv(80), 0),
    "Conv2d_4a_3x3": (_conv(192, 3), 0),
}
INCEPTION_BLOCKS: Mapping[str, tuple[Mapping[str, _Conv], str]] = {
    # name -> convolutions, pooling. The network of 2015 differs from torchvision's: its average pools do not count the
    # padding, and its last block has a maximum where the paper has a mean.
    "Mixed_5b": (_block_a(32), "mean"),
    "Mixed_5c": (_block_a(64), "mean"),
    "Mixed_5d": (_block_a(64), "mean"),
    "Mixed_6a": (_BLOCK_B, "halve"),
    "Mixed_6b": (_block_c(128), "mean"),
    "Mixed_6c": (_block_c(160), "mean"),
    "Mixed_6d": (_block_c(160), "mean"),
    "Mixed_6e": (_block_c(192), "mean"),
    "Mixed_7a": (_BLOCK_D, "halve"),
    "Mixed_7b": (_BLOCK_E, "mean"),
    "Mixed_7c": (_BLOCK_E, "maximum"),
}
INCEPTION_LOGITS = 1008  # classes of the network of 2015


class _ConvNormRelu(nn.Module):
    """Convolution without bias, batch norm (epsilon 0.001), ReLU; parameters `conv.*` and `bn.*`."""

    def __init__(self, c_in: int, conv: _Conv, padding: tuple[int, int]) -> None:
        super().__init__()
        c_out, kernel, stride = conv
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.bn(self.conv(x)), inplace=True)


class _InceptionBlock(nn.Module):
    """Parallel branches of one input, concatenated: chains of convolutions, and a pool."""

    def __init__(self, c_in: int, convs: Mapping[str, _Conv], pooling: str) -> None:
        super().__init__()
        self.pooling = pooling
        self.chains: dict[str, list[str]] = {}
        for name in convs:
            self.chains.setdefault(name.partition("_")[0] if name != "branch_pool" else name, []).append(name)
        self.c_out = c_in if pooling == "halve" else 0
        for names in self.chains.values():
            c = c_in
            for name in names:
                c_out, (height, width), stride = convs[name]
                padding = (height // 2, width // 2) if stride == 1 else (0, 0)
                self.add_module(name, _ConvNormRelu(c, convs[name], padding))
                c = c if name.endswith("a") else c_out  # `a` and `b` have the same input
            self.c_out += 2 * c if names[-1].endswith("b") else c

    def forward(self, x: Tensor) -> Tensor:
        outputs = [
            self._run_chain(x, names) for chain, names in self.chains.items() if chain != "branch_pool"
        ]
        if self.pooling == "halve":
            outputs.append(nn.functional.max_pool2d(x, 3, 2))
        elif self.pooling == "maximum":
            outputs.append(self.get_submodule("branch_pool")(nn.functional.max_pool2d(x, 3, 1, 1)))
        else:
            mean = nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            outputs.append(self.get_submodule("branch_pool")(mean))
        return torch.cat(outputs, 1)

    def _run_chain(self, x: Tensor, names: list[str]) -> Tensor:
        last: list[Tensor] = []
        for name in names:
            y = self.get_submodule(name)(x)
            if name.endswith(("a", "b")):
                last.append(y)
            else:
                x = y
        return torch.cat(last, 1) if last else x


class FidInception(nn.Module):
    """The Inception v3 of FID (the TensorFlow graph `inception-2015-12-05`), with its PyTorch port's parameter names."""

    def __init__(self) -> None:
        super().__init__()
        c = 3
        for name, (conv, padding) in INCEPTION_STEM.items():
            self.add_module(name, _ConvNormRelu(c, conv, (padding, padding)))
            c = conv[0]
        for name, (convs, pooling) in INCEPTION_BLOCKS.items():
            block = _InceptionBlock(c, convs, pooling)
            self.add_module(name, block)
            c = block.c_out
        self.fc = nn.Linear(c, INCEPTION_LOGITS)  # in the published file; FID does not use it
        self.requires_grad_(False).eval()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # 1x1 convolutions are faster

    def forward(self, pictures: Tensor) -> Tensor:
        """Features [B,2048] (the mean over positions of the last block) of pictures uint8 [B,3,H,W] of any size."""
        x = tf1_resize_bilinear(pictures.float(), INCEPTION_SIZE)
        x = (x - 128) / 128  # as in the graph: from [0,255] to [-1,1)
        x = x.contiguous(memory_format=torch.channels_last)
        for name in INCEPTION_STEM:
            x = self.get_submodule(name)(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = nn.functional.max_pool2d(x, 3, 2)
        for name in INCEPTION_BLOCKS:
            x = self.get_submodule(name)(x)
        return x.mean((2, 3))


def tf1_resize_bilinear(x: Tensor, size: int) -> Tensor:
    """TensorFlow 1's `resize_bilinear` to size x size pixels, without `align_corners` and half-pixel centres: output
    pixel i is read at i * (input size / size), between the two nearest pixels. x: float [B,C,H,W]."""

    def positions(length: int) -> tuple[Tensor, Tensor, Tensor]:
        at = torch.arange(size, dtype=x.dtype, device=x.device) * (length / size)
        low = at.floor().long().clamp_max(length - 1)
        return low, (low + 1).clamp_max(length - 1), at - low

    left, right, fraction_x = positions(x.shape[3])
    top, bottom, fraction_y = positions(x.shape[2])
    low = x.index_select(3, left)
    rows = low + (x.index_select(3, right) - low) * fraction_x
    low = rows.index_select(2, top)
    return low + (rows.index_select(2, bottom) - low) * fraction_y[:, None]


def load_fid_inception(weights: str | Path, sha256: str | None = None) -> FidInception:
    """The Inception of FID with the weights of a state dict (`pt_inception-2015-12-05-6726825d.pth`).

    FileNotFoundError: no such file. ValueError: a wrong checksum, or a file of another network, such as torchvision's
    Inception v3 (1000 classes).
    """
    network = FidInception()
    state = read_state_dict(Path(weights), sha256)
    own = network.state_dict()
    for key, tensor in own.items():
        if key.endswith("num_batches_tracked"):
            continue
        if key not in state:
            raise ValueError(f"{weights} has no {key!r}: it is not the Inception v3 of FID")
        if state[key].shape != tensor.shape:
            raise ValueError(
                f"{weights}: {key} has shape {list(state[key].shape)}, not {list(tensor.shape)}: it is not the "
                "Inception v3 of FID"
            )
        own[key] = state[key]
    network.load_state_dict(own)
    return network
