"""EdgeConnect: Generative Image Inpainting with Adversarial Edge Learning. Nazeri, Ng, Joseph, Qureshi, Ebrahimi.
ICCV Workshops 2019.

G1 draws the edges of the hole, G2 paints over edges. Images are in [0,1] throughout; holes are white where a
network sees them. Defaults are the released configuration's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models.base import Batch, Completion, Losses, Model, Phase, hole_mean
from models.features import FeatureStack, load_features
from models.layers import crop_to, init_normal_, pad_to_multiple, scaled, spectral_
from models.losses import (
    GAN_KINDS,
    feature_matching,
    gan_fake,
    gan_generator,
    gan_real,
    l1_over_hole,
    perceptual,
    style,
)

# The first layer of each resolution for the perceptual term, the last of each for style, as the released code has it
# for VGG-19; the second line is our analogue.
PERCEPTUAL = {
    "vgg19": ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"),
    "efficientnet_lite0": ("stem", "stage2", "stage3", "stage4", "stage6"),
}
STYLE = {
    "vgg19": ("relu2_2", "relu3_4", "relu4_4", "relu5_2"),
    "efficientnet_lite0": ("stage1", "stage2", "stage3", "stage5"),
}
EDGES = ("generated", "canny", "none")
G1, D1, G2, D2 = "edge_generator", "edge_discriminator", "inpaint_generator", "inpaint_discriminator"


@dataclass(frozen=True)
class EdgeConnectOptions:
    edges: str = "generated"
    """generated: G1 draws the hole's; canny: G2 alone, on true Canny edges (the paper's figure on sigma); none: G2
    alone, without edges (its ablation)."""
    width: float = 1.0
    """Scales every channel count; 1 is the paper's."""
    residual_blocks: int = 8
    gan: str = "nsgan"
    """nsgan, lsgan or hinge."""
    lambda_adv1: float = 1.0
    lambda_FM: float = 10.0
    lambda_l1: float = 1.0
    lambda_adv2: float = 0.1
    lambda_p: float = 0.1
    lambda_s: float = 250.0
    features: str | Mapping[str, Any] = "vgg19"
    """vgg19, efficientnet_lite0, or a mapping: name, weights, sha256, and perceptual and style (lists of layers).
    lambda_p and lambda_s above are meant for vgg19; efficientnet_lite0's features are larger: 0.02 and 1 suit it."""
    vgg_normalize: bool = False
    """Whether VGG-19 sees ImageNet-normalised images; the released code gives it [0,1]."""
    drop_d1: bool = False
    """Leave D1 and G1's own losses out of the joint phase, as the paper does and the code does not."""
    lr: float = 1e-4
    lr_drop: float = 1.0
    """The share of a phase before the joint one after which rates are a tenth: the paper trains at 1e-4 to a plateau,
    then at 1e-5; the released code never drops them (1)."""
    lr_joint: float = 1e-6
    d2g_lr: float = 0.1
    """Discriminators' rate over generators'."""
    beta1: float = 0.0
    beta2: float = 0.9

    def __post_init__(self) -> None:
        if self.edges not in EDGES:
            raise ValueError(f"edge_connect edges {self.edges!r} is none of {', '.join(EDGES)}")
        if self.gan not in GAN_KINDS:
            raise ValueError(f"edge_connect gan {self.gan!r} is none of {', '.join(GAN_KINDS)}")
        if self.width <= 0 or self.residual_blocks < 0:
            raise ValueError("edge_connect width must be positive and residual_blocks not negative")
        if not 0 < self.lr_drop <= 1:
            raise ValueError(f"edge_connect lr_drop {self.lr_drop} is not in (0, 1]")
        stack = self.stack
        if unknown := set(stack) - {"name", "weights", "sha256", "perceptual", "style"}:
            raise ValueError(f"edge_connect features has no key {sorted(unknown)[0]!r}")
        if stack.get("name") not in PERCEPTUAL:
            raise ValueError(
                f"edge_connect features {stack.get('name')!r} is none of {', '.join(PERCEPTUAL)}"
            )

    @property
    def stack(self) -> dict[str, Any]:
        """`features` as a mapping."""
        return {"name": self.features} if isinstance(self.features, str) else dict(self.features)


