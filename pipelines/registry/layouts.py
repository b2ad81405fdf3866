"""How public PyTorch implementations lay out their state dicts: what `importing` needs to know of each, as tables.

Facts of those repositories (names, shapes, order of layers), none of their code. A layout is here only when our
network computes the same function from its tensors; where something around it differs, a note says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models import build_model

State = dict[str, Tensor]
Options = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A state dict of theirs, and the network of ours that it fills."""

    network: str
    file: str
    """What its files are called, for errors."""
    mark: str
    """A key that no other state dict of the layouts has (a regular expression)."""
    modules: Callable[[Options], list[str]]
    """Their modules that hold tensors, in the order in which ours are defined."""
    renames: tuple[tuple[str, str], ...] = ()
    """Done to their keys first: pattern, replacement."""
    ignored: str = r"(?!)"
    """Their tensors that are no weights (a regular expression)."""


@dataclass(frozen=True)
class Layout:
    """A public implementation of the model of the same name."""

    source: str
    licence: str
    parts: tuple[Part, ...]
    options: Callable[[dict[str, State], Mapping[str, Any]], Options]
    """Our options, read off the shapes (by network) and the implementation's own configuration file, if there is one.
    Never raises: what is missing is said when keys are compared."""
    size: Callable[[Options, Mapping[str, Any]], Any]
    """The side in pixels of its training photographs."""
    notes: tuple[str, ...] = ()
    left_out: str = r"(?!)"
    """A key of state dicts that completion does not need, such as critics (a regular expression)."""
    refused: tuple[tuple[str, str], ...] = ()
    """A key of state dicts that compute another function (a regular expression), and the reason."""
    finish: Callable[[State, Options], tuple[State, Options]] = lambda state, options: (state, options)
    """What is done to the generator's tensors, named as ours, to make ours the same function."""


def _side(state: Mapping[str, Tensor], key: str, dim: int = 0) -> int | None:
    tensor = state.get(key)
    return tensor.shape[dim] if tensor is not None and tensor.ndim > dim else None


