"""The pages about models: all of them, one with its versions, one version, and the comparison of two."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import HTMLResponse, Response
from mlflow.exceptions import MlflowException

from data_prep.masks import MASK_KINDS
from models import paper
from pipelines.plots.svg import curve_svg
from pipelines.registry.client import CANDIDATE, CHAMPION, registry_client
from pipelines.registry.model_card import HISTORY_HEADING
from pipelines.studio.charts import bands_chart, sparkline, versions_chart
from pipelines.studio.markdown import render_markdown
from pipelines.studio.origin import differences, origin_facts
from pipelines.studio.registry_snapshot import (
    REGISTRY_LOCK,
    ModelSummary,
    RegistrySnapshot,
    VersionSummary,
)
from pipelines.studio.score_views import (
    band_panels,
    choose_score,
    compared_scores,
    digits,
    heading,
    score_options,
    score_tables,
    version_points,
)
from pipelines.studio.state import Studio, render, studio_of
from pipelines.studio.version_details import VersionFiles, stored_curves, stored_scores, version_files
from pipelines.tracking.pages import registered_model_page

MAX_PICTURE_BYTES = 8 * 2**20
PNG = b"\x89PNG\r\n\x1a\n"
HIDDEN_CURVES = ("data/samples_sum", "data/bad_samples", "data_wait", "seconds_per_step")
MAX_COMPARED_PHOTOGRAPHS = 200

router = APIRouter()


@router.get("/models")
def models_page(request: Request) -> HTMLResponse:
    snapshot = studio_of(request).registry.get()
    cards = [_model_card(model) for model in snapshot.models]
    address = studio_of(request).settings.tracking_uri
    return _render(request, "models.html", cards=cards, address=address)


def _render(request: Request, template: str, **context: Any) -> HTMLResponse:
    """A page about models; it says so if the registry cannot be read any more."""
    return render(request, template, section="models", stale=studio_of(request).registry.error, **context)


def _model_card(model: ModelSummary) -> dict[str, Any]:
    """What the list shows of a model."""
    choice = choose_score(model, "", "", "all")
    scores = {}
    for alias in (CHAMPION, CANDIDATE):
        version = model.with_alias(alias)
        if version:
            score = version.main_score
            metric = version.main_column.rpartition("/")[2]
            scores[alias] = {
                "version": version,
                "score": None if score is None else f"{score:.{digits(metric)}f}",
                "metric": heading(metric),
            }
    chart = sparkline(choice.title, version_points(model, choice), digits(choice.metric)) if choice else ""
    return {
        "model": model,
        "paper": paper(model.model).partition(". ")[0] or model.model,
        "scores": scores,
        "chart": chart,
        "title": choice.title if choice else "",
    }


@router.get("/models/compare")
def compare_page(request: Request, a: str = "", b: str = "") -> HTMLResponse:
    studio = studio_of(request)
    snapshot = studio.registry.get()
    if not (a or b) and (model := snapshot.model("compare")):
        return _model_page(request, model, "", "", "all")
    first, second = _find_or_none(snapshot, a), _find_or_none(snapshot, b)
    both = first is not None and second is not None and first.id != second.id
    context: dict[str, Any] = {"scores": [], "differences": [], "scored_masks": []}
    if first is not None and second is not None and both:
        files = [version_files(studio.settings.tracking_uri, version) for version in (first, second)]
        context = {
            "scores": compared_scores(first, second),
            "differences": differences(files[0].metadata, files[1].metadata),
            "scored_masks": (files[1].metadata.get("protocol") or {}).get("masks") or [],
        }
    return _render(
        request,
        "model_compare.html",
        a=first,
        b=second,
        both=both,
        a_text=a,
        b_text=b,
        same=first is not None and second is not None and first.id == second.id,
        versions=snapshot.versions,
        mask_kinds=MASK_KINDS,
        max_photographs=MAX_COMPARED_PHOTOGRAPHS,
        **context,
    )


def _find_or_none(snapshot: RegistrySnapshot, version_id: str) -> VersionSummary | None:
    """The version NAME/VERSION or NAME@ALIAS; 404 if it is named and does not exist."""
    if not version_id:
        return None
    version_id = version_id.strip().removeprefix("models:/")
    name, at, alias = version_id.partition("@")
    model = snapshot.model(name) if at else None
    version = model.with_alias(alias) if model else snapshot.find(version_id)
    if version is None:
        raise HTTPException(404, f"there is no version {version_id!r}: choose one from the list")
    return version


@router.get("/models/{name}")
def model_page(
    request: Request, name: str, metric: str = "", masks: str = "", band: str = "all"
) -> HTMLResponse:
    return _model_page(request, find_model(request, name), metric, masks, band)


def _model_page(request: Request, model: ModelSummary, metric: str, masks: str, band: str) -> HTMLResponse:
    settings = studio_of(request).settings
    choice = choose_score(model, metric, masks, band)
    points = version_points(model, choice, settings.tracking_uri, settings.storage_uri) if choice else []
    moments = [(move.when[:19], 0, move) for move in model.moves]
    events = [*moments, *((entry.when[:19], 1, entry) for entry in model.rejections)]
    history = [event[2] for event in sorted(events, key=lambda event: event[:2], reverse=True)]
    description = model.description.partition(f"\n\n{HISTORY_HEADING}")[0]
    return _render(
        request,
        "model.html",
        model=model,
        paper=paper(model.model),
        mlflow_page=registered_model_page(settings.tracking_uri, model.name),
        choice=choice,
        options=score_options(model.versions),
        heading=heading,
        digits=digits(choice.metric) if choice else 2,
        charts=[
            versions_chart(choice.title, points, digits(choice.metric), narrow) for narrow in (False, True)
        ]
        if choice and len(points) > 1
        else [],
        points=points,
        other_protocol={point.version for point in points if not point.comparable},
        intervals={point.version: point for point in points if point.low is not None},
        history=history,
        description=render_markdown(description),
        has_history={move.alias for move in model.moves if move.from_},
    )


@router.get("/models/{name}/{number}")
def version_page(request: Request, name: str, number: str) -> HTMLResponse:
    studio, (model, version) = studio_of(request), find_version(request, name, number)
    files = version_files(studio.settings.tracking_uri, version)
    stored = stored_scores(studio.settings.storage_uri, version, files.metadata)
    champion = model.with_alias(CHAMPION)
    sections = band_panels(version, stored)
    return _render(
        request,
        "model_version.html",
        model=model,
        version=version,
        files=files,
        champion=champion,
        paper=paper(version.model),
        verdict=files.metadata.get("verdict") or "",
        panels=[(masks, [(panel, bands_chart(panel)) for panel in panels]) for masks, panels in sections],
        tables=score_tables(version, stored),
        stored=stored,
        facts=origin_facts(version, files.metadata),
        recipe=files.metadata.get("recipe") or "",
        curves=_curves(studio, version),
        training_run=files.metadata.get("training_run") or "",
        pictures=_pictures(files),
        card=render_markdown(version.description, lambda path: _picture_address(version, files, path)),
        history=[move for move in reversed(model.moves) if version.version in (move.from_, move.to)],
    )


def _curves(studio: Studio, version: VersionSummary) -> list[Any]:
    """Charts of the training's curves, losses after validation; empty if the storage does not have them."""
    curves = stored_curves(studio.settings.storage_uri, version)
    if curves is None:
        return []
    series: dict[str, list[tuple[float, float]]] = {}
    for step, values in curves.points:
        for metric, value in values.items():
            if metric not in HIDDEN_CURVES:
                series.setdefault(metric, []).append((step, value))
    phases = [(float(start), name) for name, start, _ in curves.phases]
    names = sorted(series, key=lambda metric: (not metric.startswith("val/"), metric))
    charts = [(metric, curve_svg(metric, series[metric], phases)) for metric in names]
    return [(metric, chart) for metric, chart in charts if chart]


