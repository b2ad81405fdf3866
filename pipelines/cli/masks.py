"""The commands `inpaint masks ...`.

Heavy imports are inside the functions, because --help loads this module.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.cli.arguments import HOLE_HELP, AddCommand, integer, non_negative_int, positive_int, seed_int

MAX_BAR_CHARS = 40  # characters of the longest bar
DEFAULT_SIZE, DEFAULT_COUNT = 256, 1000
MASKS_HELP = (
    "kinds (center, box ...), mask folders or frozen sets (.tar); brush.max_width=20 sets an option of a kind"
)


def add_masks(add: AddCommand) -> None:
    masks = add(
        "masks",
        "show how much of the image masks cover, and freeze masks for evaluations",
        "masks show brush",
    )
    masks.set_defaults(run="pipelines.cli.masks:masks_command")
    actions = masks.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = add(
        "show",
        "print and plot the hole area of masks",
        "masks show brush=2 block=1 --out masks.png",
        actions,
    )
    freeze = add(
        "freeze",
        "write masks to a tar, so that every evaluation uses the same ones to the bit",
        "masks freeze lama_thick --count 1000 --size 256 --seed 0 --out thick.tar",
        actions,
    )
    for action in (show, freeze):
        action.add_argument("masks", metavar="KIND[=WEIGHT]", nargs="+", help=MASKS_HELP)
        action.add_argument("--hole", metavar="VALUE", action="append", help=HOLE_HELP)
    show.add_argument(
        "--size", type=integer(8), help=f"side in pixels ({DEFAULT_SIZE}; of a frozen set, its masks')"
    )
    show.add_argument("--count", type=positive_int, help=f"masks ({DEFAULT_COUNT}; of a frozen set, all)")
    show.add_argument("--seed", type=non_negative_int, default=0, help="(%(default)s)")
    show.add_argument("--out", metavar="FILE", default="masks.png", help="(%(default)s)")
    show.add_argument("--json", action="store_true", help="print JSON")
    freeze.add_argument(
        "--count", type=positive_int, required=True, help="masks: at least as many as photographs are scored"
    )
    freeze.add_argument("--size", type=integer(8), required=True, help="side in pixels")
    freeze.add_argument("--seed", type=seed_int, default=0, help="(%(default)s)")
    freeze.add_argument(
        "--out",
        metavar="SET.tar",
        required=True,
        help="a file, or s3://bucket/name.tar; never replaces another set",
    )
    freeze.add_argument("--json", action="store_true", help="print the manifest as JSON")


def masks_command(args: argparse.Namespace) -> int:
    return _show(args) if args.action == "show" else _freeze(args)


def _show(args: argparse.Namespace) -> int:
    from pipelines.cli.data import write_file
    from pipelines.data.inspect import hole_area_stats, plot_hole_areas
    from pipelines.path_checks import check_writable_file

    check_writable_file(args.out, "--out", create_parents=True)
    size, count = args.size or DEFAULT_SIZE, args.count or DEFAULT_COUNT
    if frozen := _only_frozen_set(args.masks):
        size, count = args.size or frozen.size, args.count or frozen.count
    areas = hole_area_stats(parse_mask_spec(args.masks, args.hole), size, count, args.seed)
    write_file(args.out, plot_hole_areas(areas))
    if args.json:
        statistics = {key: value for key, value in areas.items() if key not in ("areas", "examples")}
        print(json.dumps({**statistics, "picture": args.out}, indent=1))
    else:
        print("\n".join(_format_areas(areas)))
        print(f"picture: {args.out}")
    return 0


def _freeze(args: argparse.Namespace) -> int:
    from data_prep.frozen_masks import freeze_masks
    from data_prep.masks import open_masks
    from data_prep.records import to_json
    from data_prep.uris import quote_for_shell
    from pipelines.errors import doing

    spec = parse_mask_spec(args.masks, args.hole)
    source = open_masks(spec)
    with doing(f"writing {args.out}"):
        manifest, written = freeze_masks(source, spec, args.count, args.size, args.seed, args.out)
    if args.json:
        print(json.dumps(to_json(manifest)))
        return 0
    bands = ", ".join(f"{count} of {band} %" for band, count in manifest.bands.items())
    print(
        f"{source.describe()}: {manifest.count} masks of {manifest.size} x {manifest.size} pixels, seed {manifest.seed}"
    )
    print(f"hole area: {bands}")
    print(f"digest: {manifest.digest}")
    print(f"{args.out}: {'written' if written else 'already this set, unchanged'}")
    print(f"next: inpaint evaluate MODEL --images PHOTOS --masks {quote_for_shell(args.out)} --out scores")
    return 0


def _only_frozen_set(masks: Sequence[str]) -> Any:
    """The manifest of the frozen set, if that is the only argument."""
    from data_prep.frozen_masks import is_frozen_set, load_frozen_set

    return load_frozen_set(masks[0]).manifest if len(masks) == 1 and is_frozen_set(masks[0]) else None


def parse_mask_spec(arguments: Sequence[str], hole: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Parse ["brush=2", "brush.max_width=20", "photos/masks"] into the argument of `open_masks`.

    `hole` becomes an option of each folder. ValueError: a weight is not a number, or `hole` without a folder.
    """
    import yaml

    from data_prep.masks import MASK_KINDS, is_mask_folder, make_mask_specs
    from pipelines.recipe.load import read_yaml

    spec: dict[str, dict[str, Any]] = {}
    for argument in arguments:
        name, equals, value = (argument, "", "") if Path(argument).is_dir() else argument.rpartition("=")
        kind, dot, option = name.partition(".")
        if not equals:
            spec.setdefault(argument, {})
        elif dot and kind in MASK_KINDS:
            try:
                spec.setdefault(kind, {})[option] = read_yaml(value)
            except yaml.YAMLError:
                raise ValueError(f"{argument}: {value!r} is not a YAML value") from None
        else:
            try:
                spec.setdefault(name, {})["weight"] = float(value)
            except ValueError:
                raise ValueError(f"{argument}: a weight must follow =, as in brush=2") from None
    if hole is not None:
        make_mask_specs(list(spec), hole)
        for name in filter(is_mask_folder, spec):
            spec[name]["hole"] = list(hole)
    return spec


def _format_areas(statistics: Mapping[str, Any]) -> list[str]:
    quantiles = ", ".join(f"{100 * float(q):g} %: {area:.1%}" for q, area in statistics["quantiles"].items())
    max_fraction = max(statistics["bands"].values())
    bars = [
        f"{band:>7} % {fraction:6.1%} {'█' * round(MAX_BAR_CHARS * fraction / max_fraction)}"
        for band, fraction in statistics["bands"].items()
    ]
    summary = f"{statistics['masks']}: the hole is {statistics['mean']:.1%} of the image on average"
    return [summary, quantiles, *bars]