def _norm(channels: int) -> list[nn.Module]:
    return [nn.InstanceNorm2d(channels), nn.ReLU(inplace=True)]  # not affine, no running statistics


class ResidualBlock(nn.Module):
    """x + IN(conv(ReLU(IN(conv, dilation 2)))); nothing after the addition."""

    def __init__(self, channels: int, bias: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.ReflectionPad2d(2),
            nn.Conv2d(channels, channels, 3, dilation=2, bias=bias),
            *_norm(channels),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=bias),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class Generator(nn.Module):
    """The body G1 and G2 share: [B,c_in,H,W] -> [B,c_out,H,W], before the last activation; H, W multiples of 4."""

    def __init__(self, c_in: int, c_out: int, width: float, blocks: int, spectral_norm: bool) -> None:
        super().__init__()
        c1, c2, c3 = (scaled(c, width) for c in (64, 128, 256))
        body = nn.Sequential(
            *[nn.ReflectionPad2d(3), nn.Conv2d(c_in, c1, 7), *_norm(c1)],
            *[nn.Conv2d(c1, c2, 4, 2, 1), *_norm(c2)],  # H/2
            *[nn.Conv2d(c2, c3, 4, 2, 1), *_norm(c3)],  # H/4
            *[ResidualBlock(c3, bias=not spectral_norm) for _ in range(blocks)],
            *[nn.ConvTranspose2d(c3, c2, 4, 2, 1), *_norm(c2)],  # H/2
            *[nn.ConvTranspose2d(c2, c1, 4, 2, 1), *_norm(c1)],  # H
        )
        out = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(c1, c_out, 7))
        init_normal_(body)
        init_normal_(out)
        self.body = spectral_(body) if spectral_norm else body
        self.out = out  # never under spectral norm

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x))


