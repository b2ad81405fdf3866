"""The command `inpaint fill`, for one photograph or a folder of them.

Heavy imports are inside the functions, because --help loads this module.
"""

from __future__ import annotations

import argparse
import os

from pipelines import notices
from pipelines.cli.arguments import (
    HOLE_HELP,
    MODEL_HELP,
    AddCommand,
    non_negative_int,
    positive_int,
    registry_address,
)

EXAMPLES = """examples:
  one photograph:
    inpaint fill edge_connect@champion photo.jpg mask.png --out filled.png
  a folder, with a mask for photos/a/b.jpg at masks/a/b.png:
    inpaint fill edge_connect@champion photos masks --out filled
  a folder, with one mask for all photographs:
    inpaint fill edge_connect@champion photos watermark.png --out filled --format png"""


def add_fill(add: AddCommand) -> None:
    fill = add("fill", "fill the holes of a photograph, or of a folder of photographs", "")
    fill.epilog = EXAMPLES
    fill.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    fill.add_argument("photo", metavar="PHOTO", help="a photograph of any size and mode, or a folder of them")
    fill.add_argument(
        "mask",
        metavar="MASK",
        help="image of the same size: white = hole, or of two colours the one that is not black; for a folder, "
        "a folder of masks with the photographs' names, or one mask for all",
    )
    fill.add_argument(
        "--out",
        metavar="FILE_OR_FOLDER",
        required=True,
        help="output file (.png and .tif keep known pixels bit-identical); for a folder, the output folder: "
        "the same command resumes there",
    )
    fill.add_argument(
        "--format",
        choices=("png", "tiff", "jpeg"),
        help="format of a folder's files (default: each photograph's own, or PNG where that cannot be written)",
    )
    fill.add_argument(
        "--workers",
        metavar="N",
        type=positive_int,
        help="photographs of a folder to fill at a time, in Ray tasks; 1: in this process "
        "(default: tasks if they save time)",
    )
    fill.add_argument(
        "--edges", metavar="FILE", help="line drawing of edges for the hole, for models that take edges"
    )
    fill.add_argument("--hole", metavar="VALUE", action="append", help=HOLE_HELP)
    fill.add_argument(
        "--frame", metavar="N", type=int, help="frame or page to fill, from 1, if the file has several"
    )
    fill.add_argument("--invert-mask", action="store_true", help="black is the hole")
    fill.add_argument(
        "--blend", action="store_true", help="hide the seam at the border of the hole (Poisson blending)"
    )
    fill.add_argument(
        "--dilate",
        metavar="PIXELS",
        type=non_negative_int,
        default=0,
        help="grow the hole by this many pixels (%(default)s)",
    )
    fill.add_argument(
        "--max-tile-size",
        metavar="PIXELS",
        type=positive_int,
        default=512,
        help="maximum side of a tile as model input (%(default)s)",
    )
    fill.add_argument("--tracking-uri", help="MLflow tracking URI")
    fill.set_defaults(run="pipelines.cli.fill:fill_command")


def fill_command(args: argparse.Namespace) -> int:
    """Fill one photograph or a folder; returns 1 if a photograph of the folder failed."""
    if os.path.isdir(args.photo):
        return _fill_folder(args)
    for option in ("format", "workers"):
        if getattr(args, option) is not None:
            raise ValueError(
                f"--{option} goes with a folder of photographs, and {args.photo} is not a folder"
            )
    if os.path.isdir(args.mask):
        raise ValueError(
            f"{args.mask} is a folder of masks, and {args.photo} is one photograph: name its mask"
        )
    return _fill_photograph(args)


def _fill_photograph(args: argparse.Namespace) -> int:
    from pipelines.errors import doing
    from pipelines.inference.fill import prepare_fill, run_fill

    task = prepare_fill(
        args.photo,
        args.mask,
        args.out,
        invert=True if args.invert_mask else None,
        dilate=args.dilate,
        max_tile_size=args.max_tile_size,
        edges_path=args.edges,
        frame=args.frame,
        hole_values=args.hole,
    )
    notices.announce(f"loading {args.model}")
    from pipelines import registry  # imports torch and MLflow: after all checks that do not need them
    from pipelines.cli.progress import ProgressDisplay

    with doing(f"loading {args.model}"):
        model = registry.load_model(args.model, tracking_uri=registry_address(args))
    with ProgressDisplay() as display:
        result = run_fill(
            model,
            task,
            blend=args.blend,
            progress=lambda done, total: display("fill", "running", done, total, "tiles"),
        )
    print("\n".join(result.report_lines))
    return 0


def _fill_folder(args: argparse.Namespace) -> int:
    from pipelines.errors import doing
    from pipelines.inference.fill_folder import FillOptions, JobRunner, fill_here, fill_plan
    from pipelines.inference.folder_plan import plan_folder

    if args.edges:
        raise ValueError(f"--edges {args.edges} goes with one photograph, and {args.photo} is a folder")
    options = FillOptions(
        invert=True if args.invert_mask else None,
        dilate=args.dilate,
        max_tile_size=args.max_tile_size,
        blend=args.blend,
        frame=args.frame,
        hole_values=tuple(args.hole) if args.hole else None,
    )
    plan = plan_folder(args.photo, args.mask, args.out, args.format)
    notices.announce(f"loading {args.model}")
    from pipelines import registry  # imports torch and MLflow: after all checks that do not need them
    from pipelines.cli.progress import ProgressDisplay

    tracking_uri = registry_address(args)
    with doing(f"loading {args.model}"):
        model = registry.load_model(args.model, tracking_uri=tracking_uri)
    run_jobs: JobRunner = fill_here
    if args.workers != 1:
        from pipelines.inference.fill_tasks import ModelSource, RayFillRunner

        run_jobs = RayFillRunner(ModelSource.of(model, args.model, tracking_uri), args.workers)
    with ProgressDisplay() as display:

        def on_progress(stage: str, done: int, total: int, note: str) -> None:
            is_checked = stage == "check" and done == total
            display(stage, "finished" if is_checked else "running", done, total, note)

        result = fill_plan(
            model,
            plan,
            options,
            run_jobs=run_jobs,
            progress=on_progress,
        )
        display("fill", "finished", note=f"{len(result.filled)} photographs")
    print("\n".join(result.report_lines))
    return 1 if result.failures else 0
