"""Promotion after a comparison: a version becomes champion if it is not worse on the same photographs and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_prep.storage import StorageError
from data_prep.uris import path_from_sqlite_url
from pipelines.registry import aliases
from pipelines.registry.client import CHAMPION, RegistryError, find_version, registry_client

if TYPE_CHECKING:
    from pipelines.check_masks import FolderProgressCallback
    from pipelines.contracts import ProgressCallback
    from pipelines.evaluation.comparison import PairedDifference


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

    Compares the version's own metric over all photographs, on the first mask set: on `images` and `masks`
    (`hole_values`: the hole's pixel values in mask folders), else on the data that the version was scored on if
    reachable, else on the bundled photographs. `on_masks` and `on_progress` receive the progress of the comparison.
    RegistryError: the version is worse or cannot be compared, and `force` is not set; or as aliases.promote.
    """
    with registry_client(tracking_uri) as client:
        find_version(client, f"models:/{name}/{version}")
        state = aliases.find_alias_state(client, name, alias)
        database = path_from_sqlite_url(client.tracking_uri)
    if alias != CHAMPION or state.version in (None, version):
        previous = aliases.promote(
            name, version, alias, reason=reason or "by hand", expected=state, tracking_uri=tracking_uri
        )
        return Promotion(previous, None)
    from pipelines.registry import version_comparison  # imports torch, which takes seconds
    from pipelines.registry.load import load_model

    comparison, notes, objection = None, [], ""
    sentence = f"{name} version {version} {{}} the champion, version {state.version}"
    try:
        old, new = (
            load_model(f"models:/{name}/{number}", tracking_uri=tracking_uri)
            for number in (state.version, version)
        )
        photographs = version_comparison.choose_photographs(
            new.info.extra, images, masks, hole_values, database and database.parent
        )
        notes += [photographs.note] if photographs.note else []
        comparison = version_comparison.compare_versions(old, new, photographs, on_masks, on_progress)
        if comparison.low is None:
            objection = sentence.format(f"cannot be compared on {comparison.n} photographs, too few, with")
        elif comparison.improvement < 0:
            objection = sentence.format("is worse than") + f": {comparison} on {photographs}"
    except (ValueError, OSError, StorageError) as error:
        objection = sentence.format("cannot be compared with") + f": {error}"
    if objection and not force:
        raise RegistryError(f"{objection}; --force promotes it anyway")
    notes += [objection] if objection else []
    result = f"{comparison} on {photographs}" if comparison else objection
    previous = aliases.promote(
        name,
        version,
        alias,
        reason=f"{reason}; {result}" if reason else result,
        score=comparison.mean_b if comparison else None,
        comparison=comparison.as_json() | {"images": photographs.images} if comparison else None,
        forced=bool(objection),
        expected=state,
        tracking_uri=tracking_uri,
    )
    return Promotion(previous, comparison, tuple(notes))
