"""EdgeConnect: Generative Image Inpainting with Adversarial Edge Learning. Nazeri, Ng, Joseph, Qureshi, Ebrahimi.
ICCV Workshops 2019.

G1 generates the edges in the hole, G2 completes the image from edges. Images are in [0,1] throughout; the networks see
holes in white. Defaults are the released configuration's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models.base import (
    Batch,
    Completion,
    HardwareKind,
    Losses,
    Model,
    Phase,
    Precision,
    PublishedTraining,
    SmallConfig,
    eval_mode,
    global_mask_mean,
)
from models.checkpoint_layout import (
    CheckpointLayout,
    NetworkLayout,
    OptionValues,
    StateDict,
    count_keys,
    dim_size,
    width_ratio,
)
from models.features import FeatureStack, load_feature_stack
from models.layers import add_spectral_norm_, crop_to, init_normal_, pad_to_multiple, scale_channels
from models.losses import (
    GAN_KINDS,
    feature_matching,
    gan_fake,
    gan_generator,
    gan_real,
    l1_over_hole,
    perceptual_loss,
    style_loss,
)

# As in the released code for VGG-19: the first layer of each resolution for the perceptual loss, the last of each for the
# style loss. The second lines are the analogue for EfficientNet-Lite0.
PERCEPTUAL_LAYERS = {
    "vgg19": ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"),
    "efficientnet_lite0": ("stem", "stage2", "stage3", "stage4", "stage6"),
}
STYLE_LAYERS = {
    "vgg19": ("relu2_2", "relu3_4", "relu4_4", "relu5_2"),
    "efficientnet_lite0": ("stage1", "stage2", "stage3", "stage5"),
}
EDGE_INPUTS = ("generated", "canny", "none")
G1, D1, G2, D2 = "edge_generator", "edge_discriminator", "inpaint_generator", "inpaint_discriminator"


@dataclass(frozen=True)
class EdgeConnectOptions:
    edge_input: str = "generated"
    """generated: G1's edges in the hole; canny: G2 alone, on true Canny edges (the paper's figure on sigma); none: G2
    alone, without edges (the paper's ablation)."""
    width: float = 1.0
    """Scales all channel counts; 1 is the paper's."""
    residual_blocks: int = 8
    """Residual blocks of each generator."""
    gan: str = "nsgan"
    """nsgan, lsgan or hinge."""
    lambda_adv1: float = 1.0
    """Weight of G1's adversarial loss."""
    lambda_FM: float = 10.0
    """Weight of G1's feature matching loss."""
    lambda_l1: float = 1.0
    """Weight of G2's l1."""
    lambda_adv2: float = 0.1
    """Weight of G2's adversarial loss."""
    lambda_p: float = 0.1
    """Weight of G2's perceptual loss."""
    lambda_s: float = 250.0
    """Weight of G2's style loss."""
    features: str | Mapping[str, Any] = "vgg19"
    """vgg19, efficientnet_lite0, or a mapping: name, weights, sha256, and perceptual and style (lists of layers).
    The defaults of lambda_p and lambda_s are for vgg19; efficientnet_lite0 has larger features: use 0.02 and 1."""
    vgg_normalize: bool = False
    """Whether VGG-19 gets ImageNet-normalised images; in the released code it gets [0,1]."""
    joint_without_d1: bool = False
    """Omit D1 and G1's own losses in the joint phase, as in the paper but not in the released code."""
    lr: float = 1e-4
    """Learning rate of the generators before the joint phase."""
    lr_drop_at: float = 1.0
    """Fraction of each phase before the joint one after which learning rates are divided by 10: the paper trains at 1e-4
    to a plateau, then at 1e-5; the released code never drops them (1)."""
    lr_joint: float = 1e-6
    """Learning rate of the generators in the joint phase."""
    d2g_lr: float = 0.1
    """Learning rate of the discriminators over that of the generators."""
    beta1: float = 0.0
    """First beta of Adam."""
    beta2: float = 0.9
    """Second beta of Adam."""

    def __post_init__(self) -> None:
        if self.edge_input not in EDGE_INPUTS:
            raise ValueError(
                f"edge_connect edge_input {self.edge_input!r} is none of {', '.join(EDGE_INPUTS)}"
            )
        if self.gan not in GAN_KINDS:
            raise ValueError(f"edge_connect gan {self.gan!r} is none of {', '.join(GAN_KINDS)}")
        if self.width <= 0 or self.residual_blocks < 0:
            raise ValueError("edge_connect width must be positive and residual_blocks not negative")
        if not 0 < self.lr_drop_at <= 1:
            raise ValueError(f"edge_connect lr_drop_at {self.lr_drop_at} is not in (0, 1]")
        config = self.feature_config
        if unknown := set(config) - {"name", "weights", "sha256", "perceptual", "style"}:
            raise ValueError(f"edge_connect features has no key {sorted(unknown)[0]!r}")
        if config.get("name") not in PERCEPTUAL_LAYERS:
            raise ValueError(
                f"edge_connect features {config.get('name')!r} is none of {', '.join(PERCEPTUAL_LAYERS)}"
            )

    @property
    def feature_config(self) -> dict[str, Any]:
        """`features` as a mapping."""
        return {"name": self.features} if isinstance(self.features, str) else dict(self.features)


def _instance_norm_relu(channels: int) -> list[nn.Module]:
    return [nn.InstanceNorm2d(channels), nn.ReLU(inplace=True)]  # neither affine nor with running statistics


class ResidualBlock(nn.Module):
    """x + IN(conv(ReLU(IN(conv, dilation 2)))), without activation after the addition."""

    def __init__(self, channels: int, bias: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.ReflectionPad2d(2),
            nn.Conv2d(channels, channels, 3, dilation=2, bias=bias),
            *_instance_norm_relu(channels),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=bias),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class Generator(nn.Module):
    """Architecture of G1 and G2: [B,c_in,H,W] -> [B,c_out,H,W], before the last activation; H, W multiples of 4."""

    def __init__(self, c_in: int, c_out: int, width: float, blocks: int, spectral_norm: bool) -> None:
        super().__init__()
        c1, c2, c3 = (scale_channels(c, width) for c in (64, 128, 256))
        body = nn.Sequential(
            *[nn.ReflectionPad2d(3), nn.Conv2d(c_in, c1, 7), *_instance_norm_relu(c1)],
            *[nn.Conv2d(c1, c2, 4, 2, 1), *_instance_norm_relu(c2)],  # H/2
            *[nn.Conv2d(c2, c3, 4, 2, 1), *_instance_norm_relu(c3)],  # H/4
            *[ResidualBlock(c3, bias=not spectral_norm) for _ in range(blocks)],
            *[nn.ConvTranspose2d(c3, c2, 4, 2, 1), *_instance_norm_relu(c2)],  # H/2
            *[nn.ConvTranspose2d(c2, c1, 4, 2, 1), *_instance_norm_relu(c1)],  # H
        )
        out = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(c1, c_out, 7))
        init_normal_(body)
        init_normal_(out)
        self.body = add_spectral_norm_(body) if spectral_norm else body
        self.out = out  # always without spectral norm

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x))


