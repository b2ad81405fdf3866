"""The JSON API of the Try page: versions, samples, photographs with masks and lines, edges, checks and fills."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import cv2
from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, Response

from data_prep.sources import bundled_names, bundled_photo
from pipelines.inference.preview import check_fill, edges_inside, known_edges, tile_inputs
from pipelines.inference.tiles import DEFAULT_MAX_TILE_SIZE, MIN_TILE_SIZE
from pipelines.studio import photos
from pipelines.studio.fill_jobs import FUNCTION, SUFFIXES
from pipelines.studio.jobs import Job
from pipelines.studio.photo import Photo
from pipelines.studio.photos import add_photo, find_photo
from pipelines.studio.security import Writer, read_json
from pipelines.studio.state import Studio, render, studio_of
from pipelines.studio.uploads import shown_name
from pipelines.studio.versions import details_json, find_summary, summary_json, version_facts

MAX_VERSIONS = 4
MOST_TILE_SIZE = 2048
TileSize = Annotated[int, Query(ge=MIN_TILE_SIZE, le=MOST_TILE_SIZE)]
THUMB_PIXELS = 192  # long side
SAMPLE_TITLES = {
    "astronaut": "Portrait",
    "chelsea": "Cat",
    "china": "Temple",
    "coffee": "Coffee",
    "flower": "Flower",
    "hubble": "Galaxies",
    "motorcycle": "Motorcycle",
    "rocket": "Rocket",
}

router = APIRouter()


@router.get("/")
def try_page(request: Request) -> Response:
    settings = studio_of(request).settings
    return render(
        *(request, "try.html"),
        section="try",
        max_upload_bytes=settings.max_upload_bytes,
        max_pixels=settings.max_pixels,
    )


@router.get("/api/versions")
def list_versions(request: Request) -> list[dict[str, Any]]:
    return [summary_json(summary) for summary in studio_of(request).registry.get().versions]


@router.get("/api/versions/{name}/{version}")
def get_version(request: Request, name: str, version: str) -> dict[str, Any]:
    studio = studio_of(request)
    summary = find_summary(studio, f"{name}/{version}")
    return details_json(summary, version_facts(studio, summary))


@router.get("/api/samples")
def list_samples() -> list[dict[str, str]]:
    return [
        {"id": name, "title": SAMPLE_TITLES.get(name, name), "thumb": f"/api/samples/{name}/thumb"}
        for name in bundled_names()
    ]


@router.get("/api/samples/{name}/thumb")
def sample_thumb(name: str) -> Response:
    return Response(_thumb(_check_sample(name)), media_type="image/jpeg")


@router.post("/api/photos/sample/{name}")
def add_sample(request: Request, session: Writer, name: str) -> dict[str, Any]:
    studio_of(request).fills.prepare()
    pixels = bundled_photo(_check_sample(name))
    data = cv2.imencode(".png", pixels[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
    return add_photo(session, data, f"{name}.png", studio_of(request).settings.max_pixels).as_json()


@router.post("/api/photos")
async def upload_photo(request: Request, session: Writer, frame: int | None = None) -> dict[str, Any]:
    if frame is not None and frame < 1:
        raise HTTPException(400, f"frame {frame}: the first is 1")
    data, max_pixels = await request.body(), studio_of(request).settings.max_pixels
    studio_of(request).fills.prepare()
    photo = await run_in_threadpool(add_photo, session, data, shown_name(request), max_pixels, frame)
    return photo.as_json()


@router.get("/api/photos/{photo_id}")
def get_photo(session: Writer, photo_id: str) -> dict[str, Any]:
    return find_photo(session, photo_id).as_json()


@router.get("/api/photos/{photo_id}/view")
def photo_view(session: Writer, photo_id: str) -> Response:
    return FileResponse(find_photo(session, photo_id).view)


@router.put("/api/photos/{photo_id}/mask")
async def put_mask(request: Request, session: Writer, photo_id: str) -> dict[str, Any]:
    photo, data = find_photo(session, photo_id), await request.body()
    max_pixels = studio_of(request).settings.max_pixels
    hole = await run_in_threadpool(photos.read_painted, data, photo, "the mask", max_pixels)
    return {"hole_percent": await run_in_threadpool(photos.write_mask, photo, hole)}


@router.get("/api/photos/{photo_id}/mask.png")
def get_mask(session: Writer, photo_id: str) -> Response:
    photo = find_photo(session, photo_id)
    if not photo.mask.exists():
        photos.write_mask(photo, photos.read_mask(photo))
    return FileResponse(photo.mask, media_type="image/png", filename=f"{Path(photo.name).stem}-mask.png")


@router.post("/api/photos/{photo_id}/mask-file")
async def upload_mask(request: Request, session: Writer, photo_id: str) -> dict[str, Any]:
    photo, data = find_photo(session, photo_id), await request.body()
    max_pixels = studio_of(request).settings.max_pixels
    hole, notes, warnings = await run_in_threadpool(
        photos.read_mask_file, photo, data, shown_name(request), max_pixels
    )
    percent = await run_in_threadpool(photos.write_mask, photo, hole)
    url = f"/api/photos/{photo.id}/mask.png"
    return {"mask": url, "hole_percent": percent, "notes": notes, "warnings": warnings}


@router.put("/api/photos/{photo_id}/lines")
async def put_lines(request: Request, session: Writer, photo_id: str) -> dict[str, Any]:
    photo, data = find_photo(session, photo_id), await request.body()
    lines = None
    if data:
        max_pixels = studio_of(request).settings.max_pixels
        lines = await run_in_threadpool(photos.read_painted, data, photo, "the drawing", max_pixels)
    await run_in_threadpool(photos.write_lines, photo, lines)
    return {}


@router.get("/api/photos/{photo_id}/edges")
def get_edges(
    request: Request,
    session: Writer,
    photo_id: str,
    version: str,
    inside: bool = False,
    max_tile_size: TileSize = DEFAULT_MAX_TILE_SIZE,
) -> Response:
    studio, photo = studio_of(request), find_photo(session, photo_id)
    facts = version_facts(studio, find_summary(studio, version))
    if not (facts.takes_edges or facts.needs_edges) or facts.sigma is None:
        raise HTTPException(400, f"{version} uses no edges: choose a version of an edge model to see them")
    hole = photos.read_mask(photo)
    rgb = photos.cache.rgb(photo, hole)
    compute = edges_inside if inside else known_edges
    return Response(photos.edges_png(compute(facts, rgb, hole, max_tile_size)), media_type="image/png")


@router.post("/api/photos/{photo_id}/checks")
async def check_photo(request: Request, session: Writer, photo_id: str) -> dict[str, Any]:
    photo, body = find_photo(session, photo_id), await read_json(request)
    return await run_in_threadpool(
        _check_photo, studio_of(request), photo, _version_ids(body), _tile_size(body)
    )


def _check_photo(studio: Studio, photo: Photo, version_ids: list[str], max_tile_size: int) -> dict[str, Any]:
    """`tiles` are those of the first version."""
    hole, tiles, warnings = photos.read_mask(photo), None, []
    for version_id in version_ids:
        facts = version_facts(studio, find_summary(studio, version_id))
        inputs = list(tile_inputs(facts, hole, max_tile_size)) if hole.any() else []
        texts = check_fill(facts, inputs)
        warnings += [{"version": version_id, "text": photos.for_page(text, {})} for text in texts]
        if tiles is None:
            tiles = [
                {
                    "left": item.tile.left,
                    "top": item.tile.top,
                    "width": item.tile.width,
                    "height": item.tile.height,
                    "hole_percent": round(100 * item.fraction, 2),
                }
                for item in inputs
            ]
    percent = round(100 * float(hole.mean()), 2)
    return {"hole_percent": percent, "tiles": tiles or [], "warnings": warnings}


@router.post("/api/fills")
async def start_fill(request: Request, session: Writer) -> dict[str, Any]:
    body = await read_json(request)
    photo, studio = find_photo(session, str(body.get("photo", ""))), studio_of(request)
    return (await run_in_threadpool(_submit_fill, studio, session, photo, body)).as_json()


def _submit_fill(studio: Studio, session: Writer, photo: Photo, body: dict[str, Any]) -> Job:
    version_ids = _version_ids(body)
    summaries = [find_summary(studio, version_id) for version_id in version_ids]
    hole = photos.read_mask(photo)
    if not hole.any():
        raise HTTPException(400, "there is no hole: paint over what is to be filled")
    if hole.all():
        raise HTTPException(400, "the hole covers the whole photograph: leave some of it as it is")
    wanted = body.get("format", "same")
    if wanted not in ("same", "png", "jpeg", "tiff"):
        raise HTTPException(400, f"format {str(wanted)[:20]}: same, png, jpeg or tiff")
    max_tile_size = _tile_size(body)
    folder = photos.new_results_folder(photo)
    arguments = {
        "photo": str(photo.path),
        "mask": str(photos.copy_for_job(photo.mask, folder)),
        "lines": str(photos.copy_for_job(photo.lines, folder)) if photo.lines.exists() else None,
        "frame": photo.frame,
        "name": photo.name,
        "versions": version_ids,
        "sizes": [summary.size for summary in summaries],
        "blend": body.get("blend") is True,
        "suffix": SUFFIXES.get(photo.format if wanted == "same" else wanted, "png"),
        "max_tile_size": max_tile_size,
        "folder": str(folder),
    }
    return studio.fills.submit(session.id, "fill", FUNCTION, arguments)


@router.get("/api/jobs/{job_id}/results/{index}/view")
def result_view(request: Request, session: Writer, job_id: str, index: int) -> Response:
    path = _result_path(studio_of(request), session, job_id, index)
    views = [path.with_name(f"{index}-view.{suffix}") for suffix in ("png", "jpg")]
    return FileResponse(next((view for view in views if view.exists()), path))


@router.get("/api/jobs/{job_id}/results/{index}/download")
def result_download(request: Request, session: Writer, job_id: str, index: int) -> Response:
    path = _result_path(studio_of(request), session, job_id, index)
    return FileResponse(path, filename=_result_name(studio_of(request), session, job_id, index))


@router.post("/api/photos/from-result/{job_id}/{index}")
def photo_from_result(request: Request, session: Writer, job_id: str, index: int) -> dict[str, Any]:
    studio = studio_of(request)
    path = _result_path(studio, session, job_id, index)
    name = _result_name(studio, session, job_id, index)
    return add_photo(session, path.read_bytes(), name, studio.settings.max_pixels).as_json()


def _find_fill(studio: Studio, session: Writer, job_id: str, index: int) -> Job:
    job = studio.fills.get(session.id, job_id)
    if job is None or job.state != "finished" or not 0 <= index < len(job.arguments["versions"]):
        raise HTTPException(404, "there is no such result: fill again")
    return job


def _result_path(studio: Studio, session: Writer, job_id: str, index: int) -> Path:
    job = _find_fill(studio, session, job_id, index)
    path = Path(job.arguments["folder"], f"{index}.{job.arguments['suffix']}")
    if not path.exists():
        raise HTTPException(
            404, "there is no such result: it failed, or its photograph was dropped for newer ones"
        )
    return path


def _result_name(studio: Studio, session: Writer, job_id: str, index: int) -> str:
    job = _find_fill(studio, session, job_id, index)
    return str(job.result["versions"][index]["name"])


def _tile_size(body: dict[str, Any]) -> int:
    max_tile_size = body.get("max_tile_size", DEFAULT_MAX_TILE_SIZE)
    if not isinstance(max_tile_size, int) or not MIN_TILE_SIZE <= max_tile_size <= MOST_TILE_SIZE:
        raise HTTPException(400, f"max_tile_size: {MIN_TILE_SIZE} to {MOST_TILE_SIZE} pixels")
    return max_tile_size


def _version_ids(body: dict[str, Any]) -> list[str]:
    ids = body.get("versions")
    if (
        not isinstance(ids, list)
        or not 1 <= len(ids) <= MAX_VERSIONS
        or not all(isinstance(i, str) for i in ids)
    ):
        raise HTTPException(400, f"versions: choose one to {MAX_VERSIONS}, each as NAME/VERSION")
    return list(dict.fromkeys(ids))


def _check_sample(name: str) -> str:
    if name not in bundled_names():
        raise HTTPException(404, "there is no such sample")
    return name


@functools.lru_cache(maxsize=16)
def _thumb(name: str) -> bytes:
    pixels = bundled_photo(name)
    scale = THUMB_PIXELS / max(pixels.shape)
    small = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes()
