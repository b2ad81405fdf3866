"""The generators of the public implementations that `inpaint import` reads, with few channels, for tests.

Written from their state dicts and layers (names, shapes, order), as an independent reference for the outputs of the same
tensors. Random weights make mistakes visible: see `scrambled`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.edge_connect import rgb_to_gray


def scrambled(module: nn.Module) -> nn.Module:
    """The module in evaluation mode, with random weights and batch norm statistics that make mistakes visible."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data.uniform_(0.5, 1.5).mul_(torch.randn_like(layer.weight).sign())
            layer.bias.data.normal_(0, 0.3)
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.5, 2)
        elif isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            weight = getattr(layer, "weight_orig", layer.weight)
            nn.init.kaiming_normal_(
                weight, mode="fan_out" if isinstance(layer, nn.ConvTranspose2d) else "fan_in"
            )
            if layer.bias is not None:
                layer.bias.data.normal_(0, 0.2)
    return module.eval()


# -- edge_connect ----------------------------------------------------------------------------------------------


class EdgeConnectBlock(nn.Module):
    def __init__(self, c: int, norm: Callable[[nn.Module], nn.Module], bias: bool) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            *[nn.ReflectionPad2d(2), norm(nn.Conv2d(c, c, 3, dilation=2, bias=bias))],
            *[nn.InstanceNorm2d(c), nn.ReLU()],
            *[nn.ReflectionPad2d(1), norm(nn.Conv2d(c, c, 3, bias=bias)), nn.InstanceNorm2d(c)],
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class EdgeConnectGenerator(nn.Module):
    def __init__(self, c_in: int, c_out: int, spectral: bool, c: int = 8, blocks: int = 2) -> None:
        super().__init__()
        norm = nn.utils.spectral_norm if spectral else nn.Identity()

        def after(channels: int) -> list[nn.Module]:
            return [nn.InstanceNorm2d(channels), nn.ReLU()]

        self.encoder = nn.Sequential(
            *[nn.ReflectionPad2d(3), norm(nn.Conv2d(c_in, c, 7)), *after(c)],
            *[norm(nn.Conv2d(c, 2 * c, 4, 2, 1)), *after(2 * c)],
            *[norm(nn.Conv2d(2 * c, 4 * c, 4, 2, 1)), *after(4 * c)],
        )
        self.middle = nn.Sequential(*[EdgeConnectBlock(4 * c, norm, not spectral) for _ in range(blocks)])
        self.decoder = nn.Sequential(
            *[norm(nn.ConvTranspose2d(4 * c, 2 * c, 4, 2, 1)), *after(2 * c)],
            *[norm(nn.ConvTranspose2d(2 * c, c, 4, 2, 1)), *after(c)],
            *[nn.ReflectionPad2d(3), nn.Conv2d(c, c_out, 7)],
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.middle(self.encoder(x)))


def edge_connect(spectral: bool = True) -> tuple[EdgeConnectGenerator, EdgeConnectGenerator]:
    """G1 and G2. spectral: G1 was trained under spectral norm, as it is by default."""
    g1, g2 = scrambled(EdgeConnectGenerator(3, 1, spectral)), scrambled(EdgeConnectGenerator(4, 3, False))
    g1.train()
    for _ in range(3):  # power iterations: u and v converge to those of the weights
        g1(torch.rand(1, 3, 16, 16))
    g2.decoder[-1].weight.data.mul_(0.3)
    return g1.eval(), g2.eval()


@torch.no_grad()
def complete_with_edge_connect(
    g1: nn.Module, g2: nn.Module, image: Tensor, mask: Tensor, edge: Tensor
) -> Tensor:
    inputs = [rgb_to_gray(image) * (1 - mask) + mask, edge * (1 - mask), mask]
    edges = torch.sigmoid(g1(torch.cat(inputs, 1))) * mask + edge * (1 - mask)
    return (torch.tanh(g2(torch.cat([image * (1 - mask) + mask, edges], 1))) + 1) / 2


# -- deepfill --------------------------------------------------------------------------------------------------


