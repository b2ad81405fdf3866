"""Models as small as they get, for tests; a module of its own, so that the processes of other ranks find it too."""

from __future__ import annotations

import dataclasses
from typing import Any

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
