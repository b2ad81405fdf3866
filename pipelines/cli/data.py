"""The commands `inpaint shard`, `edges` and `data ...`.

Heavy imports are inside the functions, because --help loads this module.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from pipelines.cli.arguments import (
    HOLE_HELP,
    AddCommand,
    fraction,
    integer,
    non_negative_int,
    number,
    positive_int,
)


def add_shard(add: AddCommand) -> None:
    shard = add("shard", "pack photographs into webdataset tars", "shard ~/photos shards --size 256")
    shard.add_argument(
        "source", metavar="SOURCE", help="a folder, s3://bucket/prefix, a listing (.txt) or bundled"
    )
    shard.add_argument("dest", metavar="DEST", help="a folder or s3://bucket/prefix")
    shard.add_argument(
        "--size", type=positive_int, default=256, help="short side of a training crop in pixels (%(default)s)"
    )
    shard.add_argument(
        "--margin", type=non_negative_int, default=0, help="extra pixels for random crops (%(default)s)"
    )
    shard.add_argument("--crop", choices=("none", "square"), default="none", help="crop shape (%(default)s)")
    shard.add_argument(
        "--format",
        choices=("jpg", "png", "original"),
        default="jpg",
        help="original stores the files unchanged (%(default)s)",
    )
    shard.add_argument("--quality", type=integer(1, 100), default=95, help="JPEG quality (%(default)s)")
    shard.add_argument("--val", type=fraction, default=0.1, help="fraction for validation (%(default)s)")
    shard.add_argument("--test", type=fraction, default=0.1, help="fraction for the test set (%(default)s)")
    shard.add_argument(
        "--root", metavar="DIR", help="folder that a listing's names are relative to (default: the listing's)"
    )
    shard.add_argument(
        "--max-reject-fraction",
        metavar="FRACTION",
        type=fraction,
        default=1.0,
        help="fail if more than this fraction of the files is unreadable (%(default)s)",
    )
    shard.add_argument(
        "--max-shard-mb",
        type=number(0, exclusive=True),
        default=256,
        help="maximum tar size in MB (%(default)s)",
    )
    shard.add_argument(
        "--partition-size",
        type=positive_int,
        default=1000,
        help="photographs per sharding task; each task writes its own tars for each split (%(default)s)",
    )
    shard.set_defaults(run="pipelines.cli.data:shard_command")


def add_edges(add: AddCommand) -> None:
    edges = add("edges", "compute Canny edge tars for shards", "edges shards --sigma 1 2 3")
    edges.add_argument("shards", metavar="SHARDS", help="output of `inpaint shard`")
    edges.add_argument(
        "--sigma", metavar="S", type=number(0, 20), nargs="+", required=True, help="sigma of Canny in pixels"
    )
    edges.set_defaults(run="pipelines.cli.data:edges_command")


def add_data(add: AddCommand) -> None:
    data = add("data", "show, check and repair shards", "data show shards")
    data.set_defaults(run="pipelines.cli.data:data_command")
    actions = data.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = add(
        "show",
        "draw a contact sheet of photographs, masks and edges",
        "data show shards --masks brush --out sheet.png",
        actions,
    )
    show.add_argument("shards", metavar="SHARDS", help="output of `inpaint shard`")
    show.add_argument("--split", choices=("train", "val", "test"), default="train", help="(%(default)s)")
    show.add_argument("--count", type=positive_int, default=24, help="photographs (%(default)s)")
    show.add_argument("--sigma", type=number(0, 20), help="sigma of the edges (default: the first stored)")
    show.add_argument("--masks", metavar="DIR_OR_KIND", default="brush", help="(%(default)s)")
    show.add_argument("--hole", metavar="VALUE", action="append", help=HOLE_HELP)
    show.add_argument("--seed", type=non_negative_int, default=0, help="random seed (%(default)s)")
    show.add_argument("--out", metavar="FILE", default="sheet.png", help="(%(default)s)")
    check = add(
        "check",
        "verify checksums, counts and decodability of shards, and that edges match their photographs",
        "data check shards --repair",
        actions,
    )
    check.add_argument("shards", metavar="SHARDS", help="output of `inpaint shard`")
    check.add_argument(
        "--sigma", metavar="S", type=number(0, 20), nargs="+", default=[], help="Canny sigmas (default: all)"
    )
    check.add_argument("--repair", action="store_true", help="rebuild damaged tars from the source")
    check.add_argument(
        "--root", metavar="DIR", help="folder that a listing's names are relative to (default: the listing's)"
    )
    for command in (show, check):
        command.add_argument("--json", action="store_true", help="print JSON")


def shard_command(args: argparse.Namespace) -> int:
    from data_prep.left_out import left_out_total, printable
    from data_prep.preprocess import ShardOptions
    from data_prep.sources import open_source
    from data_prep.storage import open_storage
    from pipelines.cli.progress import ProgressDisplay, progress_callback
    from pipelines.cli.summary import print_left_out
    from pipelines.cluster.session import ray_session
    from pipelines.data.shard_tasks import shard_photographs
    from pipelines.errors import doing

    options = ShardOptions.from_mapping(vars(args))
    dest = open_storage(args.dest)
    dest.check_writable()
    source = open_source(args.source, options.size, args.root)
    with doing(f"listing the photographs of {source.uri}"):
        next(iter(source.list_photos()), None)  # fail on a bad source before Ray starts
    with ray_session(args.debug, args.command), ProgressDisplay() as display:
        on_progress = progress_callback(display, "shard")
        manifest = shard_photographs(
            args.source, dest, options, args.partition_size, on_progress, args.max_reject_fraction, args.root
        )
        display("shard", "finished", note=_format_splits(manifest.splits))
    for reject in manifest.rejects:
        print(printable(f"  rejected {reject.name}: {reject.reason}"))
    print_left_out(manifest.left_out or {})
    print(
        f"{len(manifest.shards)} shards in {dest.uri}, {len(manifest.rejects)} rejects, "
        f"{len(manifest.duplicates)} duplicates, {left_out_total(manifest.left_out or {})} left out "
        "(manifest.json lists them)"
    )
    return 0


def _format_splits(splits: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {split}" for split, count in splits.items())


def edges_command(args: argparse.Namespace) -> int:
    from data_prep.manifest import load_manifest
    from data_prep.storage import open_storage
    from pipelines.cli.progress import ProgressDisplay, progress_callback
    from pipelines.cluster.session import ray_session
    from pipelines.data.shard_tasks import make_edge_tars

    shards = open_storage(args.shards)
    load_manifest(shards)  # fail on missing or damaged shards before Ray starts
    with ray_session(args.debug, args.command), ProgressDisplay() as display:
        edge_storages = {sigma: shards.subfolder(f"edges/sigma-{sigma:g}") for sigma in args.sigma}
        make_edge_tars(shards, edge_storages, progress_callback(display, "edges"))
        display("edges", "finished", note=", ".join(f"sigma {sigma:g}" for sigma in edge_storages))
    print(f"edge tars in {shards.uri}/edges")
    return 0


def data_command(args: argparse.Namespace) -> int:
    return _show_sheet(args) if args.action == "show" else _check_and_repair(args)


def _show_sheet(args: argparse.Namespace) -> int:
    from data_prep.left_out import left_out_lines
    from data_prep.storage import open_storage
    from pipelines.data.inspect import contact_sheet, summarize_shards
    from pipelines.path_checks import check_writable_file

    check_writable_file(args.out, "--out", create_parents=True)
    shards = open_storage(args.shards)
    summary = summarize_shards(shards)
    sheet = contact_sheet(shards, args.split, args.count, args.sigma, args.masks, args.seed, args.hole)
    write_file(args.out, sheet.png)
    if args.json:
        print(json.dumps({**asdict(summary), "sheet": args.out, "samples": sheet.keys}, indent=1))
        return 0
    splits = ", ".join(f"{count} {split}" for split, count in summary.photographs.items())
    options = summary.options
    sigmas = ", ".join(f"{sigma:g}" for sigma in summary.sigmas) or "none"
    print(f"{splits} photographs of {summary.source}")
    print(
        f"{summary.tars} tars, {summary.bytes / 1e6:.1f} MB: {options.format}, short side "
        f"{options.size} + {options.margin} pixels, crop {options.crop}"
    )
    print(f"{summary.rejects} rejects, {summary.duplicates} duplicates; sigmas stored: {sigmas}")
    for line in left_out_lines(summary.left_out or {}):
        print(f"left out of the source: {line}")
    print(f"{args.out}: {len(sheet.keys)} of {args.split}, {sheet.edges}, masks {args.masks}")
    return 0


def _check_and_repair(args: argparse.Namespace) -> int:
    from data_prep.storage import open_storage
    from pipelines.cli.progress import ProgressDisplay
    from pipelines.cluster.session import ray_session
    from pipelines.data.check import ShardCheck, check_shards, repair

    checker = ShardCheck.load(open_storage(args.shards), args.sigma)
    manifest_findings = checker.check_manifests()
    with ray_session(args.debug, args.command), ProgressDisplay() as display:

        def report(name: str) -> Callable[..., None]:
            return lambda done, total, note="": (
                None if args.json else display(name, "running", done, total, note)
            )

        reasons: list[str] = []
        findings = remaining = manifest_findings + check_shards(checker, report("check"))
        if not args.json:
            # before the repair, which may fail
            print("\n".join(map(str, findings)), end="\n" if findings else "", flush=True)
        if findings and args.repair:
            reasons = repair(checker, findings, report("repair"), args.root)
            second_check = ShardCheck.load(checker.shards, args.sigma)
            remaining = second_check.check_manifests() + check_shards(second_check, report("check again"))
    if args.json:
        result = {
            "findings": [
                {"shard": f.shard, "sample": f.sample, "sigma": f.sigma, "what": f.problem} for f in findings
            ],
            "repaired": len(findings) - len(remaining),
            "left": len(remaining),
            "why": reasons,
        }
        print(json.dumps(result, indent=1))
    else:
        tars = len(checker.manifest.shards) * (1 + len(checker.edge_datasets))
        print(_summarize_check(checker.shards.uri, tars, findings, remaining, args.repair, reasons))
    return 1 if remaining else 0


def _summarize_check(
    uri: str, tars: int, findings: list, remaining: list, repaired: bool, reasons: list[str]
) -> str:
    if not findings:
        return f"{tars} tars in {uri} match their manifests"
    if not repaired:
        return f"{len(findings)} findings in {tars} tars; repair them: inpaint data check {uri} --repair"
    if remaining:
        heading = f"{len(remaining)} of {len(findings)} findings remain:"
        return "\n".join([heading, *map(str, remaining), *reasons])
    return f"all {len(findings)} findings are repaired"


def write_file(path: str, data: bytes) -> None:
    from pipelines.errors import doing

    with doing(f"writing {path}"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(data)
