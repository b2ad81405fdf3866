"""The commands `inpaint evaluate` and `import`.

Heavy imports are inside the functions, because --help loads this module.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.cli import predictions
from pipelines.cli.arguments import (
    HOLE_HELP,
    MODEL_HELP,
    AddCommand,
    integer,
    number,
    positive_int,
    registry_address,
    seed_int,
)
from pipelines.cli.features_option import add_features_argument, feature_weights
from pipelines.cli.predictions import add_prediction_arguments

if TYPE_CHECKING:
    from pipelines.evaluation.results import EvaluationResult
    from pipelines.recipe import FeatureWeights


def add_evaluate(add: AddCommand) -> None:
    evaluate = add(
        "evaluate",
        "score models, the classical baselines and pictures of other programs on photographs",
        "evaluate edge_connect@champion --images photos --masks center --out scores",
    )
    evaluate.add_argument("models", metavar="MODEL", nargs="*", help=MODEL_HELP)
    evaluate.add_argument(
        "--images", metavar="DIR", required=True, help="photo folder, shard folder or bundled"
    )
    evaluate.add_argument(
        "--masks",
        metavar="DIR_OR_KIND",
        nargs="+",
        required=True,
        help="mask folders, frozen sets (.tar), or kinds: center, box ...",
    )
    evaluate.add_argument("--hole", metavar="VALUE", action="append", help=HOLE_HELP)
    evaluate.add_argument(
        "--out", metavar="DIR", help="folder for the table, the report and the sample grids (needed to score)"
    )
    evaluate.add_argument(
        "--size",
        type=integer(32),
        help="side in pixels of the square crops (default: that of a frozen mask set, else the models' training size)",
    )
    evaluate.add_argument(
        "--max-photos", type=positive_int, default=200, help="maximum number of photographs (%(default)s)"
    )
    evaluate.add_argument("--seed", type=seed_int, default=0, help="seed of the masks (%(default)s)")
    evaluate.add_argument(
        "--split",
        choices=("train", "val", "test"),
        default="test",
        help="split of a shard folder (%(default)s)",
    )
    add_features_argument(evaluate)
    evaluate.add_argument(
        "--grid-rows", type=positive_int, default=6, help="rows of the sample grid (%(default)s)"
    )
    add_prediction_arguments(evaluate)
    evaluate.add_argument("--no-baselines", action="store_true", help="do not score the classical methods")
    evaluate.add_argument("--tracking-uri", help="MLflow tracking URI")
    evaluate.set_defaults(run="pipelines.cli.evaluate:evaluate_command")


def add_import(add: AddCommand) -> None:
    import_parser = add(
        "import",
        "register a checkpoint of a public implementation",
        "import edge_connect EdgeModel_gen.pth InpaintingModel_gen.pth --register-as edge_connect_places2",
    )
    import_parser.add_argument(
        "layout",
        metavar="MODEL",
        help="model name, such as edge_connect (an unknown name lists the importable ones)",
    )
    import_parser.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="state dicts saved by torch.save or safetensors, or folders of them",
    )
    import_parser.add_argument("--register-as", help="name in the registry (default: the model's)")
    import_parser.add_argument(
        "--sigma",
        type=number(0),
        default=2.0,
        help="sigma of Canny in pixels, for models that take edges (%(default)s)",
    )
    import_parser.add_argument(
        "--size",
        type=positive_int,
        help="side in pixels of its training crops (default: the implementation's)",
    )
    import_parser.add_argument(
        "--set",
        metavar="OPTION=VALUE",
        action="append",
        default=[],
        help="model option that cannot be derived from the file; repeatable",
    )
    import_parser.add_argument("--tracking-uri", help="MLflow tracking URI")
    import_parser.set_defaults(run="pipelines.cli.evaluate:import_command")


def evaluate_command(args: argparse.Namespace) -> int:
    from pipelines.path_checks import check_photo_source, check_writable_folder

    predictions.check_arguments(args)
    if args.out:
        check_writable_folder(args.out, "--out")
    check_photo_source(args.images, "--images")
    features = feature_weights(args.features)
    if args.export:
        predictions.export(args)
        return 0

    score_models(
        args.models,
        images=args.images,
        masks=args.masks,
        tracking_uri=registry_address(args),
        size=args.size,
        max_photos=args.max_photos,
        seed=args.seed,
        split=args.split,
        with_baselines=not args.no_baselines,
        grid_rows=args.grid_rows,
        out=Path(args.out),
        hole=args.hole,
        predictions_of=args.predictions,
        features=features,
    )
    return 0


def score_models(
    uris: Sequence[str],
    *,
    images: str,
    masks: Sequence[str],
    tracking_uri: str,
    size: int | None = None,
    max_photos: int = 200,
    seed: int = 0,
    split: str = "test",
    with_baselines: bool = True,
    grid_rows: int = 6,
    out: Path | None = None,
    hole: Sequence[str] | None = None,
    predictions_of: Sequence[str] = (),
    features: FeatureWeights | None = None,
) -> EvaluationResult:
    """Score models, the pictures of the folders `predictions_of`, and with `with_baselines` the classical methods; print
    the table.

    With `out`, also write table.md, report.html and the sample grids. Photographs are cropped to squares of `size`
    pixels (None: that of a frozen mask set, else the largest training size of the models); of a shard folder, `split`
    is read. `hole`: the values of the hole in mask folders, which are checked before anything else. `features`: weights
    for LPIPS, FID and so on, which are checked too. Unreadable photographs are listed and skipped.
    ValueError in one line: no such model, no photographs.
    """
    from pipelines import registry
    from pipelines.check_masks import check_masks
    from pipelines.cli.progress import mask_reading_display, scoring_display
    from pipelines.errors import doing
    from pipelines.evaluation.evaluate import evaluate as run_evaluation
    from pipelines.evaluation.feature_scores import make_scorer
    from pipelines.evaluation.methods import InpaintingMethod, baseline_methods
    from pipelines.evaluation.photographs import load_photographs, resolve_size
    from pipelines.evaluation.tables import table_markdown, table_text
    from pipelines.evaluation.verdict import verdict
    from pipelines.plots.images import encode_png, sample_grid
    from pipelines.recipe import EvaluationConfig
    from pipelines.registry.loaded_model import LoadedModelMethod, largest_training_size
    from pipelines.report_files import format_date
    from pipelines.run_report import ReportData, write_report

    with mask_reading_display() as on_masks:
        check_masks(masks, hole, on_masks)
    if scorer := make_scorer(features):
        with doing("reading --features"):
            scorer.check()
    methods: dict[str, InpaintingMethod] = baseline_methods() if with_baselines else {}
    models = {}
    for uri in uris:
        with doing(f"loading {uri}"):
            models[uri.removeprefix("models:/")] = registry.load_model(uri, tracking_uri=tracking_uri)
    size = resolve_size(size, masks, largest_training_size(models.values()) if models else None)
    methods |= {key: LoadedModelMethod(model) for key, model in models.items()}
    photos = load_photographs(images, size, max_photos, split)
    config = EvaluationConfig(
        masks=masks, max_photos=None, seed=seed, grid_rows=grid_rows, hole=hole, features=features
    )
    opened = predictions.open_all(predictions_of, photos, config, methods)
    methods |= opened
    with scoring_display() as on_progress:
        evaluation = run_evaluation(methods, photos, config, progress=on_progress)
    print(table_text(evaluation))
    predictions.print_notes(evaluation, opened)
    scored = [*models, *opened]
    verdicts = [verdict(evaluation, key, config.metric).sentence() for key in scored if with_baselines]
    if verdicts:
        print("", *verdicts, sep="\n")
    if out:
        out.mkdir(parents=True, exist_ok=True)
        evaluation.save(lambda key, data: _write_file(out / key, data))
        (out / "table.md").write_text(table_markdown(evaluation), encoding="utf-8")
        for grid in evaluation.sample_grids():
            (out / f"{grid.title}.png".replace(" ", "-")).write_bytes(encode_png(sample_grid(grid)))
        date = format_date(datetime.now(UTC))
        facts = {"date": date, "source": images, "photographs": str(len(evaluation.photos))}
        data = ReportData("Evaluation", summary=verdicts, facts=facts, evaluation=evaluation)
        print(f"report: {write_report(out / 'report.html', data)}")
    return evaluation


def _write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def import_command(args: argparse.Namespace) -> int:
    from data_prep.uris import quote_for_shell
    from pipelines.errors import doing
    from pipelines.names import check_model_name

    name = args.register_as or args.layout
    if args.register_as:
        check_model_name(name)  # fail before torch is imported and the files are read
    from pipelines.importing.import_checkpoint import import_checkpoint, parse_settings, register_import
    from pipelines.tracking.runs import resolve_tracking

    with doing(f"importing {', '.join(args.files)}"):
        imported = import_checkpoint(args.layout, args.files, parse_settings(args.set), args.size)
    target = resolve_tracking(args.tracking_uri, "inpaint", "runs")
    with doing(f"registering {name}"):
        version = register_import(imported, target, name, args.sigma)
    option_values = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in imported.options.items()}
    layout, options = imported.layout, ", ".join(f"{key} {value}" for key, value in option_values.items())
    files = ", ".join(file for file, _ in imported.files)
    print(f"{name} version {version}, candidate: {files} of {layout.source} ({options})")
    for note in (*imported.notes, f"that repository's licence: {layout.license_name}"):
        print(f"  note: {note}")
    tracking = f" --tracking-uri {quote_for_shell(target.uri)}" if args.tracking_uri else ""
    print(f"next: inpaint fill models:/{name}/{version} photo.jpg mask.png --out filled.png{tracking}")
    return 0
