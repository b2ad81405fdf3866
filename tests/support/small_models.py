"""The smallest models, for tests; in a module of their own, so that the processes of other ranks can import them."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models import build_model, model_class
from models.base import Model


def build_small(name: str, **options: Any) -> Model:
    """A model in its smallest configuration; ignores options that it does not have."""
    kind = model_class(name)
    known = {field.name for field in dataclasses.fields(kind.Options)}
    supported = {key: value for key, value in options.items() if key in known}
    return build_model(name, **{**kind.small_config.options, **supported})


@torch.no_grad()
def scale_activations(model: Model, x: Tensor) -> Model:
    """Scale each layer of the completion network so that its output on x [B,5,H,W] has standard deviation 0.5.

    The output of a newly initialized network hardly depends on its input, so that a wrong program would pass a test.
    """

    def scale(layer: Any, inputs: Any, output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output  # a partial convolution also returns its mask
        deviation = 2 * y.std()
        if parametrize.is_parametrized(layer) or not deviation > 0:
            return None
        layer.weight /= deviation
        if layer.bias is not None:
            layer.bias /= deviation
        return (y / deviation, *output[1:]) if isinstance(output, tuple) else y / deviation

    completion = model._build_completion().eval()
    layers = [m for m in completion.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    handles = [layer.register_forward_hook(scale) for layer in layers]
    completion(x)
    for handle in handles:
        handle.remove()
    return model


def disable_torch_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep torch from logging a trace of all that it captures, which takes longer than the capture.

    torch logs if its logger has a handler, and pytest adds one to every logger that does not propagate.
    """
    trace = logging.getLogger("torch.__trace")
    monkeypatch.setattr(trace, "propagate", True)
    for handler in [*trace.handlers]:
        trace.removeHandler(handler)