def attention(x: Tensor, mask: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """Contextual attention of the repositories, position by position: x [1,C,H,W], mask [1,1,4H,4W]."""
    small, hole = x[..., ::2, ::2], mask[..., ::8, ::8]
    h, w = small.shape[2:]
    positions = [(i, j) for i in range(h) for j in range(w)]

    def windows(t: Tensor, side: int, step: int) -> Tensor:
        padded = F.pad(t, (1, 1, 1, 1))[0]
        at = [(step * i, step * j) for i, j in positions]
        return torch.stack([padded[:, i : i + side, j : j + side].flatten() for i, j in at])

    patches, usable = windows(small, 3, 1), windows(hole, 3, 1).sum(1) == 0
    scores = patches @ (patches / norm(patches)[:, None]).T  # [position, patch]

    def diagonal(s: Tensor) -> Tensor:
        s = F.pad(s, (1, 1, 1, 1))
        return s[:-2, :-2] + s[1:-1, 1:-1] + s[2:, 2:]

    columns = torch.tensor([i * w + j for j in range(w) for i in range(h)])
    inverse = torch.argsort(columns)
    scores = diagonal(diagonal(scores)[columns][:, columns])[inverse][:, inverse]
    weights = torch.softmax(10 * scores * usable, 1) * usable
    pasted = (weights @ windows(x, 4, 2)).view(-1, x.shape[1], 4, 4)
    out = x.new_zeros(x.shape[1], 2 * h + 2, 2 * w + 2)
    for (i, j), patch in zip(positions, pasted, strict=True):
        out[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += patch / 4
    return out[None, :, 1:-1, 1:-1]


def clamped_norm(patches: Tensor) -> Tensor:
    return patches.norm(dim=1).clamp_min(1e-4)


def norm_with_epsilon(patches: Tensor) -> Tensor:
    return (patches.square() + 1e-4).sum(1).sqrt()


class Conv1(nn.Module):
    def __init__(
        self, c_in: int, c_out: int, k: int = 3, stride: int = 1, rate: int = 1, act: Any = F.elu
    ) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(c_in, c_out, k, stride, rate * (k // 2), rate), act

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.act is None else self.act(x)


def upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


class Encoder1(nn.Module):
    """A sequence of convolutions with the port's names."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1, self.conv2_downsample = Conv1(5, c, 5), Conv1(c, 2 * c, stride=2)
        self.conv3, self.conv4_downsample = Conv1(2 * c, 2 * c), Conv1(2 * c, 4 * c, stride=2)
        self.conv5, self.conv6 = Conv1(4 * c, 4 * c), Conv1(4 * c, 4 * c)
        for i, rate in enumerate((2, 4, 8, 16), 7):
            setattr(self, f"conv{i}_atrous", Conv1(4 * c, 4 * c, rate=rate))
        self.conv11, self.conv12 = Conv1(4 * c, 4 * c), Conv1(4 * c, 4 * c)
        self.conv13, self.conv14 = Conv1(4 * c, 2 * c), Conv1(2 * c, 2 * c)
        self.conv15, self.conv16 = Conv1(2 * c, c), Conv1(c, c // 2)
        self.conv17 = Conv1(c // 2, 3, act=None)

    def forward(self, x: Tensor) -> Tensor:
        for name, layer in self.named_children():
            x = layer(upsample(x) if name in ("conv13", "conv15") else x)
        return x.clamp(-1, 1)


class Fine1(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1, self.conv2_downsample = Conv1(5, c, 5), Conv1(c, c, stride=2)
        self.conv3, self.conv4_downsample = Conv1(c, 2 * c), Conv1(2 * c, 2 * c, stride=2)
        self.conv5, self.conv6 = Conv1(2 * c, 4 * c), Conv1(4 * c, 4 * c)
        for i, rate in enumerate((2, 4, 8, 16), 7):
            setattr(self, f"conv{i}_atrous", Conv1(4 * c, 4 * c, rate=rate))
        self.pmconv1, self.pmconv2_downsample = Conv1(5, c, 5), Conv1(c, c, stride=2)
        self.pmconv3, self.pmconv4_downsample = Conv1(c, 2 * c), Conv1(2 * c, 4 * c, stride=2)
        self.pmconv5, self.pmconv6 = Conv1(4 * c, 4 * c), Conv1(4 * c, 4 * c, act=F.relu)
        self.pmconv9, self.pmconv10 = Conv1(4 * c, 4 * c), Conv1(4 * c, 4 * c)
        self.allconv11, self.allconv12 = Conv1(8 * c, 4 * c), Conv1(4 * c, 4 * c)
        self.allconv13, self.allconv14 = Conv1(4 * c, 2 * c), Conv1(2 * c, 2 * c)
        self.allconv15, self.allconv16 = Conv1(2 * c, c), Conv1(c, c // 2)
        self.allconv17 = Conv1(c // 2, 3, act=None)

    def forward(self, x: Tensor, mask: Tensor, norm: Any) -> Tensor:
        layers = dict(self.named_children())

        def run(x: Tensor, prefix: str, *numbers: int) -> Tensor:
            for n in numbers:
                layer = next(layers[k] for k in layers if k.split("_")[0] == f"{prefix}{n}")
                x = layer(upsample(x) if prefix == "allconv" and n in (13, 15) else x)
            return x

        hallucinated = run(x, "conv", *range(1, 11))
        attended = attention(run(x, "pmconv", *range(1, 7)), mask, norm)
        merged = torch.cat([hallucinated, run(attended, "pmconv", 9, 10)], 1)
        return run(merged, "allconv", *range(11, 18)).clamp(-1, 1)


class DeepFill1(nn.Module):
    def __init__(self, c: int = 4) -> None:
        super().__init__()
        self.coarse_generator, self.fine_generator = Encoder1(c), Fine1(c)

    def forward(self, image: Tensor, mask: Tensor, norm: Any) -> Tensor:
        x, extra_channels = (image * 2 - 1) * (1 - mask), [torch.ones_like(mask), mask]
        coarse = self.coarse_generator(torch.cat([x, *extra_channels], 1))
        x = coarse * mask + x * (1 - mask)
        return (self.fine_generator(torch.cat([x, *extra_channels], 1), mask, norm) + 1) / 2


def deepfill_v1() -> DeepFill1:
    net = scrambled(DeepFill1())
    for last in (net.coarse_generator.conv17, net.fine_generator.allconv17):
        last.conv.weight.data.mul_(0.3)
    return net


class Gated(nn.Module):
    def __init__(
        self, c_in: int, c_out: int, k: int = 3, stride: int = 1, rate: int = 1, act: Any = F.elu
    ) -> None:
        super().__init__()
        plain = act is None
        self.conv = nn.Conv2d(c_in, c_out if plain else 2 * c_out, k, stride, rate * (k // 2), rate)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.act is None:
            return x
        features, gates = x.split(x.shape[1] // 2, 1)
        return self.act(features) * torch.sigmoid(gates)


class GatedUp(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = Gated(c_in, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(upsample(x))


class Down2(nn.Module):
    def __init__(self, c_in: int, hidden: int, c_out: int) -> None:
        super().__init__()
        self.conv1_downsample, self.conv2 = Gated(c_in, hidden, stride=2), Gated(hidden, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1_downsample(x))


class Up2(nn.Module):
    def __init__(self, c_in: int, hidden: int, c_out: int) -> None:
        super().__init__()
        self.conv1_upsample, self.conv2 = GatedUp(c_in, hidden), Gated(hidden, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1_upsample(x))


class Stage2(nn.Module):
    """Either stage: `branches` are the name prefixes before the merge; the coarse stage has one, the empty prefix."""

    def __init__(self, cnum: int, c_in: int, branches: tuple[str, ...]) -> None:
        super().__init__()
        # in the first and in the later release
        self.norm = norm_with_epsilon if branches[0] == "b1_" else clamped_norm
        c1, c2, c4 = cnum // 2, cnum, 2 * cnum
        self.branches, fine = branches, len(branches) == 2
        for branch, hidden in zip(branches, (c1, c1) if fine else (c2,)):
            setattr(self, f"{branch}conv1", Gated(c_in, c1, 5))
            setattr(self, f"{branch}down_block1", Down2(c1, hidden, c2))
            last = c2 if fine and branch == branches[0] else c4
            setattr(self, f"{branch}down_block2", Down2(c2, last, c4))
            if fine and branch == branches[1]:
                setattr(self, f"{branch}conv_bn1", Gated(c4, c4, act=F.relu))
                setattr(self, f"{branch}conv_bn4", Gated(c4, c4))
                setattr(self, f"{branch}conv_bn5", Gated(c4, c4))
            else:
                for i, rate in enumerate((1, 2, 4, 8, 16), 1):
                    setattr(self, f"{branch}conv_bn{i}", Gated(c4, c4, rate=rate))
        self.conv_bn6, self.conv_bn7 = Gated(len(branches) * c4, c4), Gated(c4, c4)
        self.up_block1, self.up_block2 = Up2(c4, c2, c2), Up2(c2, c1, cnum // 4)
        self.conv_to_rgb = Gated(cnum // 4, 3, act=None)
        if fine and branches[0] != "b1_":
            self.contextual_attention = nn.Module()
            self.contextual_attention.register_buffer("fuse_weight", torch.eye(3).view(1, 1, 3, 3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        def run(x: Tensor, *names: str) -> Tensor:
            for name in names:
                x = getattr(self, name)(x)
            return x

        first = self.branches[0]
        down = ("conv1", "down_block1", "down_block2", "conv_bn1")
        y = run(x, *(first + n for n in (*down, "conv_bn2", "conv_bn3", "conv_bn4", "conv_bn5")))
        if len(self.branches) == 2:
            second = self.branches[1]
            attended = attention(run(x, *(second + n for n in down)), mask, self.norm)
            y = torch.cat([y, run(attended, f"{second}conv_bn4", f"{second}conv_bn5")], 1)
        return torch.tanh(run(y, "conv_bn6", "conv_bn7", "up_block1", "up_block2", "conv_to_rgb"))


class DeepFill2(nn.Module):
    def __init__(
        self, cnum: int = 8, branches: tuple[str, str] = ("conv_", "ca_"), guided: bool = False
    ) -> None:
        super().__init__()
        self.stage1, self.stage2 = Stage2(cnum, 6 if guided else 5, ("",)), Stage2(cnum, 3, branches)

    def forward(self, image: Tensor, mask: Tensor, sketch: Tensor | None = None) -> Tensor:
        x = (image * 2 - 1) * (1 - mask)
        sketch_channels = [] if sketch is None else [sketch * mask]
        coarse = self.stage1(torch.cat([x, *sketch_channels, torch.ones_like(mask), mask], 1), mask)
        return (self.stage2(coarse * mask + x * (1 - mask), mask) + 1) / 2


def deepfill_v2(branches: tuple[str, str] = ("conv_", "ca_"), guided: bool = False) -> DeepFill2:
    net = scrambled(DeepFill2(branches=branches, guided=guided))
    for layer in net.modules():
        # compensates the gates, which would otherwise remove the signal
        if isinstance(layer, Gated) and layer.act is not None:
            layer.conv.weight.data[: len(layer.conv.weight) // 2] *= 1.75
    return net


# -- glcic -----------------------------------------------------------------------------------------------------


class Completion(nn.Module):
    def __init__(self, c: int = 4) -> None:
        super().__init__()
        wide = [(4, 2), (2, 4), (4, 4), (4, 8), *[(8, 8)] * 8, (8, 4), (4, 4), (4, 2), (2, 1)]  # of c
        rates = dict(zip((7, 8, 9, 10), (2, 4, 8, 16)))
        for i, (a, b) in enumerate(wide, 1):
            c_in, c_out, rate = a * c if i > 1 else 4, b * c, rates.get(i, 1)
            if i in (13, 15):
                self.add_module(f"deconv{i}", nn.ConvTranspose2d(c_in, c_out, 4, 2, 1))
            else:
                k, stride = 5 if i == 1 else 3, 2 if i in (2, 4) else 1
                self.add_module(f"conv{i}", nn.Conv2d(c_in, c_out, k, stride, rate * (k // 2), rate))
            self.add_module(f"bn{i}", nn.BatchNorm2d(c_out))
        self.conv17 = nn.Conv2d(c, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        for name, layer in self.named_children():
            x = layer(F.relu(x)) if name.startswith("bn") else layer(x)  # the port's order
        return torch.sigmoid(x)


# -- context_encoder -------------------------------------------------------------------------------------------


class NetG(nn.Module):
    """The port's generator: one Sequential, or two with `split`, as in a pull request."""

    def __init__(self, c: int = 4, bottleneck: int = 10, split: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, c, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
        for a, b in ((c, c), (c, 2 * c), (2 * c, 4 * c), (4 * c, 8 * c)):
            layers += [nn.Conv2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(8 * c, bottleneck, 4, bias=False), nn.BatchNorm2d(bottleneck), nn.LeakyReLU(0.2)]
        encode = layers
        layers = [nn.ConvTranspose2d(bottleneck, 8 * c, 4, bias=False), nn.BatchNorm2d(8 * c), nn.ReLU()]
        for a, b in ((8 * c, 4 * c), (4 * c, 2 * c), (2 * c, c)):
            layers += [nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        layers += [nn.ConvTranspose2d(c, 3, 4, 2, 1, bias=False), nn.Tanh()]
        if split:
            self.main_encode, self.main_decode = nn.Sequential(*encode), nn.Sequential(*layers)
        else:
            self.main = nn.Sequential(*encode, *layers)

    def forward(self, x: Tensor) -> Tensor:
        for stack in self.children():
            x = stack(x)
        return x


def local_critic(c: int = 4) -> dict[str, Tensor]:
    """State dict of the port's discriminator for 64x64 centres; its names also occur in the generator."""
    sides, state = [3, c, 2 * c, 4 * c, 8 * c], {}
    for i, (a, b) in enumerate(pairwise(sides)):
        state[f"main.{max(0, 3 * i - 1)}.weight"] = torch.randn(b, a, 4, 4)
        if i:
            for name in ("weight", "bias", "running_mean", "running_var"):
                state[f"main.{3 * i}.{name}"] = torch.rand(b)
    return state | {"main.11.weight": torch.randn(1, 8 * c, 4, 4)}


# -- partial_conv ----------------------------------------------------------------------------------------------


class Partial(nn.Module):
    def __init__(self, c_in: int, c_out: int, k: int, stride: int, bias: bool) -> None:
        super().__init__()
        self.input_conv = nn.Conv2d(c_in, c_out, k, stride, k // 2, bias=bias)
        self.mask_conv = nn.Conv2d(c_in, c_out, k, stride, k // 2, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        count = F.conv2d(mask, self.mask_conv.weight, None, self.mask_conv.stride, self.mask_conv.padding)
        bias = self.input_conv.bias
        b = 0 if bias is None else bias.view(1, -1, 1, 1)
        y = (self.input_conv(x * mask) - b) / count.clamp(min=1) + b
        return y * (count > 0), (count > 0).to(x.dtype)


class PartialBlock(nn.Module):
    def __init__(
        self, c_in: int, c_out: int, k: int, stride: int, slope: float | None, norm: bool = True
    ) -> None:
        super().__init__()
        self.conv, self.slope = Partial(c_in, c_out, k, stride, slope is None), slope
        if norm and slope is not None:
            self.bn = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x, mask = self.conv(x, mask)
        x = self.bn(x) if hasattr(self, "bn") else x
        return x if self.slope is None else F.leaky_relu(x, self.slope), mask


class PartialUNet(nn.Module):
    def __init__(self, c: int = 4, levels: int = 4) -> None:
        super().__init__()
        self.levels = levels
        sides = [3, c, 2 * c, 4 * c, *[8 * c] * (levels - 3)]
        for i in range(1, levels + 1):
            k = {1: 7, 2: 5, 3: 5}.get(i, 3)
            self.add_module(f"enc_{i}", PartialBlock(sides[i - 1], sides[i], k, 2, 0.0, norm=i > 1))
        for i in range(levels, 0, -1):
            block = PartialBlock(sides[i] + sides[i - 1], sides[i - 1], 3, 1, 0.2 if i > 1 else None)
            self.add_module(f"dec_{i}", block)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        skips = []
        for i in range(1, self.levels + 1):
            skips.append((x, mask))
            x, mask = getattr(self, f"enc_{i}")(x, mask)
        for i in range(self.levels, 0, -1):
            joined = [torch.cat([upsample(t), old], 1) for t, old in zip((x, mask), skips.pop())]
            x, mask = getattr(self, f"dec_{i}")(*joined)
        return x


def total_variation(image: Tensor) -> Tensor:
    """The port's total variation, pair by pair: mean differences of horizontal plus of vertical neighbours."""
    x = image.double().numpy()
    total = 0.0
    for a, b in ((x[..., 1:], x[..., :-1]), (x[..., 1:, :], x[..., :-1, :])):
        pairs = list(zip(a.ravel(), b.ravel(), strict=True))
        total += sum(abs(p - q) for p, q in pairs) / len(pairs)
    return torch.tensor(total)


def partial_conv() -> PartialUNet:
    net = scrambled(PartialUNet())
    for name, parameter in net.named_parameters():
        if "mask_conv" in name:
            parameter.data.fill_(1)
        elif "input_conv.weight" in name:
            parameter.data.mul_(parameter[0].numel())  # undoes the division by the window's size
    return net
