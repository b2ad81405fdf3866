"""`inpaint models ...`: the arguments, and what is done with them. Heavy imports are inside, as --help loads this."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

VERSION = "NAME[@ALIAS|/VERSION]"
EITHER = f"{VERSION} (a plain NAME: its champion), or a checkpoint folder"
PHOTOS = "folder of photographs or of shards, or bundled"
MASKS = "folders of masks, or kinds: center, box ..."


def add_models(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The parser of `models`; add(name, text, example, to) makes one command, with --debug."""
    models = add(
        "models", "look models up in the registry, compare, promote, take back, export them", "models list"
    )
    actions = models.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, text: str, example: str) -> argparse.ArgumentParser:
        command = add(name, text, f"models {name} {example}".rstrip(), actions)
        command.add_argument("--json", action="store_true", help="as JSON")
        command.add_argument("--tracking", help="MLflow's address")
        return command

    action("list", "all registered models", "")
    show = action("show", "a model's versions, or all about one version", "edge_connect@champion")
    show.add_argument("model", metavar=VERSION)

    best = action(
        "best", "rank the versions of a model by a score", "edge_connect --metric psnr --band 20-30"
    )
    best.add_argument("model", metavar="NAME")
    best.add_argument(
        "--metric", default="psnr", help="psnr, ssim, l1, l2, fd, kid, or a full name (%(default)s)"
    )
    best.add_argument("--band", metavar="LO-HI", help="of hole area in percent, as 20-30 (default: all)")
    best.add_argument("--masks", metavar="KIND", help="where versions were scored with several kinds")

    compare = action(
        "compare",
        "score two versions on the same photographs and masks, with intervals of the paired differences",
        "edge_connect@champion edge_connect@candidate --images photos --masks center --out compared.png",
    )
    compare.add_argument("model", metavar="A", help=EITHER)
    compare.add_argument("other", metavar="B", help=EITHER)
    compare.add_argument("--images", metavar="DIR", default="bundled", help=f"{PHOTOS} (%(default)s)")
    compare.add_argument(
        "--masks", metavar="DIR_OR_KIND", nargs="+", default=["center"], help=f"{MASKS} (center)"
    )
    compare.add_argument("--count", type=int, default=100, help="photographs at most (%(default)s)")
    compare.add_argument("--seed", type=int, default=0, help="of the masks (%(default)s)")
    compare.add_argument("--size", type=int, help="photographs are cut to this size (default: the models')")
    compare.add_argument("--samples", type=int, default=6, help="rows of the picture (%(default)s)")
    compare.add_argument("--out", metavar="FILE", help="where the picture goes, A and B side by side (PNG)")

    promote = action(
        "promote",
        "give a version an alias; champion only if it is not worse than the present one",
        "edge_connect/2 --alias champion",
    )
    promote.add_argument("model", metavar="NAME/VERSION")
    promote.add_argument("--alias", default="champion", help="(%(default)s)")
    promote.add_argument("--reason", default="", help="kept in the history")
    promote.add_argument("--force", action="store_true", help="although it is worse, or cannot be compared")
    promote.add_argument(
        "--images", metavar="DIR", help=f"{PHOTOS} (default: those that the version was scored on)"
    )
    promote.add_argument(
        "--masks", metavar="DIR_OR_KIND", nargs="+", default=[], help=f"{MASKS} (default: its)"
    )

    rollback = action("rollback", "give the alias back to the version that had it before", "edge_connect")
    rollback.add_argument("model", metavar="NAME")
    rollback.add_argument("--alias", default="champion", help="(%(default)s)")
    rollback.add_argument("--reason", default="by hand", help="kept in the history (%(default)s)")

    history = action("history", "who gave which version which alias, when and why", "edge_connect")
    history.add_argument("model", metavar="NAME")

    export = action("export", "write a version to a file", "edge_connect@champion --onnx --out model.onnx")
    export.add_argument("model", metavar=VERSION)
    form = export.add_mutually_exclusive_group(required=True)
    form.add_argument("--onnx", dest="form", action="store_const", const="onnx", help="for any ONNX runtime")
    form.add_argument("--pt2", dest="form", action="store_const", const="pt2", help="for torch.export.load")
    form.add_argument(
        "--safetensors",
        dest="form",
        action="store_const",
        const="safetensors",
        help="weights, with a JSON beside",
    )
    export.add_argument("--out", metavar="FILE", required=True, help="where it goes")
    export.add_argument("--size", type=int, help="ONNX for photographs of this side only (default: any)")

    delete = action("delete", "remove a version that has no alias from the registry", "edge_connect/2 --yes")
    delete.add_argument("model", metavar="NAME/VERSION")
    delete.add_argument("--yes", action="store_true", help="without asking")


