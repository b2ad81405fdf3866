"""`inpaint evaluate --predictions` and `--export`: pictures that another program fills.

Heavy imports are inside the functions, because --help loads this module.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.evaluation.predictions import FolderPredictions, Photographs
    from pipelines.evaluation.results import EvaluationResult
    from pipelines.recipe import EvaluationConfig


def add_prediction_arguments(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument(
        "--predictions",
        metavar="DIR",
        action="append",
        default=[],
        help="folder of pictures that another program filled, named like the photographs; scored as a method of the "
        "folder's name; repeatable",
    )
    evaluate.add_argument(
        "--export",
        metavar="DIR",
        help="write the photographs (black in the hole) and masks for another program to fill, and score nothing",
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for combinations of options that make no sense."""
    if args.export:
        if args.models or args.predictions or args.out:
            given = "models" if args.models else "--predictions" if args.predictions else "--out"
            raise ValueError(
                f"--export writes the inputs of an evaluation and scores nothing: leave out {given}"
            )
        return
    if not args.models and not args.predictions:
        raise ValueError("name a model to score, or a folder of filled pictures with --predictions")
    if not args.out:
        raise ValueError("--out is missing: a folder for the table, the report and the sample grids")


def export(args: argparse.Namespace) -> None:
    """Write the inputs of an evaluation to the folder `args.export`."""
    from data_prep.uris import quote_for_shell
    from pipelines.check_masks import check_masks
    from pipelines.cli.progress import mask_reading_display
    from pipelines.errors import doing
    from pipelines.evaluation.photographs import load_photographs, resolve_size
    from pipelines.evaluation.predictions import export_inputs
    from pipelines.recipe import EvaluationConfig

    with mask_reading_display() as on_masks:
        check_masks(args.masks, args.hole, on_masks)
    size = resolve_size(args.size, args.masks)
    photos = load_photographs(args.images, size, args.max_photos, args.split)
    config = EvaluationConfig(masks=args.masks, max_photos=None, seed=args.seed, hole=args.hole)
    with doing(f"writing {args.export}"):
        record = export_inputs(photos, config, args.export)
    print(
        f"{args.export}: {len(photos)} photographs of {size} x {size} pixels, masks {', '.join(record['masks'])}"
    )
    for masks in record["masks"]:
        print(f"  {masks}/images/NAME.png (black in the hole) and {masks}/masks/NAME.png (white in the hole)")
    folder = "OUT/NAME.png" if len(record["masks"]) == 1 else "OUT/MASKS/NAME.png"
    print(f"fill them with any program and save the results as {folder}, then:")
    options = f"--images {quote_for_shell(args.images)} --masks {' '.join(map(quote_for_shell, args.masks))}"
    options += f" --size {size} --max-photos {args.max_photos} --seed {args.seed} --split {args.split}"
    print(f"inpaint evaluate --predictions OUT {options} --out scores")


def open_all(
    uris: Sequence[str], photos: Photographs, config: EvaluationConfig, others: Collection[str]
) -> dict[str, FolderPredictions]:
    """{method: pictures} of the folders `uris`. `others` are the names of the other methods. Raises ValueError if two
    methods have one name, and as `open_predictions`."""
    from pipelines.evaluation.evaluate import mask_set_names
    from pipelines.evaluation.predictions import method_name, open_predictions

    opened: dict[str, FolderPredictions] = {}
    for uri in uris:
        name = method_name(uri)
        if name in opened or name in others:
            raise ValueError(f"--predictions {uri}: another method is called {name}; rename the folder")
        opened[name] = open_predictions(uri, [key for key, _ in photos], mask_set_names(config))
    return opened


def print_notes(evaluation: EvaluationResult, predictions: Mapping[str, FolderPredictions]) -> None:
    """Missing, unusable and unmatched files, and changed known pixels, to stderr."""
    from pipelines.evaluation.predictions import describe_predictions

    for method, opened in predictions.items():
        for line in describe_predictions(evaluation, method, opened):
            print(f"  {line}", file=sys.stderr)
