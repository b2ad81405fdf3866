"""Helpers for tests of importing: an image with a hole, public checkpoints on disk, and comparison of outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.importing.import_checkpoint import ImportedModel, import_checkpoint
from support.public_networks import EdgeConnectGenerator, complete_with_edge_connect, edge_connect

State = dict[str, Tensor]


def scene(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A smooth image [1,3,S,S] and an off-centre hole [1,1,S,S] whose borders are not at multiples of 8."""
    noise = torch.rand(1, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(seed))
    image = F.interpolate(noise, size=(size, size), mode="bicubic").clamp(0, 1)
    mask = torch.zeros(1, 1, size, size)
    mask[:, :, size * 3 // 8 + 1 : size * 5 // 8 + 3, size // 4 : size * 5 // 8 - 2] = 1
    return image, mask


def largest_difference(
    imported: ImportedModel, theirs: Tensor, image: Tensor, mask: Tensor, edge: Tensor | None = None
) -> float:
    """The largest absolute difference between our completion and the reference output `theirs`, both in [0,1].

    Asserts that the reference varies and is not clipped."""
    hole = mask.expand_as(image) > 0
    assert theirs[hole].std() > 0.02, "the reference output is constant"
    assert ((theirs > 0) & (theirs < 1))[hole].float().mean() > 0.5, "the reference output is clipped"
    ours = imported.model.complete(image, mask, edge)
    assert torch.equal(ours[~hole], image[~hole])
    return float((ours - torch.where(hole, theirs, image)).abs().max())


def edge_connect_difference(
    imported: ImportedModel, g1: EdgeConnectGenerator, g2: EdgeConnectGenerator
) -> float:
    """`same` of EdgeConnect at 32 px, with random edges outside the hole."""
    image, mask = scene(32)
    edge = (torch.rand(1, 1, 32, 32) < 0.1).float() * (1 - mask)
    return largest_difference(
        imported, complete_with_edge_connect(g1, g2, image, mask, edge), image, mask, edge
    )


def save_edge_connect(folder: Path, prefix: str = "") -> tuple[EdgeConnectGenerator, EdgeConnectGenerator]:
    g1, g2 = edge_connect()
    for name, net in (("EdgeModel", g1), ("InpaintingModel", g2)):
        state = {prefix + key: value for key, value in net.state_dict().items()}
        torch.save({"iteration": 7, "generator": state}, folder / f"{name}_gen.pth")
        critic = {"conv1.0.weight_orig": torch.zeros(8, 3, 4, 4), "conv1.0.weight_u": torch.zeros(8)}
        torch.save({"discriminator": critic}, folder / f"{name}_dis.pth")
    return g1, g2


def import_error(name: str, *files: Path, **options: Any) -> str:
    """The message of the ValueError, which must be one line."""
    with pytest.raises(ValueError) as error:
        import_checkpoint(name, files, **options)
    assert "\n" not in str(error.value)
    return str(error.value)
