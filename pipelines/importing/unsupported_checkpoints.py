"""Well-known checkpoints that no layout supports, recognized by a tensor's name, and why they are not supported.

These are facts about those repositories; none of their code is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.importing.matching import contains_key


@dataclass(frozen=True)
class UnsupportedCheckpoint:
    signature_pattern: str
    """The name of a tensor in its state dicts (a regular expression)."""
    description: str
    reason: str


UNSUPPORTED = (
    UnsupportedCheckpoint(
        r"stage2\.encoder_attention\.enc1\.conv\.conv\.weight",
        "MMagic's DeepFill v2",
        "it pads by reflection, has ELU before the attention, and its second stage sees 5 channels instead of 3",
    ),
    UnsupportedCheckpoint(
        r"stage2\.encoder_attention\.enc1\.conv\.weight",
        "MMagic's DeepFill v1",
        "it pads by reflection and has ELU instead of ReLU before the attention",
    ),
    UnsupportedCheckpoint(
        r"dilation_neck\.dilation_convs\.0\.conv\.weight",
        "MMagic's GLCIC",
        "it has no batch norm, sees images in [-1,1] and clips its output",
    ),
    UnsupportedCheckpoint(
        r"encoder\.enc1\.conv\.weight_mask_updater|decoder\.dec1\.conv\.weight",
        "MMagic's partial convolutions",
        "its first layer has a bias, which ours does not have, and it sees images in [-1,1]",
    ),
    UnsupportedCheckpoint(
        r"encoder\.encoder\.1\.conv\.weight|middle\.0\.block00\.1\.weight",
        "AOT-GAN",
        "this project has no such model",
    ),
    UnsupportedCheckpoint(
        r"model\.\d+\.(conv1\.)?ffc\.convl2l\.weight",
        "LaMa (fast Fourier convolutions)",
        "this project has no such model",
    ),
    UnsupportedCheckpoint(
        r"diffusion_model\.input_blocks\.0\.0\.weight|down_blocks\.0\.resnets\.0\.conv1\.weight",
        "a diffusion model",
        "this project has no such model",
    ),
    UnsupportedCheckpoint(
        r"refine_conv\.0\.conv2d\.weight",
        "csqiangwen/DeepFillv2_Pytorch",
        "its second stage sees the mask too",
    ),
    UnsupportedCheckpoint(
        r"coarse\.0\.conv2d\.weight",
        "zhaoyuzhi/deepfillv2",
        "it sees 4 channels, has kernels of other sizes and gates of their own convolutions",
    ),
    UnsupportedCheckpoint(
        r"xconv1\.conv\.weight",
        "the networks_tf of nipponjo/deepfillv2-pytorch",
        "it pads stride-2 layers as TensorFlow does, which shifts every window by a pixel, and has no attention "
        "propagation",
    ),
    UnsupportedCheckpoint(
        r"enc_1\.conv\.conv2d\.weight",
        "an early release of naoto0804/pytorch-inpainting-with-partial-conv",
        "it has biases in all layers, and our first layer has none",
    ),
    UnsupportedCheckpoint(
        r"layer1\.0\.conv1\.weight|features\.(conv1|0)\.weight",
        "a classifier (ResNet or VGG), as NVIDIA/partialconv's files are",
        "it is not an inpainting model",
    ),
)


def find_unsupported(names: Mapping[str, object] | Sequence[str]) -> UnsupportedCheckpoint | None:
    """The unsupported checkpoint that the normalized names belong to, if any."""
    return next((other for other in UNSUPPORTED if contains_key(names, other.signature_pattern)), None)
