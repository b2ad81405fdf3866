"""Which photograph of a folder is filled with which mask, and where it is written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_prep.left_out import IMAGE_SUFFIXES, LeftOut, left_out_lines, printable
from data_prep.storage import open_storage
from pipelines.inference import writing
from pipelines.path_checks import check_writable_folder

FORMAT_SUFFIXES = {"png": ".png", "tiff": ".tif", "jpeg": ".jpg"}  # value of --format -> suffix of new names
MAX_LISTED = 10  # names in a line of text


@dataclass(frozen=True)
class FillJob:
    """One photograph to fill."""

    name: str
    """Path in the folder of photographs, with slashes."""
    photo: Path
    mask: Path
    out_name: str
    """Path in the output folder, with slashes."""
    out: Path


@dataclass(frozen=True)
class FolderPlan:
    """All photographs of a folder, by name."""

    out: Path
    jobs: tuple[FillJob, ...]
    failures: tuple[tuple[str, str], ...]
    """(photograph, reason): several masks have its name."""
    without_mask: tuple[str, ...]
    unused_masks: tuple[str, ...]
    notes: tuple[str, ...]
    """Sentences about formats and about files that are left out."""


def plan_folder(
    photos: str | Path, masks: str | Path, out: str | Path, output_format: str | None = None
) -> FolderPlan:
    """Match the photographs of a folder and its sub-folders with masks; reads no file's contents.

    `masks` is one mask file for all, or a folder with a mask for `sub/a.jpg` at `sub/a.png` (any image suffix).
    `output_format` is a key of FORMAT_SUFFIXES; None keeps each photograph's format if it can be written, otherwise PNG.
    The folders `masks` and `out` may lie in `photos`: their files are not photographs.
    ValueError in one line: a folder is missing, no photograph has a mask, two photographs would be written to one file,
    an output would overwrite an input.
    """
    photos, masks, out = Path(photos), Path(masks), Path(out)
    if not photos.is_dir():
        raise ValueError(f"{photos} is not a folder of photographs")
    if not masks.exists():
        raise ValueError(f"the masks {masks} do not exist: give a folder of masks, or one mask file for all")
    check_writable_folder(out, "--out")
    for role, folder in (("photographs", photos), ("masks", masks)):
        if out.exists() and folder.is_dir() and out.samefile(folder):
            raise ValueError(f"--out {out} is the folder of the {role}: name another folder")
    if masks.is_dir() and masks.samefile(photos):
        raise ValueError(
            f"{masks} has the photographs, and cannot also have the masks: put those into another folder"
        )

    left_out = LeftOut()
    names = list(_list_images(photos, (masks, out), left_out))
    if not names:
        raise ValueError(f"{photos} has no photographs{f': {left_out}' if left_out.total else ''}")
    masks_by_stem = _masks_by_stem(masks, (photos, out)) if masks.is_dir() else None
    jobs: list[FillJob] = []
    failures: list[tuple[str, str]] = []
    without_mask: list[str] = []
    for name in names:
        found = [""] if masks_by_stem is None else masks_by_stem.get(_stem(name), [])
        if len(found) == 1:
            out_name = str(PurePosixPath(name).with_suffix(_output_suffix(name, output_format)))
            mask = masks / found[0] if found[0] else masks
            jobs.append(FillJob(name, photos / name, mask, out_name, out / out_name))
        elif found:
            failures.append(
                (name, f"{masks} has several masks of this name: {', '.join(map(printable, found))}")
            )
        else:
            without_mask.append(name)
    if not jobs and not failures:
        raise ValueError(
            f"no photograph of {photos} has a mask in {masks}: the mask of {printable(names[0])} is "
            f"{printable(_stem(names[0]))}.png there (any image suffix)"
        )
    _check_outputs(jobs, out)
    used = {_stem(name) for name in names}
    unused = [mask for stem, found in (masks_by_stem or {}).items() if stem not in used for mask in found]
    notes = [
        *_format_notes(jobs, output_format),
        *(f"left out: {line}" for line in left_out_lines(left_out.entries())),
    ]
    return FolderPlan(out, tuple(jobs), tuple(failures), tuple(without_mask), tuple(unused), tuple(notes))


def list_names(names: list[str] | tuple[str, ...]) -> str:
    """The first MAX_LISTED names in one line, and the number of the others."""
    listed = ", ".join(printable(name) for name in names[:MAX_LISTED])
    return listed + (f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else "")


def _list_images(folder: Path, excluded: tuple[Path, ...], left_out: LeftOut) -> Iterator[str]:
    """The names of the image files in a folder and its sub-folders, sorted, without those in the folders `excluded`."""
    root = os.path.realpath(folder)
    inside = [os.path.relpath(os.path.realpath(path), root) for path in excluded]
    prefixes = tuple(f"{path}/" for path in inside if not path.startswith(".."))
    files = {path for path in inside if not path.startswith("..")}  # the mask for all
    for name, _ in open_storage(str(folder)).list_user_files(left_out):
        if name.startswith(prefixes) or name in files:
            continue
        if PurePosixPath(name).suffix[1:].lower() in IMAGE_SUFFIXES:
            yield name
        else:
            left_out.add("side files", name)


def _masks_by_stem(masks: Path, excluded: tuple[Path, ...]) -> dict[str, list[str]]:
    """Name without suffix -> the mask files of this name."""
    found: dict[str, list[str]] = {}
    for name in _list_images(masks, excluded, LeftOut()):
        found.setdefault(_stem(name), []).append(name)
    return found


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _output_suffix(name: str, output_format: str | None) -> str:
    """The photograph's own suffix if it names the format that is written."""
    suffix = PurePosixPath(name).suffix
    formats: Mapping[str, str] = writing.LOSSLESS_FORMATS | writing.LOSSY_FORMATS
    own_format = formats.get(suffix.lower(), "")
    if own_format.lower() == output_format or (own_format and output_format is None):
        return suffix
    return FORMAT_SUFFIXES[output_format or "png"]


def _check_outputs(jobs: list[FillJob], out: Path) -> None:
    """ValueError: two photographs would be written to one file, or one over an input."""
    photo_of: dict[str, str] = {}
    for job in jobs:
        other = photo_of.setdefault(job.out_name, job.name)
        if other != job.name:
            raise ValueError(
                f"{printable(other)} and {printable(job.name)} would both be written to {printable(job.out_name)}: "
                "rename one of them, or choose another --format"
            )
    inputs = {os.path.realpath(path): path for job in jobs for path in (job.photo, job.mask)}
    for job in jobs:
        if source := inputs.get(os.path.realpath(job.out)):
            raise ValueError(f"--out {out} would overwrite {source}: name another folder")


def _format_notes(jobs: list[FillJob], output_format: str | None) -> list[str]:
    notes = []
    if output_format is None and (changed := [job.name for job in jobs if job.name != job.out_name]):
        count = f"{len(changed)} photographs are" if len(changed) > 1 else "1 photograph is"
        notes.append(f"{count} written as PNG, as only PNG, TIFF and JPEG can be: {list_names(changed)}")
    lossy = [job.out_name for job in jobs if writing.output_format(job.out) in writing.LOSSY_FORMATS.values()]
    if lossy:
        notes.append(f"{writing.LOSSY_WARNING} ({len(lossy)} of {len(jobs)} files); --format png keeps them")
    return notes
