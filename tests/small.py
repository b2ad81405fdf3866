"""Models as small as they get, for tests; a module of its own, so that the processes of other ranks find it too."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models import build_model, model_options
from models.base import Model

SMALL = {
    "size": 32,
    "width": 0.125,
    "residual_blocks": 1,
    "features": "efficientnet_lite0",
    "lambda_p": 0.02,
    "lambda_s": 1.0,
    "levels": 3,
    "lambda_perceptual": 0.02,
    "lambda_style": 0.5,
    "lambda_adv": 0.001,  # deepfill_v2's 1 takes small networks many more steps
}


def build_small(name: str, **options: Any) -> Model:
    """A small model; options that it lacks are left out."""
    known = {field.name for field in dataclasses.fields(model_options(name))}
    return build_model(name, **{key: value for key, value in {**SMALL, **options}.items() if key in known})


@torch.no_grad()
def liven(model: Model, x: Tensor) -> Model:
    """Scale every layer that completes so that on x [B,5,H,W] its output has deviation 0.5: new networks hardly look at
    their input, and any wrong program would be right."""

    def scale(layer: Any, inputs: Any, output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output  # a partial convolution gives its mask too
        deviation = 2 * y.std()
        if parametrize.is_parametrized(layer) or not deviation > 0:
            return None
        layer.weight /= deviation
        if layer.bias is not None:
            layer.bias /= deviation
        return (y / deviation, *output[1:]) if isinstance(output, tuple) else y / deviation

    completion = model._completion().eval()
    layers = [m for m in completion.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    handles = [layer.register_forward_hook(scale) for layer in layers]
    completion(x)
    for handle in handles:
        handle.remove()
    return model


def without_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep torch from writing a trace of whatever it captures, which takes longer than the capturing: it does where
    anybody listens, and pytest listens to every logger that does not propagate."""
    trace = logging.getLogger("torch.__trace")
    monkeypatch.setattr(trace, "propagate", True)
    for handler in [*trace.handlers]:
        trace.removeHandler(handler)
