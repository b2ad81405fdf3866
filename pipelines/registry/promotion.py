"""Promotion after a comparison: a version becomes champion if it is not worse on the same photographs and masks.

In two parts, so that a person can read the comparison in between: `plan_promotion` compares and changes nothing,
`carry_out` sets the alias if nobody has moved it since.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_prep.storage import StorageError
from data_prep.uris import path_from_sqlite_url
from pipelines.registry import aliases
from pipelines.registry.alias_moves import AliasState
from pipelines.registry.client import CHAMPION, RegistryError, find_version, registry_client

if TYPE_CHECKING:
    from pipelines.check_masks import FolderProgressCallback
    from pipelines.contracts import ProgressCallback
    from pipelines.evaluation.comparison import PairedDifference
    from pipelines.registry.loaded_model import LoadedModel


@dataclass(frozen=True)
class PromotionPlan:
    """A promotion that is not yet carried out."""

    name: str
    version: str
    alias: str
    expected: AliasState
    """The alias's state before the comparison."""
    comparison: PairedDifference | None = None
    """Difference to the version that has the alias; None: none was needed, or none was possible."""
    photographs: str = ""
    """What was compared on, in words: `bundled, center masks`."""
    images: str = ""
    """A folder of photographs or of shards, or `bundled`."""
    notes: tuple[str, ...] = ()
    """Sentences about the comparison."""
    objection: str = ""
    """Why the version should not have the alias, in one sentence; '': no objection."""

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {
            "expected": self.expected.as_json(),
            "comparison": self.comparison and self.comparison.as_json(),
            "notes": list(self.notes),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> PromotionPlan:
        """Decode the output of `as_json`."""
        from pipelines.evaluation.comparison import PairedDifference  # imports NumPy

        nested = {
            "expected": AliasState.from_record(record["expected"]),
            "comparison": record["comparison"] and PairedDifference.from_record(record["comparison"]),
            "notes": tuple(record["notes"]),
        }
        return cls(**{**record, **nested})


@dataclass(frozen=True)
class Promotion:
    """The result of a promotion. `comparison`: None if none was needed; `notes`: sentences for the user."""

    previous_version: str | None
    comparison: PairedDifference | None
    notes: tuple[str, ...] = ()


def compare_and_promote(
    name: str,
    version: str,
    alias: str = CHAMPION,
    *,
    images: str | None = None,
    masks: Sequence[str] = (),
    hole_values: Sequence[str] | None = None,
    force: bool = False,
    reason: str = "",
    tracking_uri: str | None = None,
    on_masks: FolderProgressCallback | None = None,
    on_progress: ProgressCallback | None = None,
) -> Promotion:
    """Set `alias` on a version; the alias `champion` only after a comparison with the current champion.

    `plan_promotion`, then `carry_out`; their arguments and errors.
    """
    plan = plan_promotion(
        name,
        version,
        alias,
        images=images,
        masks=masks,
        hole_values=hole_values,
        tracking_uri=tracking_uri,
        on_masks=on_masks,
        on_progress=on_progress,
    )
    return carry_out(plan, force=force, reason=reason, tracking_uri=tracking_uri)


def plan_promotion(
    name: str,
    version: str,
    alias: str = CHAMPION,
    *,
    images: str | None = None,
    masks: Sequence[str] = (),
    hole_values: Sequence[str] | None = None,
    tracking_uri: str | None = None,
    on_masks: FolderProgressCallback | None = None,
    on_progress: ProgressCallback | None = None,
    load: Callable[[str], LoadedModel] | None = None,
) -> PromotionPlan:
    """What a promotion would compare and object to; changes nothing.

    Only `champion` needs a comparison, if another version has it: of the version's own metric over all photographs, on
    the first mask set; on `images` and `masks` (`hole_values`: the hole's pixel values in mask folders), else on the data
    that the version was scored on if reachable, else on the bundled photographs. `on_masks` and `on_progress` receive the
    progress; `load` loads models:/NAME/VERSION (default: registry.load_model). RegistryError: no such version or alias.
    """
    with registry_client(tracking_uri) as client:
        find_version(client, f"models:/{name}/{version}")
        state = aliases.find_alias_state(client, name, alias)
        database = path_from_sqlite_url(client.tracking_uri)
    if not needs_comparison(alias, state.version, version):
        return PromotionPlan(name, version, alias, state)
    from pipelines.registry import version_comparison  # imports torch, which takes seconds
    from pipelines.registry.load import load_model

    comparison, photographs, objection = None, None, ""
    sentence = f"{name} version {version} {{}} the champion, version {state.version}"
    try:
        uris = [f"models:/{name}/{number}" for number in (state.version, version)]
        old, new = (load(uri) if load else load_model(uri, tracking_uri=tracking_uri) for uri in uris)
        photographs = version_comparison.choose_photographs(
            new.info.extra, images, masks, hole_values, database and database.parent
        )
        comparison = version_comparison.compare_versions(old, new, photographs, on_masks, on_progress)
        if comparison.low is None:
            objection = sentence.format(f"cannot be compared on {comparison.n} photographs, too few, with")
        elif comparison.improvement < 0:
            objection = sentence.format("is worse than") + f": {comparison} on {photographs}"
    except (ValueError, OSError, StorageError) as error:
        objection = sentence.format("cannot be compared with") + f": {error}"
    return PromotionPlan(
        name,
        version,
        alias,
        state,
        comparison,
        str(photographs or ""),
        photographs.images if photographs else "",
        (photographs.note,) if photographs and photographs.note else (),
        objection,
    )


def needs_comparison(alias: str, current: str | None, version: str) -> bool:
    """Whether a version may get the alias only after a comparison with the `current` version that has it."""
    return alias == CHAMPION and current not in (None, version)


def carry_out(
    plan: PromotionPlan, *, force: bool = False, reason: str = "", tracking_uri: str | None = None
) -> Promotion:
    """Set the alias as planned, and record the comparison and the reason.

    RegistryError: the plan has an objection and `force` is not set; ConcurrentPromotion: the alias was moved since the
    plan was made; and as aliases.promote.
    """
    if plan.objection and not force:
        raise RegistryError(f"{plan.objection}; --force promotes it anyway")
    compared = plan.comparison
    result = f"{compared} on {plan.photographs}" if compared else plan.objection
    previous = aliases.promote(
        plan.name,
        plan.version,
        plan.alias,
        reason="; ".join(part for part in (reason, result) if part) or "by hand",
        score=compared.mean_b if compared else None,
        comparison=compared.as_json() | {"images": plan.images} if compared else None,
        forced=bool(plan.objection),
        expected=plan.expected,
        tracking_uri=tracking_uri,
    )
    notes = (*plan.notes, *([plan.objection] if plan.objection else []))
    return Promotion(previous, compared, notes)
