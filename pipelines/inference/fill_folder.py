"""Fills the photographs of a folder, resumes where an earlier command ended, and lists what failed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from data_prep.left_out import printable
from pipelines.errors import explain_error
from pipelines.inference.fill import prepare_fill, run_fill
from pipelines.inference.fill_record import (
    RECORD_FILE,
    FillEntry,
    FillInputs,
    FillRecord,
    open_record,
    sha256_of,
)
from pipelines.inference.folder_plan import FillJob, FolderPlan, list_names, plan_folder
from pipelines.inference.tiles import DEFAULT_MAX_TILE_SIZE
from pipelines.inference.writing import LOSSY_WARNING, WriteError

if TYPE_CHECKING:
    from pipelines.registry.loaded_model import LoadedModel

FILL_VERSION = 1  # of the code: increased when it would write other bytes for the same inputs


@dataclass(frozen=True)
class FillOptions:
    """The options of `fill` that a whole folder shares."""

    invert: bool | None = None
    dilate: int = 0
    max_tile_size: int = DEFAULT_MAX_TILE_SIZE
    blend: bool = False
    frame: int | None = None
    hole_values: tuple[str, ...] | None = None

    def as_record(self) -> dict[str, Any]:
        values = asdict(self) | {"version": FILL_VERSION}
        return values | {"hole_values": self.hole_values and list(self.hole_values)}


@dataclass(frozen=True)
class FillSettings:
    """What all photographs of a folder are filled with."""

    model_digest: str
    options: FillOptions


@dataclass(frozen=True)
class FillOutcome:
    """What became of one photograph: `entry` if it is filled, else `error`, in one line."""

    name: str
    entry: FillEntry | None = None
    error: str = ""


ProgressCallback = Callable[[str, int, int, str], None]
"""(stage, photographs done, all photographs, note). The stage `check` compares with the record of an earlier fill, `fill`
fills; what an earlier one has filled counts as done."""


class JobRunner(Protocol):
    """Decides where photographs are filled; changes no bit of the results."""

    def __call__(
        self, model: LoadedModel, settings: FillSettings, jobs: Sequence[FillJob]
    ) -> Iterable[FillOutcome]:
        """The outcomes, in any order, as they come. WriteError: the output cannot be written."""


@dataclass(frozen=True)
class FolderResult:
    """The report of a folder's fill; names are paths in the folder of photographs."""

    out_path: str
    filled: tuple[str, ...]
    skipped: tuple[str, ...]
    """Filled by an earlier command, with the same inputs and options."""
    failures: tuple[tuple[str, str], ...]
    """(name, reason)."""
    without_mask: tuple[str, ...]
    unused_masks: tuple[str, ...]
    """Paths in the folder of masks."""
    notes: tuple[str, ...]
    warnings: tuple[tuple[str, str], ...]
    """(name, warning)."""

    @property
    def report_lines(self) -> tuple[str, ...]:
        """Lines for a terminal."""
        done = f"filled {_count(self.filled)} in {self.out_path}"
        lines = [done + (f"; {len(self.skipped)} were filled before" if self.skipped else "")]
        lines += self.notes
        if self.without_mask:
            lines.append(f"{_count(self.without_mask)} without a mask: {list_names(self.without_mask)}")
        if self.unused_masks:
            count = f"{len(self.unused_masks)} mask{'s' * (len(self.unused_masks) > 1)}"
            lines.append(f"{count} without a photograph: {list_names(self.unused_masks)}")
        for group in self._warning_groups():
            name, text = group[0]
            more = f" and {len(group) - 1} more" if len(group) > 1 else ""
            lines.append(f"warning: {printable(name)}{more}: {text}")
        if self.failures:
            lines.append(f"{_count(self.failures)} failed; the same command tries them again:")
            lines += [f"  {printable(name)}: {reason}" for name, reason in self.failures]
        return tuple(lines)

    def _warning_groups(self) -> list[list[tuple[str, str]]]:
        """The warnings that differ only in their figures, together."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for name, text in self.warnings:
            groups.setdefault(text.partition(":")[0].partition(" (")[0], []).append((name, text))
        return list(groups.values())


def fill_folder(
    model: LoadedModel,
    photos: str | Path,
    masks: str | Path,
    out: str | Path,
    *,
    options: FillOptions | None = None,
    output_format: str | None = None,
    run_jobs: JobRunner | None = None,
    progress: ProgressCallback | None = None,
) -> FolderResult:
    """`plan_folder` and `fill_plan`, whose docstrings describe the arguments and errors."""
    plan = plan_folder(photos, masks, out, output_format)
    return fill_plan(model, plan, options or FillOptions(), run_jobs=run_jobs, progress=progress)


def fill_plan(
    model: LoadedModel,
    plan: FolderPlan,
    options: FillOptions,
    *,
    run_jobs: JobRunner | None = None,
    progress: ProgressCallback | None = None,
) -> FolderResult:
    """Fill the photographs that were not filled before from the same files with the same model and options.

    One photograph's error is listed, and the others are filled. Files appear complete or not at all. `run_jobs` None:
    in this process.
    ValueError in one line: another command writes to the folder, or it has a file of another origin that would be
    overwritten. WriteError: the output cannot be written, such as on a full disk; nothing more is filled then.
    """
    progress = progress or (lambda *_: None)
    failures, skipped, remaining = list(plan.failures), list[FillJob](), list[FillJob]()
    filled: list[str] = []
    warnings: list[tuple[str, str]] = []
    total = len(plan.jobs)
    _check_no_foreign_files(plan)
    settings = FillSettings(model_digest(model), options)
    with open_record(plan.out) as record:
        recorded = any(record.has(job.out_name) for job in plan.jobs)
        for number, job in enumerate(plan.jobs, start=1):
            (skipped if _is_filled(record, settings, job) else remaining).append(job)
            if recorded:
                progress("check", number, total, f"{len(skipped)} filled before")
        progress("fill", len(skipped), total, "photographs")
        pending = {job.name for job in remaining}
        for outcome in (run_jobs or fill_here)(model, settings, remaining) if remaining else ():
            if outcome.entry is None:
                failures.append((outcome.name, outcome.error))
            else:
                record.add(outcome.entry)
                filled.append(outcome.name)
                warnings += [
                    (outcome.name, text)
                    for text in outcome.entry.warnings
                    if not text.startswith(LOSSY_WARNING)
                ]
            pending.remove(outcome.name)
            note = f"{len(failures)} failed" if failures else "photographs"
            progress("fill", total - len(pending), total, note)
    return FolderResult(
        out_path=str(plan.out),
        filled=tuple(sorted(filled)),
        skipped=tuple(job.name for job in skipped),
        failures=tuple(sorted(failures)),
        without_mask=plan.without_mask,
        unused_masks=plan.unused_masks,
        notes=plan.notes,
        warnings=tuple(sorted(warnings)),
    )


def fill_here(model: LoadedModel, settings: FillSettings, jobs: Iterable[FillJob]) -> Iterator[FillOutcome]:
    """Fill the photographs one by one in this process, on one thread as in a task."""
    from pipelines.evaluation.batches import single_threaded  # imports torch

    for job in jobs:
        with single_threaded():
            outcome = fill_job(model, settings, job)
        yield outcome


def fill_job(model: LoadedModel, settings: FillSettings, job: FillJob) -> FillOutcome:
    """Fill one photograph; its error is part of the outcome. WriteError: the output cannot be written."""
    options = settings.options
    try:
        inputs = _fill_inputs(settings, job)
        try:
            job.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WriteError(f"--out {job.out} cannot be written: {error.strerror or error}") from None
        task = prepare_fill(
            job.photo,
            job.mask,
            job.out,
            invert=options.invert,
            dilate=options.dilate,
            max_tile_size=options.max_tile_size,
            frame=options.frame,
            hole_values=options.hole_values,
        )
        result = run_fill(model, task, blend=options.blend)
        sha256 = sha256_of(job.out)
    except WriteError:
        raise
    except Exception as error:  # also of a library, about one file
        return FillOutcome(job.name, error=explain_error(error))
    label = model.name if model.version is None else f"{model.name}/{model.version}"
    entry = FillEntry(job.out_name, sha256, inputs, label, result.hole_percent, result.notes, result.warnings)
    return FillOutcome(job.name, entry)


def model_digest(model: LoadedModel) -> str:
    """sha256 of all that decides a model's completions: its name, version, options and weights."""
    import torch

    digest = hashlib.sha256()
    record = [model.name, model.version, model.info.as_json()]
    digest.update(json.dumps(record, sort_keys=True, default=str).encode())
    state = model.forward.state_dict() if isinstance(model.forward, torch.nn.Module) else {}
    for key, tensor in sorted(state.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _fill_inputs(settings: FillSettings, job: FillJob) -> FillInputs:
    """Raises OSError."""
    digests = sha256_of(job.photo), sha256_of(job.mask)
    return FillInputs(*digests, settings.model_digest, settings.options.as_record())


def _is_filled(record: FillRecord, settings: FillSettings, job: FillJob) -> bool:
    if not record.has(job.out_name):
        return False
    try:
        return record.is_filled(job.out_name, _fill_inputs(settings, job))
    except OSError:
        return False  # filling it says why


def _check_no_foreign_files(plan: FolderPlan) -> None:
    """ValueError: files would be overwritten in a folder to which no `inpaint fill` has written."""
    foreign = [job.out_name for job in plan.jobs if job.out.exists()]
    if foreign and not (plan.out / RECORD_FILE).exists():
        raise ValueError(
            f"--out {plan.out} has files that would be overwritten, and that `inpaint fill` has not written there: "
            f"{list_names(foreign)}; name another folder"
        )


def _count(items: Sequence[Any]) -> str:
    return "1 photograph" if len(items) == 1 else f"{len(items)} photographs"