def _pictures(files: VersionFiles) -> list[tuple[str, int]]:
    """(title, index) of the sample grids; index 0 is the card's picture."""
    return [
        (PurePosixPath(path).stem, index)
        for index, path in enumerate(_picture_paths(files.metadata))
        if index and path
    ]


def _picture_paths(metadata: Mapping[str, Any]) -> list[str]:
    """The run's artifacts that are pictures of the version; '' for an unusable path."""
    paths = [metadata.get("card_picture") or "", *(metadata.get("samples") or ())]
    return [path if isinstance(path, str) and _is_safe_path(path) else "" for path in paths]


def _is_safe_path(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return (
        path.endswith(".png")
        and not path.startswith("/")
        and ".." not in parts
        and not re.search(r"[\\%:\x00-\x1f]", path)
    )


def _picture_address(version: VersionSummary, files: VersionFiles, path: str) -> str:
    paths = _picture_paths(files.metadata)
    return f"/models/{quote(version.id)}/picture/{paths.index(path)}" if path and path in paths else ""


@router.get("/models/{name}/{number}/picture/{index}")
def picture(request: Request, name: str, number: str, index: int) -> Response:
    """A PNG of the version's run: the card's picture (0) or a sample grid."""
    studio, (_, version) = studio_of(request), find_version(request, name, number)
    paths = _picture_paths(version_files(studio.settings.tracking_uri, version).metadata)
    if not (0 <= index < len(paths) and paths[index] and version.run_id):
        raise HTTPException(404, "this version has no such picture")
    data = _read_picture(studio.settings.tracking_uri, version.run_id, paths[index])
    return Response(data, media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})


@lru_cache(maxsize=16)
def _read_picture(tracking_uri: str, run_id: str, path: str) -> bytes:
    with REGISTRY_LOCK, registry_client(tracking_uri) as client, tempfile.TemporaryDirectory() as folder:
        try:
            parent = str(PurePosixPath(path).parent)
            sizes = {
                entry.path: entry.file_size or 0
                for entry in client.list_artifacts(run_id, "" if parent == "." else parent)
                if not entry.is_dir
            }
            if path not in sizes:
                raise HTTPException(404, "the picture is not in MLflow any more")
            if sizes[path] > MAX_PICTURE_BYTES:
                raise HTTPException(
                    404, f"the picture is larger than {MAX_PICTURE_BYTES >> 20} MiB: open it in MLflow"
                )
            data = Path(client.download_artifacts(run_id, path, folder)).read_bytes()
        except (MlflowException, OSError) as error:
            raise HTTPException(404, "the picture cannot be read from MLflow's artifacts") from error
    if not data.startswith(PNG) or len(data) > MAX_PICTURE_BYTES:
        raise HTTPException(404, "the file is not a PNG picture")
    return data


def find_model(request: Request, name: str) -> ModelSummary:
    """The registered model, or 404."""
    snapshot = studio_of(request).registry.get()
    model = snapshot.model(name)
    if model is None:
        known = ", ".join(entry.name for entry in snapshot.models[:10]) or "none yet"
        raise HTTPException(404, f"the registry has no model {name!r}; it has {known}")
    return model


def find_version(request: Request, name: str, number: str) -> tuple[ModelSummary, VersionSummary]:
    """The model and its version, or 404."""
    model = find_model(request, name)
    version = model.version(number)
    if version is None:
        raise HTTPException(404, f"{name} has no version {number!r}")
    return model, version