def models(args: argparse.Namespace) -> int:
    """Do it, and print what came of it."""
    from pipelines.tracking import tracking_for

    found, text = ACTIONS[args.action](args, tracking_for(args.tracking, "inpaint", "runs").uri)
    print(json.dumps(found, indent=1, default=str) if args.json else text)
    sys.stdout.flush()
    return 0


Answer = tuple[Any, str]
"""What --json prints, and what a person reads."""


def _list(args: argparse.Namespace, uri: str) -> Answer:
    from pipelines import registry
    from pipelines.cli.model_text import table
    from pipelines.tracking import shown

    rows = registry.list_models(uri)
    lines = table([{key: value or "" for key, value in row.items()} for row in rows])
    return rows, "\n".join(
        lines
    ) or f"no models are registered at {shown(uri)}; `inpaint run demo` registers two"


def _show(args: argparse.Namespace, uri: str) -> Answer:
    from pipelines import registry
    from pipelines.cli import model_text

    name = args.model.removeprefix("models:/")
    found = registry.show(f"models:/{name}" if "@" in name or "/" in name else name, uri)
    return found, model_text.shown(found)


def _best(args: argparse.Namespace, uri: str) -> Answer:
    from pipelines import registry
    from pipelines.cli import model_text

    found = registry.best(args.model, args.metric, band=args.band, masks=args.masks, tracking_uri=uri)
    return found, model_text.ranking(found)


def _compare(args: argparse.Namespace, uri: str) -> Answer:
    from pipelines.evaluation.side_by_side import compare_models

    found = compare_models(
        args.model,
        args.other,
        images=args.images,
        masks=args.masks,
        count=args.count,
        seed=args.seed,
        size=args.size,
        samples=args.samples,
        out=Path(args.out) if args.out else None,
        tracking_uri=uri,
        quiet=args.json,
    )
    return found, found.pop("text")


def _promote(args: argparse.Namespace, uri: str) -> Answer:
    from pipelines.registry.promoting import promote

    name, version = _named(args.model)
    done = promote(
        name,
        version,
        args.alias,
        images=args.images,
        masks=args.masks,
        force=args.force,
        reason=args.reason,
        tracking_uri=uri,
        quiet=args.json,
    )
    before = "already" if done.before == version else f"before: version {done.before}" if done.before else ""
    text = f"{name} version {version} is now {args.alias}" + (f" ({before})" if before else "")
    lines = [*done.notes, *([f"{done.comparison} of version {done.before}"] if done.comparison else []), text]
    found = {"name": name, "version": version, "alias": args.alias, "before": done.before}
    compared = done.comparison and vars(done.comparison)
    return {**found, "comparison": compared, "notes": done.notes}, "\n".join(lines)


def _rollback(args: argparse.Namespace, uri: str) -> Answer:
    from pipelines import registry

    name = args.model.removeprefix("models:/")
    version = registry.rollback(name, args.alias, reason=args.reason, tracking_uri=uri)
    found = {"name": name, "alias": args.alias, "version": version}
    return found, f"{name}: {args.alias} is version {version} again"


def _history(args: argparse.Namespace, uri: str) -> Answer:
    from pipelines import registry
    from pipelines.cli import model_text

    name = args.model.removeprefix("models:/")
    found = registry.history(name, uri)
    return found, "\n".join(model_text.moves(found)[1:]) or f"no alias of {name} was ever moved"


def _export(args: argparse.Namespace, uri: str) -> Answer:
    from pipelines.registry.export_version import export_version
    from pipelines.registry.versions import version_uri

    if args.size is not None and args.form != "onnx":
        raise ValueError(f"--size goes with --onnx: --{args.form} takes any size")
    found = export_version(
        version_uri(args.model), args.form, Path(args.out), size=args.size, tracking_uri=uri
    )
    return found, (
        f"{found['name']} version {found['version']}: {found['path']}, {found['bytes'] / 1e6:.1f} MB, "
        f"within {found['difference']:.1e} of the version's own program"
    )


def _delete(args: argparse.Namespace, uri: str) -> Answer:
    from pipelines import registry

    name, version = _named(args.model)
    if not args.yes:
        if not sys.stdin.isatty():
            raise ValueError(f"deleting {name} version {version} needs --yes where nobody can be asked")
        print(f"type {name}/{version} to delete it: ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip() != f"{name}/{version}":
            raise ValueError(f"{name} version {version} was not deleted")
    registry.delete(name, version, uri)
    return {"name": name, "version": version, "deleted": True}, (
        f"{name} version {version} is deleted; its files stay with its run until that is deleted"
    )


def _named(text: str) -> tuple[str, str]:
    """NAME/VERSION, with or without models:/ before it."""
    name, _, version = text.removeprefix("models:/").partition("/")
    if not version.isdigit():
        raise ValueError(
            f"{text!r} names no version: write NAME/VERSION, for example {name or 'edge_connect'}/2"
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
}
