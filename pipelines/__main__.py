"""The command line, installed as `inpaint`: arguments and errors; what the commands do is in cli/."""

from __future__ import annotations

import argparse
import keyword
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from pipelines.cli.data_commands import add_data
from pipelines.cli.model_commands import add_models
from pipelines.cli.service_commands import add_services

MODEL = "models:/NAME@ALIAS, models:/NAME/VERSION or a checkpoint folder"
RECIPE = "name of a shipped recipe, or a YAML file"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Exit status: 0 done, 1 an error said in one line, 2 wrong usage, 130 interrupted."""
    args = parser().parse_args(arguments)
    os.environ.setdefault("WDS_SECURE", "1")  # webdataset: no shell in URLs, no unpickling
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from pipelines.cli import commands

    try:
        name = args.command.replace("-", "_")
        sys.exit(getattr(commands, f"{name}_" if keyword.iskeyword(name) else name)(args))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues where it was", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        if args.debug:
            raise
        print(f"inpaint {args.command}: {one_line(error)}", file=sys.stderr)
        sys.exit(1)


def one_line(error: BaseException) -> str:
    """What the user needs to know; the type's name only where the text alone says too little."""
    # an error of a Ray task has the stack in its text, and what happened as its cause
    while isinstance(getattr(error, "cause", None), BaseException):
        error = error.cause  # type: ignore[attr-defined]
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | RuntimeError | OSError) and text:
        return text
    return f"{type(error).__name__}{': ' + text if text else ''} (--debug shows where)"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="inpaint",
        description="Photographs in, a registered inpainting model out.",
        epilog="example: inpaint run demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, text: str, example: str, to: Any = commands) -> argparse.ArgumentParser:
        command = to.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example: inpaint {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return command

    def add_recipe(name: str, text: str, example: str, optional: str = "") -> argparse.ArgumentParser:
        command = add(name, text, example)
        command.add_argument(
            "recipe", metavar="RECIPE", nargs="?" if optional else None, help=RECIPE + optional
        )
        command.add_argument(
            "--set", metavar="KEY.SUB=VALUE", action="append", default=[], help="override a field; repeatable"
        )
        command.add_argument("--storage", help="folder or s3://bucket/prefix for everything a run keeps")
        command.add_argument("--tracking", help="MLflow's address")
        return command

    add_recipe(
        "run",
        "run the whole chain: shard, edges, train, evaluate, register",
        "run demo --set data.source=photos",
    )
    plan = add_recipe(
        "plan",
        "show which steps a run would take, and why; or what it takes in machines",
        "plan edge_connect --size 8000000",
    )
    plan.add_argument(
        "--size", metavar="PHOTOGRAPHS", type=int, help="estimate shards, storage and GPU hours for so many"
    )
    add_recipe(
        "status",
        "show how far a run is, from its storage alone",
        "status demo --storage s3://bucket/runs",
        optional=", or its name alone; none: all runs of the storage",
    )
    sweep = add_recipe(
        "sweep",
        "try values of loss weights or of sigma, as the recipe's sweep block says, and report which are best",
        "sweep edge_connect-sigma --set data.source=photos",
    )
    sweep.add_argument(
        "--register", action="store_true", help="then train the best recipe in full, evaluate and register it"
    )
    add_recipe("train", "run the chain up to the trained weights", "train demo --set seed=1")

    shard = add("shard", "cut photographs into webdataset tars", "shard ~/photos shards --size 256")
    shard.add_argument(
        "source", metavar="SOURCE", help="a folder, s3://bucket/prefix, a listing (.txt), or bundled"
    )
    shard.add_argument("dest", metavar="DEST", help="a folder or s3://bucket/prefix")
    shard.add_argument(
        "--size", type=int, default=256, help="short side of a training crop in pixels (%(default)s)"
    )
    shard.add_argument("--margin", type=int, default=0, help="extra pixels for random crops (%(default)s)")
    shard.add_argument("--crop", choices=("keep", "square"), default="keep", help="aspect (%(default)s)")
    shard.add_argument(
        "--format",
        choices=("jpg", "png", "original"),
        default="jpg",
        help="original keeps the files' own bytes (%(default)s)",
    )
    shard.add_argument("--quality", type=int, default=95, help="of JPEGs (%(default)s)")
    shard.add_argument("--val", type=float, default=0.1, help="share that validates (%(default)s)")
    shard.add_argument("--test", type=float, default=0.1, help="share that is held out (%(default)s)")
    shard.add_argument(
        "--root", metavar="DIR", help="what a listing's names are relative to (default: its own folder)"
    )
    shard.add_argument(
        "--max-rejects",
        metavar="SHARE",
        type=float,
        default=1.0,
        help="of unreadable files above which it fails (%(default)s)",
    )
    shard.add_argument(
        "--shard-mb", type=float, default=256, help="megabytes of a shard at most (%(default)s)"
    )
    shard.add_argument(
        "--shard-photos", type=int, default=1000, help="photographs a shard is cut from (%(default)s)"
    )

    edges = add("edges", "compute Canny edge tars beside the shards", "edges shards --sigma 1 2 3")
    edges.add_argument("shards", metavar="SHARDS", help="what `inpaint shard` made")
    edges.add_argument(
        "--sigma", metavar="S", type=float, nargs="+", required=True, help="Canny's sigma, in pixels"
    )

    add_data(add)

    evaluate = add(
        "evaluate",
        "score models and the classical baselines on photographs",
        "evaluate models:/edge_connect@champion --images photos --masks center --out scores",
    )
    evaluate.add_argument("models", metavar="MODEL", nargs="+", help=MODEL)
    evaluate.add_argument(
        "--images", metavar="DIR", required=True, help="folder of photographs or of shards, or bundled"
    )
    evaluate.add_argument(
        "--masks",
        metavar="DIR_OR_KIND",
        nargs="+",
        required=True,
        help="folders of masks, or kinds: center, box ...",
    )
    evaluate.add_argument(
        "--out", metavar="DIR", required=True, help="folder for the table, report and pictures"
    )
    evaluate.add_argument("--size", type=int, help="photographs are cut to this size (default: the model's)")
    evaluate.add_argument("--count", type=int, default=200, help="photographs at most (%(default)s)")
    evaluate.add_argument("--seed", type=int, default=0, help="of the masks (%(default)s)")
    evaluate.add_argument(
        "--split",
        choices=("train", "val", "test"),
        default="test",
        help="of a folder of shards (%(default)s)",
    )
    evaluate.add_argument("--samples", type=int, default=6, help="rows of the sample grid (%(default)s)")
    evaluate.add_argument("--no-baselines", action="store_true", help="leave the classical methods out")
    evaluate.add_argument("--tracking", help="MLflow's address")

    fill = add(
        "fill",
        "fill the hole of a photograph",
        "fill models:/edge_connect@champion photo.jpg mask.png --out filled.png",
    )
    fill.add_argument("model", metavar="MODEL", help=MODEL)
    fill.add_argument("image", metavar="IMAGE", help="a photograph of any size and mode")
    fill.add_argument("mask", metavar="MASK", help="a picture of the same size: white = hole")
    fill.add_argument(
        "--out", metavar="FILE", required=True, help="where the filled photograph goes (PNG keeps every bit)"
    )
    fill.add_argument("--edges", metavar="FILE", help="drawn edges inside the hole, white on black")
    fill.add_argument("--invert-mask", action="store_true", help="the mask's black is the hole")
    fill.add_argument(
        "--blend", action="store_true", help="hide the seam at the hole's border (Poisson blending)"
    )
    fill.add_argument("--dilate", metavar="PIXELS", type=int, default=0, help="grow the hole (%(default)s)")
    fill.add_argument(
        "--max-side", metavar="PIXELS", type=int, default=512, help="longest side of a window (%(default)s)"
    )
    fill.add_argument("--tracking", help="MLflow's address")

    bring = add(
        "import",
        "register the checkpoint of a public implementation",
        "import edge_connect EdgeModel_gen.pth InpaintingModel_gen.pth --name edge_connect_places2",
    )
    bring.add_argument(
        "layout",
        metavar="NAME",
        help="the model: context_encoder, deepfill_v1, deepfill_v2, edge_connect, glcic or partial_conv",
    )
    bring.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="state dicts as torch.save or safetensors writes them, or folders that hold them",
    )
    bring.add_argument("--name", dest="register_as", help="in the registry (default: the model's)")
    bring.add_argument(
        "--sigma", type=float, default=2.0, help="Canny's, in pixels, of models that take edges (%(default)s)"
    )
    bring.add_argument(
        "--size", type=int, help="side of its training photographs in pixels (default: the implementation's)"
    )
    bring.add_argument(
        "--set",
        metavar="OPTION=VALUE",
        action="append",
        default=[],
        help="an option of the model that the file does not tell; repeatable",
    )
    bring.add_argument("--tracking", help="MLflow's address")

    add_models(add)
    add_services(add)
    return top


if __name__ == "__main__":
    main()
