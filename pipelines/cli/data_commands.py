"""`inpaint data ...` and `inpaint masks ...`: the arguments, and what is done with them. Heavy imports are inside, as
--help loads this."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

BAR = 40  # characters of the longest bar


def add_data(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The parsers of `data` and `masks`; add(name, text, example, to) makes one command, with --debug."""
    data = add("data", "look at shards, check and repair them", "data show shards")
    actions = data.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = add(
        "show",
        "draw a contact sheet: photographs, masks, edges",
        "data show shards --masks brush --out sheet.png",
        actions,
    )
    show.add_argument("shards", metavar="SHARDS", help="what `inpaint shard` made")
    show.add_argument("--split", choices=("train", "val", "test"), default="train", help="(%(default)s)")
    show.add_argument("--count", type=int, default=24, help="photographs (%(default)s)")
    show.add_argument("--sigma", type=float, help="of the edges (default: the first that is stored)")
    show.add_argument("--masks", metavar="DIR_OR_KIND", default="brush", help="(%(default)s)")
    show.add_argument("--seed", type=int, default=0, help="of what is drawn (%(default)s)")
    show.add_argument("--out", metavar="FILE", default="sheet.png", help="(%(default)s)")
    check = add(
        "check",
        "verify sums, counts, decodability, and that edges and photographs agree",
        "data check shards --repair",
        actions,
    )
    check.add_argument("shards", metavar="SHARDS", help="what `inpaint shard` made")
    check.add_argument(
        "--sigma",
        metavar="S",
        type=float,
        nargs="+",
        default=[],
        help="of the edges that are checked (default: all)",
    )
    check.add_argument("--repair", action="store_true", help="make what is damaged again, from its source")
    check.add_argument(
        "--root", metavar="DIR", help="what a listing's names are relative to (default: its own folder)"
    )
    for command in (show, check):
        command.add_argument("--json", action="store_true", help="as JSON")

    masks = add("masks", "look at masks", "masks show brush")
    actions = masks.add_subparsers(dest="action", metavar="ACTION", required=True)
    areas = add(
        "show",
        "print and plot how much of the image masks cover",
        "masks show brush=2 block=1 --out masks.png",
        actions,
    )
    areas.add_argument(
        "masks",
        metavar="KIND[=SHARE]",
        nargs="+",
        help="kinds (center, box, brush ...) or folders of masks; brush.max_width=20 sets an option of a kind",
    )
    areas.add_argument("--size", type=int, default=256, help="pixels a side (%(default)s)")
    areas.add_argument("--count", type=int, default=1000, help="masks (%(default)s)")
    areas.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    areas.add_argument("--out", metavar="FILE", default="masks.png", help="(%(default)s)")
    areas.add_argument("--json", action="store_true", help="as JSON")


def data(args: argparse.Namespace) -> int:
    return _show(args) if args.action == "show" else _check(args)


def _show(args: argparse.Namespace) -> int:
    from data_prep.storage import open_storage
    from pipelines.data.looking import contact_sheet, facts

    shards = open_storage(args.shards)
    found = facts(shards)
    sheet = contact_sheet(shards, args.split, args.count, args.sigma, args.masks, args.seed)
    _write(args.out, sheet.png)
    if args.json:
        print(json.dumps({**found, "sheet": args.out, "samples": sheet.keys}, indent=1))
        return 0
    splits = ", ".join(f"{count} {split}" for split, count in found["photographs"].items())
    options = found["options"]
    sigmas = ", ".join(f"{sigma:g}" for sigma in found["sigmas"]) or "none"
    print(f"{splits} photographs of {found['source']}")
    print(
        f"{found['tars']} tars, {found['bytes'] / 1e6:.1f} MB: {options['format']}, short side "
        f"{options['size']} + {options['margin']} pixels, crop {options['crop']}"
    )
    print(f"{found['rejects']} rejects, {found['duplicates']} duplicates; sigmas stored: {sigmas}")
    print(f"{args.out}: {len(sheet.keys)} of {args.split}, {sheet.edges}, masks {args.masks}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from data_prep.storage import open_storage
    from pipelines.cli.progress import Show
    from pipelines.cluster.session import ray_session
    from pipelines.data.fanout import check_shards
    from pipelines.data.looking import Check
    from pipelines.data.repairing import repair

    check = Check.of(open_storage(args.shards), args.sigma)
    lists = check.lists()
    with ray_session(args.debug), Show() as show:

        def report(name: str) -> Callable[..., None]:
            return lambda done, total, note="": (
                None if args.json else show(name, "running", done, total, note)
            )

        reasons: list[str] = []
        found = left = lists + check_shards(check, report("check"))
        if not args.json:
            print(
                "\n".join(map(str, found)), end="\n" if found else "", flush=True
            )  # whatever a repair meets
        if found and args.repair:
            reasons = repair(check, found, report("repair"), args.root)
            again = Check.of(check.shards, args.sigma)
            left = again.lists() + check_shards(again, report("check again"))
    if args.json:
        told = [{"shard": f.shard, "sample": f.sample, "sigma": f.sigma, "what": f.what} for f in found]
        print(
            json.dumps(
                {"findings": told, "repaired": len(found) - len(left), "left": len(left), "why": reasons},
                indent=1,
            )
        )
    else:
        print(_verdict(check, found, left, args.repair, reasons))
    return 1 if left else 0


def _verdict(check: Any, found: list, left: list, repaired: bool, reasons: list[str]) -> str:
    tars = len(check.manifest["shards"]) * (1 + len(check.edges))
    if not found:
        return f"{tars} tars in {check.shards.uri} are what their manifests say"
    if not repaired:
        return f"{len(found)} findings in {tars} tars; mend: inpaint data check {check.shards.uri} --repair"
    if left:
        return "\n".join([f"{len(left)} findings are left of {len(found)}:", *map(str, left), *reasons])
    return f"all {len(found)} findings are repaired"


def masks(args: argparse.Namespace) -> int:
    from pipelines.data.looking import hole_areas, mask_picture

    found = hole_areas(mask_spec(args.masks), args.size, args.count, args.seed)
    _write(args.out, mask_picture(found))
    if args.json:
        plain = {key: value for key, value in found.items() if key not in ("areas", "examples")}
        print(json.dumps({**plain, "picture": args.out}, indent=1))
    else:
        print("\n".join(_areas(found)))
        print(f"picture: {args.out}")
    return 0


def mask_spec(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """["brush=2", "brush.max_width=20", "photos/masks"] as `open_masks` takes it. ValueError for what is no share."""
    import yaml

    from data_prep.masks import MASK_KINDS

    spec: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, equals, value = (text, "", "") if Path(text).is_dir() else text.rpartition("=")
        kind, dot, option = name.partition(".")
        if not equals:
            spec.setdefault(text, {})
        elif dot and kind in MASK_KINDS:
            spec.setdefault(kind, {})[option] = yaml.safe_load(value)
        else:
            try:
                spec.setdefault(name, {})["share"] = float(value)
            except ValueError:
                raise ValueError(f"{text}: after = comes a share, as in brush=2") from None
    return spec


def _write(path: str, data: bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(data)


def _areas(found: Mapping[str, Any]) -> list[str]:
    quantiles = ", ".join(f"{100 * float(q):g} %: {area:.1%}" for q, area in found["quantiles"].items())
    most = max(found["bands"].values())
    bars = [
        f"{band:>7} % {share:6.1%} {'█' * round(BAR * share / most)}"
        for band, share in found["bands"].items()
    ]
    return [f"{found['masks']}: the hole is {found['mean']:.1%} of the image in the mean", quantiles, *bars]
