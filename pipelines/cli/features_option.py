"""The option --features: weights for LPIPS, FID, KID, P-IDS and U-IDS."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.recipe import FeatureWeights


def add_features_argument(command: argparse.ArgumentParser) -> None:
    """Add --features, which `feature_weights` reads."""
    command.add_argument(
        "--features",
        metavar="NETWORK=FILE",
        nargs="+",
        default=[],
        help="weights for LPIPS (alexnet, vgg16) and for FID, KID, P-IDS and U-IDS (inception): a path, s3://... or "
        "https://...#sha256=HEX",
    )


def feature_weights(texts: Sequence[str]) -> FeatureWeights | None:
    """`evaluate.features` from the values of --features; None: none were given. ValueError in one line."""
    if not texts:
        return None
    from pydantic import ValidationError

    from pipelines.recipe import FeatureWeights

    networks = FeatureWeights.model_fields
    files: dict[str, str] = {}
    for text in texts:
        network, mark, file = text.partition("=")
        if not mark or network not in networks or network in files:
            raise ValueError(
                f"--features {text}: give one NETWORK=FILE for each of {', '.join(networks)} that you want, such as "
                "alexnet=alexnet-owt-7be5be79.pth"
            )
        files[network] = file
    try:
        return FeatureWeights.model_validate(files)
    except ValidationError as error:
        first = error.errors()[0]
        problem = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"--features {first['loc'][0]}={files[str(first['loc'][0])]}: {problem}") from None