def _width(state: Mapping[str, Tensor], key: str, base: int) -> float:
    """The width option: channels of a layer over the paper's `base`."""
    return (_side(state, key) or base) / base


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many keys match."""
    return sum(1 for key in state if re.fullmatch(pattern, key))


# -- edge_connect ----------------------------------------------------------------------------------------------


def _edge_connect_modules(options: Options) -> list[str]:
    blocks = [f"middle.{i}.conv_block.{j}" for i in range(options["residual_blocks"]) for j in (1, 5)]
    return [*(f"encoder.{i}" for i in (1, 4, 7)), *blocks, *(f"decoder.{i}" for i in (0, 3, 7))]


def _edge_connect_options(states: dict[str, State], config: Mapping[str, Any]) -> Options:
    state = states.get("inpaint_generator") or states.get("edge_generator") or {}
    return {
        "width": _width(state, "decoder.3.bias", 64),
        "residual_blocks": _count(state, r"middle\.\d+\.conv_block\.1\.weight(_orig)?"),
    }


EDGE_CONNECT = Layout(
    source="knazeri/edge-connect",
    licence="CC BY-NC 4.0",
    parts=(
        Part("edge_generator", "EdgeModel_gen.pth", r"encoder\.1\.weight_orig", _edge_connect_modules),
        Part("inpaint_generator", "InpaintingModel_gen.pth", r"encoder\.1\.weight", _edge_connect_modules),
    ),
    options=_edge_connect_options,
    size=lambda options, config: 256,
    notes=(
        "the repository's test script hands all of G1's output to G2; here, as in its training, the known edges stay "
        "outside the hole",
    ),
    left_out=r"conv1\.0\.weight(_orig)?",
)


# -- deepfill_v1 -----------------------------------------------------------------------------------------------

_DOWN = ["1", "2_downsample", "3", "4_downsample", "5", "6"]
_ATROUS = [f"{i}_atrous" for i in (7, 8, 9, 10)]
_UP = [str(i) for i in range(11, 18)]


def _deepfill_v1_modules(options: Options) -> list[str]:
    return [
        *(f"coarse_generator.conv{n}.conv" for n in (*_DOWN, *_ATROUS, *_UP)),
        *(f"fine_generator.conv{n}.conv" for n in (*_DOWN, *_ATROUS)),
        *(f"fine_generator.pmconv{n}.conv" for n in (*_DOWN, "9", "10")),
        *(f"fine_generator.allconv{n}.conv" for n in _UP),
    ]


def _deepfill_v1_options(states: dict[str, State], config: Mapping[str, Any]) -> Options:
    return {
        "width": _width(states["generator"], "coarse_generator.conv1.conv.weight", 32),
        "attention_masking": "released",
        "attention_overlap": "released",
    }


# Scores are scaled by 10 here: a commit of the port that scaled them by 2550 is not told apart by its tensors.
DEEPFILL_V1 = Layout(
    source="daa233/generative-inpainting-pytorch",
    licence="MIT",
    parts=(
        Part(
            "generator",
            "gen_*.pt",
            r"coarse_generator\.conv1\.conv\.weight",
            _deepfill_v1_modules,
        ),
    ),
    options=_deepfill_v1_options,
    size=lambda options, config: 256,
    notes=(
        "the port's attention divides patches by sqrt(|p|^2 + 1e-4 n) of their n numbers; here, as in the authors' "
        "code, by max(|p|, 1e-4): the same but for patches of small numbers",
    ),
    left_out=r"dis_conv_module\..*",
)


# -- deepfill_v2 -----------------------------------------------------------------------------------------------


def _deepfill_v2_modules(options: Options) -> list[str]:
    def block(name: str, up: bool = False) -> list[str]:
        return [f"{name}.conv1_upsample.conv" if up else f"{name}.conv1_downsample", f"{name}.conv2"]

    def bottleneck(name: str, *numbers: int) -> list[str]:
        return [f"{name}{n}" for n in numbers]

    def out(stage: str) -> list[str]:
        ups = [*block(f"{stage}.up_block1", up=True), *block(f"{stage}.up_block2", up=True)]
        return [*ups, f"{stage}.conv_to_rgb"]

    def down(name: str) -> list[str]:
        return [f"{name}conv1", *block(f"{name}down_block1"), *block(f"{name}down_block2")]

    modules = [
        *[*down("stage1."), *bottleneck("stage1.conv_bn", 1, 2, 3, 4, 5, 6, 7), *out("stage1")],
        *[*down("stage2.conv_"), *bottleneck("stage2.conv_conv_bn", 1, 2, 3, 4, 5)],
        *[*down("stage2.ca_"), *bottleneck("stage2.ca_conv_bn", 1, 4, 5)],
        *[*bottleneck("stage2.conv_bn", 6, 7), *out("stage2")],
    ]
    return [f"{module}.conv" for module in modules]


def _deepfill_v2_options(states: dict[str, State], config: Mapping[str, Any]) -> Options:
    return {
        "width": _width(states["generator"], "stage1.conv1.conv.weight", 48),
        "attention": "released",
    }


DEEPFILL_V2 = Layout(
    source="nipponjo/deepfillv2-pytorch",
    licence="none given",
    parts=(
        Part(
            "generator",
            "states_pt_*.pth",
            r"stage1\.conv1\.conv\.weight",
            _deepfill_v2_modules,
            # an earlier release names the branches of stage 2 otherwise
            renames=((r"stage2\.b1_", "stage2.conv_"), (r"stage2\.b2_", "stage2.ca_")),
            ignored=r".*\.fuse_weight",
        ),
    ),
    options=_deepfill_v2_options,
    size=lambda options, config: 256,
    notes=(
        "an earlier release of the port (branches b1 and b2) adds 1e-4 to every squared number of a patch that its "
        "attention normalises; here, as in its later release and the authors' code, norms are at least 1e-4",
    ),
    left_out=r"conv1\.conv_sn\..*",
    refused=(
        (
            r"xconv1\.conv\.weight",
            "its networks_tf pads stride-2 layers as TensorFlow does, so that every window lies a pixel further, and "
            "has no attention propagation: another function than deepfill_v2 here",
        ),
        (
            r"refine_conv\.0\.conv2d\.weight",
            "in csqiangwen/DeepFillv2_Pytorch stage 2 sees the mask too: another network than deepfill_v2 here",
        ),
    ),
)


# -- glcic -----------------------------------------------------------------------------------------------------

_DECONVOLUTIONS = (13, 15)
_LAYERS = 17


def _glcic_modules(options: Options) -> list[str]:
    modules = []
    for i in range(1, _LAYERS + 1):
        modules += [f"deconv{i}" if i in _DECONVOLUTIONS else f"conv{i}", f"bn{i}"]
    return modules[:-1]  # no norm behind the last


def _glcic_options(states: dict[str, State], config: Mapping[str, Any]) -> Options:
    width = _width(states["generator"], "conv1.weight", 64)
    return {"width": width, **({"mean_colour": config["mpv"]} if "mpv" in config else {})}


def _fold_norms(state: State, options: Options) -> tuple[State, Options]:
    """From conv-ReLU-BN to conv-BN-ReLU, for known statistics exactly.

    BN is a scale a and a shift b of each channel, and the next layer is linear: its weights take up a, and b times
    them is what a channel of ones would add. A bias cannot stand for that channel: at the border zeros are padded to
    what BN gives, so there is no b there either. So each layer gets one more channel, which is always 1, and as width
    rounds, some that are 0. What remains of our own batch norms is the identity.
    """
    width = (options["width"] * 32 + 0.6) / 32  # one channel more than 32 width, 64 width
    wide = {**options, "width": width}
    with torch.device("meta"):
        shapes = build_model("glcic", **wide).networks["generator"].state_dict()
    folded = {key: torch.zeros(value.shape, dtype=torch.float64) for key, value in shapes.items()}
    scale, shift = torch.ones(4, dtype=torch.float64), None
    for i in range(_LAYERS):
        conv, norm = f"body.{3 * i}", f"body.{3 * i + 1}"
        # [c_out,c_in,k,k]; a transposed convolution's is [c_in,c_out,k,k]
        axes = (1, 0) if i + 1 in _DECONVOLUTIONS else (0, 1)
        weight = state[f"{conv}.weight"].double().movedim(axes, (0, 1))
        target = folded[f"{conv}.weight"].movedim(axes, (0, 1))
        c_out, c_in = weight.shape[:2]
        target[:c_out, :c_in] = weight * scale.view(-1, 1, 1)
        if shift is not None:
            target[:c_out, c_in] = (weight * shift.view(-1, 1, 1)).sum(1)
        folded[f"{conv}.bias"][:c_out] = state[f"{conv}.bias"]
        if i < _LAYERS - 1:
            folded[f"{conv}.bias"][c_out] = 1
            gamma, beta, mean, var = (
                state[f"{norm}.{name}"].double() for name in ("weight", "bias", "running_mean", "running_var")
            )
            scale = gamma / torch.sqrt(var + 1e-5)
            shift = beta - mean * scale
            folded[f"{norm}.running_var"].fill_(1)
            folded[f"{norm}.weight"].fill_((1 + 1e-5) ** 0.5)
    return {key: value.to(shapes[key].dtype) for key, value in folded.items()}, wide


GLCIC = Layout(
    source="otenim/GLCIC-PyTorch",
    licence="MIT",
    parts=(Part("generator", "model_cn_step*", r"deconv13\.weight", _glcic_modules),),
    options=_glcic_options,
    size=lambda options, config: config.get("cn_input_size", 160),
    notes=(
        "the port has batch norm behind the activation, the paper before it: each is folded into the next layer, "
        "which is the same function, with one channel more a layer",
        "what the network sees in the hole is mpv of the port's config.json, given among the files; without it "
        "Places365's mean colour (--set mean_colour=[R,G,B])",
    ),
    left_out=r"(model_ld|model_gd)\..*",
    finish=_fold_norms,
)


# -- context_encoder -------------------------------------------------------------------------------------------


def _context_encoder_modules(options: Options) -> list[str]:
    levels = options["size"].bit_length() - 3  # stride-2 layers, of which the first has no norm
    encoder = [0, *(i for n in range(levels) for i in (3 * n + 2, 3 * n + 3))]
    decoder = [*(i for n in range(levels - 1) for i in (3 * n, 3 * n + 1)), 3 * (levels - 1)]
    return [*(f"main_encode.{i}" for i in encoder), *(f"main_decode.{i}" for i in decoder)]


def _context_encoder_options(states: dict[str, State], config: Mapping[str, Any]) -> Options:
    state = states["generator"]
    convolutions = [key for key, value in state.items() if key.startswith("main_encode") and value.ndim == 4]
    width = _width(state, "main_encode.0.weight", 64)
    bottleneck = _side(state, "main_decode.0.weight") or 4000
    size = 2 ** min(len(convolutions) + 1, 16) if len(convolutions) > 3 else 128
    return {
        "size": size,
        "width": width,
        "bottleneck": max(1, round(bottleneck / width)),
        "overlap": 4,
        "fill": "released",
    }


CONTEXT_ENCODER = Layout(
    source="BoyuanJiang/context_encoder_pytorch",
    licence="MIT",
    parts=(Part("generator", "netG_*.pth", r"main_encode\.0\.weight", _context_encoder_modules),),
    options=_context_encoder_options,
    size=lambda options, config: options["size"],
    notes=(
        "the port blanks all but 4 pixels of the output block, in the released code's colour (--set overlap=7, "
        "--set fill=paper for the paper's)",
    ),
    left_out=r"main\.0\.weight",
)


# -- partial_conv ----------------------------------------------------------------------------------------------


def _partial_conv_modules(options: Options) -> list[str]:
    levels = options["levels"]
    modules = ["enc_1.conv.input_conv"]
    for block in (*(f"enc_{i}" for i in range(2, levels + 1)), *(f"dec_{i}" for i in range(levels, 1, -1))):
        modules += [f"{block}.conv.input_conv", f"{block}.bn"]
    return [*modules, "dec_1.conv.input_conv"]


def _partial_conv_options(states: dict[str, State], config: Mapping[str, Any]) -> Options:
    state = states["generator"]
    return {
        "levels": _count(state, r"enc_\d+\.conv\.input_conv\.weight") or 7,
        "width": _width(state, "enc_1.conv.input_conv.weight", 64),
        "image_range": "imagenet",
    }


def _scale_windows(state: State, options: Options) -> tuple[State, Options]:
    """The port divides by sum(M), the paper multiplies by sum(1)/sum(M): with weights divided by sum(1), which is
    the number of weights of an output channel, both are the same. The bias is added afterwards in both."""
    scaled = {key: w / w[0].numel() if key.endswith("conv.weight") else w for key, w in state.items()}
    return scaled, options


PARTIAL_CONV = Layout(
    source="naoto0804/pytorch-inpainting-with-partial-conv",
    licence="MIT",
    parts=(
        Part(
            "generator",
            "*.pth of its train.py",
            r"enc_1\.conv\.input_conv\.weight",
            _partial_conv_modules,
            ignored=r".*\.mask_conv\.weight",  # ones
        ),
    ),
    options=_partial_conv_options,
    size=lambda options, config: 2 ** (options["levels"] + 1),
    notes=(
        "the port's partial convolution has no sum(1): weights were divided by it, which is the same function",
    ),
    refused=(
        (
            r"enc_1\.conv\.conv2d\.weight",
            "an early release of the port, with biases in all layers: the first layer's has no place in partial_conv",
        ),
    ),
    finish=_scale_windows,
)


LAYOUTS = {
    "context_encoder": CONTEXT_ENCODER,
    "deepfill_v1": DEEPFILL_V1,
    "deepfill_v2": DEEPFILL_V2,
    "edge_connect": EDGE_CONNECT,
    "glcic": GLCIC,
    "partial_conv": PARTIAL_CONV,
}