class EdgeGenerator(Generator):
    """G1: gray, edge, mask [B,1,H,W] -> edges in (0,1); gray and edge are not seen under the mask."""

    def __init__(self, width: float = 1.0, blocks: int = 8, spectral_norm: bool = True) -> None:
        super().__init__(3, 1, width, blocks, spectral_norm)

    def forward(self, gray: Tensor, edge: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        x = torch.cat([gray * (1 - mask) + mask, edge * (1 - mask), mask], dim=1)
        return torch.sigmoid(super().forward(x))


class InpaintGenerator(Generator):
    """G2: image [B,3,H,W], edge (None without edges), mask [B,1,H,W] -> image in (0,1); the image is not seen under the
    mask, the edge is."""

    def __init__(self, width: float = 1.0, blocks: int = 8, with_edges: bool = True) -> None:
        super().__init__(4 if with_edges else 3, 3, width, blocks, spectral_norm=False)

    def forward(self, image: Tensor, edge: Tensor | None, mask: Tensor) -> Tensor:  # type: ignore[override]
        x = image * (1 - mask) + mask
        x = x if edge is None else torch.cat([x, edge], dim=1)
        return (torch.tanh(super().forward(x)) + 1) / 2


class Discriminator(nn.Module):
    """70x70 PatchGAN with spectral norm: [B,c_in,H,W] -> the outputs of its five layers, the last one logits
    [B,1,H/8-2,W/8-2]."""

    def __init__(self, c_in: int, width: float = 1.0) -> None:
        super().__init__()
        c = [c_in, *(scale_channels(n, width) for n in (64, 128, 256, 512)), 1]
        self.layers = nn.ModuleList(
            nn.Conv2d(c[i], c[i + 1], 4, stride, 1, bias=False) for i, stride in enumerate((2, 2, 2, 1, 1))
        )
        init_normal_(self)
        add_spectral_norm_(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for conv in self.layers:
            x = conv(x)
            if conv is not self.layers[-1]:
                x = nn.functional.leaky_relu(x, 0.2)
            outputs.append(x)
        return outputs


def rgb_to_gray(image: Tensor) -> Tensor:
    """[B,3,H,W] -> [B,1,H,W], with the weights of skimage's rgb2gray."""
    r, g, b = image.split(1, dim=1)
    return 0.2125 * r + 0.7154 * g + 0.0721 * b


# -- public checkpoints ---------------------------------------------------------------------------------------


def _public_module_names(options: OptionValues) -> list[str]:
    blocks = [f"middle.{i}.conv_block.{j}" for i in range(options["residual_blocks"]) for j in (1, 5)]
    return [*(f"encoder.{i}" for i in (1, 4, 7)), *blocks, *(f"decoder.{i}" for i in (0, 3, 7))]


def _read_public_options(states: dict[str, StateDict], config: Mapping[str, Any]) -> OptionValues:
    g2 = states.get("inpaint_generator", {})
    state = g2 or states.get("edge_generator") or {}
    no_edges = {"edge_input": "none"} if dim_size(g2, "encoder.1.weight", 1) == 3 else {}
    return {
        "width": width_ratio(state, "decoder.3.bias", 64),
        "residual_blocks": count_keys(state, r"middle\.\d+\.conv_block\.1\.weight(_orig)?"),
        **no_edges,
    }


def _is_edge_generator(state: StateDict) -> bool:
    """Whether a generator is G1, with or without spectral norm: it has 3 input channels (gray, edge, mask) and 1 output
    channel, G2 has 4 (RGB, edge) and 3."""
    c_out, c_in = dim_size(state, "decoder.7.weight"), dim_size(state, "encoder.1.weight", 1)
    return c_out == 1 or (c_out is None and c_in == 3)


# Without effect: instance norm removes a constant added to a channel.
_RESIDUAL_BIAS = r"middle\.\d+\.conv_block\.[15]\.bias"

LAYOUT = CheckpointLayout(
    source="knazeri/edge-connect",
    license_name="CC BY-NC 4.0",
    network_layouts=(
        NetworkLayout(
            "edge_generator",
            "EdgeModel_gen.pth",
            r"encoder\.4\.weight",
            _public_module_names,
            accepts=_is_edge_generator,
            ignored_pattern=_RESIDUAL_BIAS,  # of a G1 trained without spectral norm
        ),
        NetworkLayout(
            "inpaint_generator",
            "InpaintingModel_gen.pth",
            r"encoder\.4\.weight",
            _public_module_names,
            accepts=lambda state: not _is_edge_generator(state),
            zero_pattern=_RESIDUAL_BIAS,  # of a G2 trained with it
        ),
    ),
    read_options=_read_public_options,
    read_image_size=lambda options, config: 256,
    notes=lambda options: (
        "the repository's test script passes G1's full output to G2; here, as in its training, G2 gets the known edges "
        "outside the hole",
    ),
    discriminator_pattern=r"conv1\.0\.weight",
)


class EdgeConnect(Model):
    name: ClassVar[str] = "edge_connect"
    Options: ClassVar[type] = EdgeConnectOptions
    size_multiple: ClassVar[int] = 4
    feature_loss_options: ClassVar[tuple[str, ...]] = ("lambda_p", "lambda_s")
    published_training: ClassVar[PublishedTraining] = PublishedTraining(
        device_hours=14 * 24,
        device="a Titan Xp or V",
        source="more than two weeks, github.com/knazeri/edge-connect/issues/22",
        batch_size=8,
        image_size=256,
    )
    precisions: ClassVar[Mapping[HardwareKind, Precision]] = {
        "amx": Precision(bfloat16=True),
        "avx512_bf16": Precision(bfloat16=True),
    }
    small_config: ClassVar[SmallConfig] = SmallConfig(
        {
            "width": 0.125,
            "residual_blocks": 1,
            "features": "efficientnet_lite0",
            "lambda_p": 0.02,
            "lambda_s": 1.0,
        },
        image_size=32,
        overfit_steps={"edge": 20, "inpaint": 100},
    )
    checkpoint_layout: ClassVar[CheckpointLayout] = LAYOUT
    options: EdgeConnectOptions

    def __init__(self, options: EdgeConnectOptions) -> None:
        super().__init__(options)
        w, blocks = options.width, options.residual_blocks
        self.needs_edges = self.takes_edges = options.edge_input != "none"
        self.uses_true_edges = options.edge_input == "canny"
        self.visualizations = ("edges",) if options.edge_input == "generated" else ()
        networks: dict[str, nn.Module] = {}
        if options.edge_input == "generated":
            networks = {G1: EdgeGenerator(w, blocks), D1: Discriminator(2, w)}  # D1 sees gray and edge
        networks |= {G2: InpaintGenerator(w, blocks, self.takes_edges), D2: Discriminator(3, w)}
        self.networks = nn.ModuleDict(networks)

        def phase(
            name: str, generators: tuple[str, ...], discriminators: tuple[str, ...], lr: float = options.lr
        ) -> Phase:
            return Phase(
                name,
                steps=2_000_000,  # the released MAX_ITERS of each stage
                generators=generators,
                discriminators=discriminators,
                lr=dict.fromkeys(generators, lr) | dict.fromkeys(discriminators, lr * options.d2g_lr),
                betas=(options.beta1, options.beta2),
                uses_edges=self.takes_edges,  # all stages need the edges outside the hole
                lr_drop_at=options.lr_drop_at if name != "joint" else 1.0,
            )

        all_phases = (
            phase("edge", (G1,), (D1,)),
            phase("inpaint_canny", (G2,), (D2,)),
            phase("inpaint", (G2,), (D2,)),
            phase("joint", (G1, G2), (D2,) if options.joint_without_d1 else (D1, D2), options.lr_joint),
        )
        g2_phase = {"canny": "inpaint_canny", "none": "inpaint"}.get(options.edge_input)
        self.phases = tuple(p for p in all_phases if g2_phase is None or p.name == g2_phase)
        # in a tuple, so that it is not part of the state dict
        self._feature_stack: tuple[FeatureStack] | None = None

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
                out["edge"] = self.networks[G1](rgb_to_gray(image), edge, mask)
        if phase.name != "edge":
            composite = edge * (1 - mask) + out["edge"] * mask if "edge" in out else edge
            out["image"] = self.networks[G2](image, composite if self.takes_edges else None, mask)
        return out

    # -- losses -----------------------------------------------------------------------------------------------

    def discriminator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        losses: Losses = {}
        pairs = self._real_fake_pairs(batch, {name: image.detach() for name, image in out.items()}, phase)
        for name, (d, real, fake) in pairs.items():
            with parametrize.cached():  # one power iteration for both passes
                on_real, on_fake = d(real)[-1], d(fake)[-1]
            losses[name] = (gan_real(on_real, self.options.gan) + gan_fake(on_fake, self.options.gan)) / 2
        return losses

    def generator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        losses: Losses = {}
        pairs = self._real_fake_pairs(batch, out, phase)
        if "D1" in pairs:
            d1, real, fake = pairs["D1"]
            with parametrize.cached():  # the same weights for both passes: L_FM of equal inputs is 0
                with torch.no_grad():
                    on_real = d1(real)
                on_fake = d1(fake)
            losses["adv1"] = gan_generator(on_fake[-1], self.options.gan)
            losses["FM"] = feature_matching(on_fake, on_real)
        if "D2" in pairs:
            d2, real, fake = pairs["D2"]
            losses["l1"] = l1_over_hole(fake, real, global_mask_mean(batch))
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

    def _real_fake_pairs(
        self, batch: Batch, out: dict[str, Tensor], phase: Phase
    ) -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
        """D1 and D2, if trained, each with its real and its generated input."""
        pairs = {}
        if D1 in phase.discriminators:
            gray = rgb_to_gray(batch["image"])
            real, fake = torch.cat([gray, batch["edge"]], dim=1), torch.cat([gray, out["edge"]], dim=1)
            pairs["D1"] = (self.networks[D1], real, fake)
        if D2 in phase.discriminators:
            pairs["D2"] = (self.networks[D2], batch["image"], out["image"])
        return pairs

    def _feature_losses(self, fake: Tensor, real: Tensor, mask: Tensor) -> Losses:
        """Perceptual loss on the whole output, style loss on the hole only: different images, so two passes."""
        losses: Losses = {}
        if self.options.lambda_p:
            losses["p"] = perceptual_loss(*self._feature_maps("perceptual", PERCEPTUAL_LAYERS, fake, real))
        if self.options.lambda_s:
            losses["s"] = style_loss(*self._feature_maps("style", STYLE_LAYERS, fake * mask, real * mask))
        return losses

    def _feature_maps(
        self, term: str, default_layers: Mapping[str, tuple[str, ...]], fake: Tensor, real: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The features of `fake` and of `real` at the layers of a loss term: per layer's name [B,C,h,w]."""
        config = self.options.feature_config
        phi, layers = self.feature_stack().to(real), config.get(term) or default_layers[config["name"]]
        with torch.no_grad():
            real_features = phi(real, layers)
        return phi(fake, layers), real_features

    def feature_stack(self) -> FeatureStack:
        """The frozen stack for the perceptual and style losses, loaded on first use."""
        if self._feature_stack is None:
            config, normalize = self.options.feature_config, self.options.vgg_normalize
            stack = load_feature_stack(config["name"], config.get("weights"), config.get("sha256"), normalize)
            self._feature_stack = (stack,)
        return self._feature_stack[0]

    def load_loss_networks(self, phase: Phase) -> None:
        if {"p", "s"} & self.weights(phase).keys():
            self.feature_stack()

    # -- completion -------------------------------------------------------------------------------------------

    def predict_edges(self, image: Tensor, mask: Tensor, edge: Tensor | None = None) -> Tensor:
        """G1's output, [B,1,H,W] in (0,1)."""
        edge = torch.zeros_like(mask) if edge is None else edge
        with torch.no_grad(), eval_mode(self.networks):
            return self.networks[G1](rgb_to_gray(image), edge, mask)

    def _build_completion(self) -> Completion:
        g1 = dict(self.networks.items()).get(G1)
        return EdgeCompletion(g1, self.networks[G2], self.takes_edges)


class EdgeCompletion(Completion):
    """G1 generates the edges in the hole, except in photographs with an edge pixel inside the hole: their edges are
    user-drawn or true ones, and are used as they are. Without G1 the given edges are used."""

    def __init__(self, g1: nn.Module | None, g2: nn.Module, takes_edges: bool) -> None:
        super().__init__()
        self.g1, self.g2, self.takes_edges = g1, g2, takes_edges

    def inpaint_hole(self, image: Tensor, hole: Tensor, edge: Tensor) -> Tensor:
        height, width = image.shape[2:]
        # 12: the reflection padding of the residual blocks needs 3 pixels at a quarter of the size
        image, mask, edge = (pad_to_multiple(x, 4, min_size=12) for x in (image, hole.to(image.dtype), edge))
        if self.g1 is not None:
            edges_given = (edge * mask).amax(dim=(1, 2, 3), keepdim=True) > 0
            hole_edges = torch.where(edges_given, edge, self.g1(rgb_to_gray(image), edge, mask))
            edge = edge * (1 - mask) + hole_edges * mask
        filled = self.g2(image, edge if self.takes_edges else None, mask)
        return crop_to(filled, height, width)
