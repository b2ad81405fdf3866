"""Digests that compare the numbers of the released code with those of today's. Imports only torch and NumPy, so that both
are digested in the same way."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SMALLEST: dict[str, dict[str, Any]] = {
    "context_encoder": {"size": 64, "width": 0.02, "overlap": 0},
    "context_encoder_region": {"size": 64, "width": 0.02},
    "deepfill_v1": {"size": 64, "width": 0.03125},
    "deepfill_v2": {"width": 0.03125},
    "edge_connect": {"width": 0.03125, "residual_blocks": 1, "lambda_p": 0, "lambda_s": 0},
    "glcic": {"size": 64, "width": 0.03125},
    "partial_conv": {"width": 0.03125, "levels": 3, "lambda_perceptual": 0, "lambda_style": 0},
}
"""Options with which each model trains within seconds and without downloads."""

MASKS: dict[str, dict[str, float]] = {
    "center": {"center": 1},
    "mixed": {"block": 1, "box": 1, "box_and_brush": 1, "brush": 1, "half": 1, "region": 1},
}
EDGES = ("full", "live", "masked")  # sources of edges


def of_array(array: np.ndarray) -> str:
    """sha256 of an array's type, shape and bytes."""
    header = f"{array.dtype} {array.shape} ".encode()
    return hashlib.sha256(header + np.ascontiguousarray(array).tobytes()).hexdigest()


def of_tensors(state: Mapping[str, Tensor]) -> str:
    """sha256 of names and values, in the order of the names."""
    lines = [f"{name} {of_array(state[name].detach().cpu().numpy())}" for name in sorted(state)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def of_names(state: Mapping[str, Tensor]) -> str:
    """sha256 of names and shapes, in the order of the names: both must match for a weight file to load."""
    lines = [f"{name} {tuple(state[name].shape)}" for name in sorted(state)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def of_batch(batch: Mapping[str, Any]) -> str:
    """sha256 of a training batch: photographs, masks, edges, and which samples they are."""
    arrays = [of_array(batch[name]) for name in ("image", "mask", "edge")]
    return hashlib.sha256("\n".join([*arrays, repr(list(batch["keys"]))]).encode()).hexdigest()


def of_machine() -> dict[str, str]:
    """torch's version, and the digest of two training steps of a network that is not from this project. Processors differ
    in the last bits; on machines with different digests, computed numbers cannot be compared bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        layers = (nn.Conv2d(3, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ELU(), nn.Conv2d(16, 24, 3, dilation=2))
        network = nn.Sequential(*layers, nn.ConvTranspose2d(24, 3, 4, 2), nn.Flatten(), nn.Linear(10092, 5))
        x = torch.rand(4, 3, 64, 64)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return {"torch": torch.__version__, "probe": of_tensors(network.state_dict())}
