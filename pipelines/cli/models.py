"""The commands `inpaint models ...`. Heavy imports are inside the functions, because --help loads this module."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.uris import redact_uri
from pipelines.cli.arguments import HOLE_HELP, MODEL_HELP, AddCommand, positive_int, seed_int
from pipelines.cli.features_option import add_features_argument, feature_weights

VERSION_METAVAR = "NAME[@ALIAS|/VERSION]"
PHOTOS_HELP = "photo folder, shard folder or bundled"
MASKS_HELP = "mask folders, or kinds: center, box ..."


def add_models(add: AddCommand) -> None:
    """Add the command `models` and its actions."""
    models = add("models", "inspect, compare, promote, roll back and export registered models", "models list")
    models.set_defaults(run="pipelines.cli.models:models_command")
    actions = models.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, text: str, example: str) -> argparse.ArgumentParser:
        command = add(name, text, f"models {name} {example}".rstrip(), actions)
        command.add_argument("--json", action="store_true", help="print JSON")
        command.add_argument("--tracking-uri", help="MLflow tracking URI")
        return command

    action("list", "list the registered models", "")
    show = action("show", "show a model's versions, or the details of one version", "edge_connect@champion")
    show.add_argument("model", metavar=VERSION_METAVAR)
    show.add_argument(
        "--card", action="store_true", help="print the model card, MLflow's description, in Markdown"
    )

    best = action(
        "best", "rank the versions of a model by a score", "edge_connect --metric psnr --band 20-30"
    )
    best.add_argument("model", metavar="NAME")
    best.add_argument(
        "--metric",
        default="psnr",
        help="psnr, ssim, l1, l2, fd, kd, lpips, fid, or a full name (%(default)s)",
    )
    best.add_argument(
        "--band", metavar="LO-HI", help="band of hole area in percent, such as 20-30 (default: all)"
    )
    best.add_argument("--masks", metavar="KIND", help="kind of masks, if versions were scored with several")

    compare = action(
        "compare",
        "compare two versions on the same photographs and masks: paired differences with intervals",
        "edge_connect@champion edge_connect@candidate --images photos --masks center --out compared.png",
    )
    compare.add_argument("model", metavar="A", help=MODEL_HELP)
    compare.add_argument("other", metavar="B", help=MODEL_HELP)
    compare.add_argument("--images", metavar="DIR", default="bundled", help=f"{PHOTOS_HELP} (%(default)s)")
    compare.add_argument(
        "--masks", metavar="DIR_OR_KIND", nargs="+", default=["center"], help=f"{MASKS_HELP} (center)"
    )
    compare.add_argument("--hole", metavar="VALUE", action="append", help=HOLE_HELP)
    compare.add_argument(
        "--max-photos", type=positive_int, default=100, help="maximum number of photographs (%(default)s)"
    )
    compare.add_argument("--seed", type=seed_int, default=0, help="seed of the masks (%(default)s)")
    compare.add_argument(
        "--size",
        type=positive_int,
        help="side in pixels of the square crops (default: the models' training size)",
    )
    add_features_argument(compare)
    compare.add_argument("--grid-rows", type=positive_int, default=6, help="rows of the image (%(default)s)")
    compare.add_argument("--out", metavar="FILE", help="image of A and B side by side (PNG)")

    promote = action(
        "promote",
        "set an alias; `champion` only if the version scores at least as well as the current champion",
        "edge_connect/2 --alias champion",
    )
    promote.add_argument("model", metavar="NAME/VERSION|NAME@ALIAS")
    promote.add_argument("--alias", default="champion", help="(%(default)s)")
    promote.add_argument("--reason", default="", help="recorded in the history")
    promote.add_argument("--force", action="store_true", help="even if it is worse or cannot be compared")
    promote.add_argument(
        "--images",
        metavar="DIR",
        help=f"{PHOTOS_HELP} (default: the photographs that the version was scored on)",
    )
    promote.add_argument(
        "--masks", metavar="DIR_OR_KIND", nargs="+", default=[], help=f"{MASKS_HELP} (default: the version's)"
    )
    promote.add_argument("--hole", metavar="VALUE", action="append", help=HOLE_HELP)

    rollback = action("rollback", "move an alias back to its previous version", "edge_connect")
    rollback.add_argument("model", metavar="NAME")
    rollback.add_argument("--alias", default="champion", help="(%(default)s)")
    rollback.add_argument("--reason", default="by hand", help="recorded in the history (%(default)s)")

    history = action("history", "show all alias changes: when, who and why", "edge_connect")
    history.add_argument("model", metavar="NAME")

    export = action("export", "write a version to a file", "edge_connect@champion --onnx --out model.onnx")
    export.add_argument("model", metavar=VERSION_METAVAR)
    form = export.add_mutually_exclusive_group(required=True)
    form.add_argument("--onnx", dest="form", action="store_const", const="onnx", help="for any ONNX runtime")
    form.add_argument("--pt2", dest="form", action="store_const", const="pt2", help="for torch.export.load")
    form.add_argument(
        "--safetensors",
        dest="form",
        action="store_const",
        const="safetensors",
        help="weights, plus a JSON file of metadata",
    )
    export.add_argument("--out", metavar="FILE", required=True, help="output file")
    export.add_argument(
        "--size", type=positive_int, help="fixed input side of the ONNX model in pixels (default: any size)"
    )

    action(
        "adopt",
        "make the registry of a copied storage use the files in the copy instead of the original's",
        "--tracking-uri sqlite:////copy/mlflow.db",
    )

    delete = action("delete", "delete a version that has no alias", "edge_connect/2 --yes")
    delete.add_argument("model", metavar="NAME/VERSION")
    delete.add_argument("--yes", action="store_true", help="do not ask for confirmation")


def models_command(args: argparse.Namespace) -> int:
    """Run the action and print its result."""
    from pipelines.tracking.runs import resolve_tracking

    result, text = ACTIONS[args.action](args, resolve_tracking(args.tracking_uri, "inpaint", "runs").uri)
    print(json.dumps(result, indent=1, default=str) if args.json else text)
    sys.stdout.flush()
    return 0


Answer = tuple[Any, str]
"""(value that --json prints, text for a terminal)."""


def _list(args: argparse.Namespace, uri: str) -> Answer:
    from pipelines import registry
    from pipelines.cli.text import format_table

    rows = registry.list_models(uri)
    lines = format_table([{key: value or "" for key, value in row.items()} for row in rows])
    return rows, "\n".join(
        lines
    ) or f"no models are registered at {redact_uri(uri)}; `inpaint run demo` registers two"


def _show(args: argparse.Namespace, uri: str) -> Answer:
    from pipelines import registry
    from pipelines.cli import text as model_text

    details = registry.show(args.model, uri)
    if args.card:
        from pipelines.tracking.markdown import without_spaces

        card = without_spaces(details.card)
        return {"card": card}, card or f"{args.model} has no description in MLflow"
    return details.as_json(), model_text.format_details(details)


def _best(args: argparse.Namespace, uri: str) -> Answer:
    from pipelines import registry
    from pipelines.cli import text as model_text

    ranking = registry.best(
        args.model.removeprefix("models:/"), args.metric, band=args.band, masks=args.masks, tracking_uri=uri
    )
    return asdict(ranking), model_text.format_ranking(ranking)


def _compare(args: argparse.Namespace, uri: str) -> Answer:
    from pipelines.path_checks import check_photo_source, check_writable_file

    if args.out:
        check_writable_file(args.out, "--out", create_parents=True)
    check_photo_source(args.images, "--images")
    from pipelines.cli.progress import mask_reading_display, scoring_display
    from pipelines.registry.model_comparison import compare_models

    with mask_reading_display(args.json) as on_masks, scoring_display(args.json) as on_progress:
        comparison = compare_models(
            args.model,
            args.other,
            images=args.images,
            masks=args.masks,
            max_photos=args.max_photos,
            seed=args.seed,
            size=args.size,
            grid_rows=args.grid_rows,
            out=Path(args.out) if args.out else None,
            hole=args.hole,
            features=feature_weights(args.features),
            tracking_uri=uri,
            on_masks=on_masks,
            on_progress=on_progress,
        )
    return comparison.as_json(), comparison.text


def _promote(args: argparse.Namespace, uri: str) -> Answer:
    from pipelines.cli.progress import mask_reading_display, scoring_display
    from pipelines.registry.promotion import compare_and_promote

    name, version = _find_version(args.model, uri) if "@" in args.model else _parse_version(args.model)
    with mask_reading_display(args.json) as on_masks, scoring_display(args.json) as on_progress:
        promotion = compare_and_promote(
            name,
            version,
            args.alias,
            images=args.images,
            masks=args.masks,
            hole_values=args.hole,
            force=args.force,
            reason=args.reason,
            tracking_uri=uri,
            on_masks=on_masks,
            on_progress=on_progress,
        )
    before = (
        "already"
        if promotion.previous_version == version
        else f"before: version {promotion.previous_version}"
        if promotion.previous_version
        else ""
    )
    text = f"{name} version {version} is now {args.alias}" + (f" ({before})" if before else "")
    lines = [
        *promotion.notes,
        *(
            [f"{promotion.comparison} of version {promotion.previous_version}"]
            if promotion.comparison
            else []
        ),
        text,
    ]
    result = {"name": name, "version": version, "alias": args.alias, "before": promotion.previous_version}
    compared = promotion.comparison and promotion.comparison.as_json()
    return {**result, "comparison": compared, "notes": promotion.notes}, "\n".join(lines)


def _rollback(args: argparse.Namespace, uri: str) -> Answer:
    from pipelines import registry

    name = args.model.removeprefix("models:/")
    version = registry.rollback(name, args.alias, reason=args.reason, tracking_uri=uri)
    result = {"name": name, "alias": args.alias, "version": version}
    return result, f"{name}: {args.alias} is version {version} again"


def _history(args: argparse.Namespace, uri: str) -> Answer:
    from pipelines import registry
    from pipelines.cli import text as model_text

    name = args.model.removeprefix("models:/")
    moves = registry.history(name, uri)
    rows = [move.as_json() for move in moves]
    rejections = [] if args.json else registry.rejections(name, uri)
    return rows, "\n".join(
        model_text.format_moves(moves, rejections)[1:]
    ) or f"no alias of {name} was ever moved"


def _export(args: argparse.Namespace, uri: str) -> Answer:
    from pipelines.path_checks import check_writable_file

    if args.size is not None and args.form != "onnx":
        raise ValueError(f"--size goes with --onnx: --{args.form} takes any size")
    check_writable_file(args.out, "--out", create_parents=True)
    from pipelines.registry.export import export_version

    exported = export_version(args.model, args.form, Path(args.out), size=args.size, tracking_uri=uri)
    return asdict(exported), (
        f"{exported.name} version {exported.version}: {exported.path}, {exported.bytes / 1e6:.1f} MB, "
        f"within {exported.difference:.1e} of the registered program"
    )


def _delete(args: argparse.Namespace, uri: str) -> Answer:
    from pipelines import registry

    name, version = _parse_version(args.model)
    if not args.yes:
        if not sys.stdin.isatty():
            raise ValueError(f"deleting {name} version {version} needs --yes without a terminal")
        print(f"type {name}/{version} to delete it: ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip() != f"{name}/{version}":
            raise ValueError(f"{name} version {version} was not deleted")
    registry.delete(name, version, uri)
    return {"name": name, "version": version, "deleted": True}, (
        f"{name} version {version} is deleted; its files stay in the MLflow run until that is deleted"
    )


def _adopt(args: argparse.Namespace, uri: str) -> Answer:
    from pipelines.tracking.moved_storage import adopt_copy

    path, count = adopt_copy(uri)
    text = f"{path} uses the files in its own folder"
    return {"database": str(path), "rewritten": count}, (
        f"{text} now: {count} paths rewritten" if count else f"{text} already"
    )


def _find_version(model: str, uri: str) -> tuple[str, str]:
    """(name, version) of NAME@ALIAS."""
    from pipelines.registry.client import find_version, registry_client

    with registry_client(uri) as client:
        version = find_version(client, model)
        return version.name, str(version.version)


def _parse_version(text: str) -> tuple[str, str]:
    """(name, version) of NAME/VERSION, with or without the prefix models:/."""
    name, _, version = text.removeprefix("models:/").partition("/")
    if not version.isdigit():
        raise ValueError(
            f"{text!r} has no version: write NAME/VERSION, for example {name or 'edge_connect'}/2"
        )
    return name, str(int(version))


ACTIONS: dict[str, Callable[[argparse.Namespace, str], Answer]] = {
    "list": _list,
    "show": _show,
    "best": _best,
    "compare": _compare,
    "promote": _promote,
    "rollback": _rollback,
    "history": _history,
    "export": _export,
    "delete": _delete,
    "adopt": _adopt,
}