class EdgeGenerator(Generator):
    """G1: grey, edge, mask [B,1,H,W] -> edges in (0,1); what lies under the mask is not seen."""

    def __init__(self, width: float = 1.0, blocks: int = 8, spectral_norm: bool = True) -> None:
        super().__init__(3, 1, width, blocks, spectral_norm)

    def forward(self, grey: Tensor, edge: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        x = torch.cat([grey * (1 - mask) + mask, edge * (1 - mask), mask], dim=1)
        return torch.sigmoid(super().forward(x))


class InpaintGenerator(Generator):
    """G2: image [B,3,H,W], edge (None: it takes none), mask [B,1,H,W] -> image in (0,1); the edge is seen under the
    mask too."""

    def __init__(self, width: float = 1.0, blocks: int = 8, edges: bool = True) -> None:
        super().__init__(4 if edges else 3, 3, width, blocks, spectral_norm=False)

    def forward(self, image: Tensor, edge: Tensor | None, mask: Tensor) -> Tensor:  # type: ignore[override]
        x = image * (1 - mask) + mask
        x = x if edge is None else torch.cat([x, edge], dim=1)
        return (torch.tanh(super().forward(x)) + 1) / 2


class Discriminator(nn.Module):
    """70x70 PatchGAN under spectral norm: [B,c_in,H,W] -> the outputs of its five
    layers, the last one raw: [B,1,H/8-2,W/8-2] logits."""

    def __init__(self, c_in: int, width: float = 1.0) -> None:
        super().__init__()
        c = [c_in, *(scaled(n, width) for n in (64, 128, 256, 512)), 1]
        self.layers = nn.ModuleList(
            nn.Conv2d(c[i], c[i + 1], 4, stride, 1, bias=False) for i, stride in enumerate((2, 2, 2, 1, 1))
        )
        init_normal_(self)
        spectral_(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for conv in self.layers:
            x = conv(x)
            if conv is not self.layers[-1]:
                x = nn.functional.leaky_relu(x, 0.2)
            outputs.append(x)
        return outputs


def grey(image: Tensor) -> Tensor:
    """[B,3,H,W] -> [B,1,H,W], weighted as skimage's rgb2gray."""
    r, g, b = image.split(1, dim=1)
    return 0.2125 * r + 0.7154 * g + 0.0721 * b


class EdgeConnect(Model):
    name: ClassVar[str] = "edge_connect"
    Options: ClassVar[type] = EdgeConnectOptions
    multiple: ClassVar[int] = 4
    options: EdgeConnectOptions

    def __init__(self, options: EdgeConnectOptions) -> None:
        super().__init__(options)
        w, blocks = options.width, options.residual_blocks
        self.needs_edges = self.takes_edges = options.edges != "none"
        self.true_edges = options.edges == "canny"
        networks: dict[str, nn.Module] = {}
        if options.edges == "generated":
            networks = {G1: EdgeGenerator(w, blocks), D1: Discriminator(2, w)}  # D1 sees grey and edge
        networks |= {G2: InpaintGenerator(w, blocks, self.takes_edges), D2: Discriminator(3, w)}
        self.networks = nn.ModuleDict(networks)

        def phase(name: str, gs: tuple[str, ...], ds: tuple[str, ...], lr: float = options.lr) -> Phase:
            trained = dict.fromkeys(gs, lr) | dict.fromkeys(ds, lr * options.d2g_lr)
            # 2e6 is the released MAX_ITERS of every stage; outside the hole all of them need edges
            betas, drop = (options.beta1, options.beta2), options.lr_drop if name != "joint" else 1.0
            return Phase(name, 2_000_000, gs, ds, trained, betas, self.takes_edges, drop_at=drop)

        all_phases = (
            phase("edge", (G1,), (D1,)),
            phase("inpaint_canny", (G2,), (D2,)),
            phase("inpaint", (G2,), (D2,)),
            phase("joint", (G1, G2), (D2,) if options.drop_d1 else (D1, D2), options.lr_joint),
        )
        own = {"canny": ("inpaint_canny",), "none": ("inpaint",)}.get(options.edges)
        self.phases = tuple(p for p in all_phases if own is None or p.name in own)
        # in a tuple, so that it is no part of the state dict
        self._features: tuple[FeatureStack] | None = None

    # -- generators -------------------------------------------------------------------------------------------

    def generate(self, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        image, mask, edge = batch["image"], batch["mask"], batch.get("edge")
        if edge is None and phase.uses_edges:
            raise ValueError(
                f"edge_connect's phase {phase.name} needs edges in the batch: the recipe's data has none"
            )
        out: dict[str, Tensor] = {}
        if G1 in self.networks and phase.name != "inpaint_canny":
            with torch.set_grad_enabled(G1 in phase.generators and torch.is_grad_enabled()):
                out["edge"] = self.networks[G1](grey(image), edge, mask)
        if phase.name != "edge":
            drawn = edge * (1 - mask) + out["edge"] * mask if "edge" in out else edge
            out["image"] = self.networks[G2](image, drawn if self.takes_edges else None, mask)
        return out

    # -- losses -----------------------------------------------------------------------------------------------

    def discriminator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        losses: Losses = {}
        pairs = self._pairs(batch, {name: image.detach() for name, image in out.items()}, phase)
        for name, (d, real, fake) in pairs.items():
            with parametrize.cached():  # one power iteration for both
                on_real, on_fake = d(real)[-1], d(fake)[-1]
            losses[name] = (gan_real(on_real, self.options.gan) + gan_fake(on_fake, self.options.gan)) / 2
        return losses

    def generator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        losses: Losses = {}
        pairs = self._pairs(batch, out, phase)
        if "D1" in pairs:
            d1, real, fake = pairs["D1"]
            with parametrize.cached():  # both under the same weights: L_FM of equal inputs is 0
                with torch.no_grad():
                    on_real = d1(real)
                on_fake = d1(fake)
            losses["adv1"] = gan_generator(on_fake[-1], self.options.gan)
            losses["FM"] = feature_matching(on_fake, on_real)
        if "D2" in pairs:
            d2, real, fake = pairs["D2"]
            losses["l1"] = l1_over_hole(fake, real, hole_mean(batch))
            losses["adv2"] = gan_generator(d2(fake)[-1], self.options.gan)
            losses |= self._feature_losses(fake, real, batch["mask"])
        return losses

    def weights(self, phase: Phase) -> dict[str, float]:
        o = self.options
        weights: dict[str, float] = {}
        if D1 in phase.discriminators:
            weights |= {"D1": 1.0, "adv1": o.lambda_adv1, "FM": o.lambda_FM}
        if D2 in phase.discriminators:
            weights |= {"D2": 1.0, "l1": o.lambda_l1, "adv2": o.lambda_adv2}
            weights |= {name: x for name, x in (("p", o.lambda_p), ("s", o.lambda_s)) if x}
        return weights

    def _pairs(
        self, batch: Batch, out: dict[str, Tensor], phase: Phase
    ) -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
        """Each trained discriminator with the real and the generated images that it compares."""
        pairs = {}
        if D1 in phase.discriminators:
            g = grey(batch["image"])
            real, fake = torch.cat([g, batch["edge"]], dim=1), torch.cat([g, out["edge"]], dim=1)
            pairs["D1"] = (self.networks[D1], real, fake)
        if D2 in phase.discriminators:
            pairs["D2"] = (self.networks[D2], batch["image"], out["image"])
        return pairs

    def _feature_losses(self, fake: Tensor, real: Tensor, mask: Tensor) -> Losses:
        """Perceptual on the raw output, style inside the hole: other images, so each has its own pass."""
        losses: Losses = {}
        if self.options.lambda_p:
            losses["p"] = perceptual(*self._phi("perceptual", PERCEPTUAL, fake, real))
        if self.options.lambda_s:
            losses["s"] = style(*self._phi("style", STYLE, fake * mask, real * mask))
        return losses

    def _phi(
        self, term: str, layers: Mapping[str, tuple[str, ...]], fake: Tensor, real: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        stack = self.options.stack
        phi, names = self.features().to(real), stack.get(term) or layers[stack["name"]]
        with torch.no_grad():
            of_real = phi(real, names)
        return phi(fake, names), of_real

    def features(self) -> FeatureStack:
        """The frozen stack of the perceptual and style terms, loaded at its first use."""
        if self._features is None:
            stack, normalize = self.options.stack, self.options.vgg_normalize
            features = load_features(stack["name"], stack.get("weights"), stack.get("sha256"), normalize)
            self._features = (features,)
        return self._features[0]

    def prepare(self, phase: Phase) -> None:
        if {"p", "s"} & self.weights(phase).keys():
            self.features()

    # -- completion -------------------------------------------------------------------------------------------

    def _completion(self) -> Completion:
        g1 = dict(self.networks.items()).get(G1)
        return EdgeCompletion(g1, self.networks[G2], self.takes_edges)


class EdgeCompletion(Completion):
    """G1 draws the hole's edges, unless an edge pixel inside that sample's hole says that a person has (or that they
    are the true ones); without G1, the given edges are all there are."""

    def __init__(self, g1: nn.Module | None, g2: nn.Module, edges: bool) -> None:
        super().__init__()
        self.g1, self.g2, self.edges = g1, g2, edges

    def fill(self, image: Tensor, hole: Tensor, edge: Tensor) -> Tensor:
        height, width = image.shape[2:]
        # 12: the reflection padding of the residual blocks needs 3 pixels at a quarter of the size
        image, mask, edge = (pad_to_multiple(x, 4, least=12) for x in (image, hole.to(image.dtype), edge))
        if self.g1 is not None:
            drawn = (edge * mask).amax(dim=(1, 2, 3), keepdim=True) > 0
            inside = torch.where(drawn, edge, self.g1(grey(image), edge, mask))
            edge = edge * (1 - mask) + inside * mask
        filled = self.g2(image, edge if self.edges else None, mask)
        return crop_to(filled, height, width)
