"""Promotion after a comparison: a version becomes champion when it is no worse on the same photographs and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from data_prep.storage import StorageError
from pipelines import registry
from pipelines.registry import aliases
from pipelines.registry.versions import CHAMPION, RegistryError, connected, find_version

if TYPE_CHECKING:
    from pipelines.evaluation.comparing import Difference


@dataclass(frozen=True)
class Promotion:
    """What was done: the version before it, the comparison or None where none was due, and notes in whole sentences."""

    before: str | None
    comparison: Difference | None
    notes: tuple[str, ...] = ()


def promote(
    name: str,
    version: str,
    alias: str = CHAMPION,
    *,
    images: str | None = None,
    masks: Sequence[str] = (),
    force: bool = False,
    reason: str = "",
    tracking_uri: str | None = None,
    quiet: bool = True,
) -> Promotion:
    """Give `alias` to a version; the champion's only after comparing it with the present champion.

    Compared by the version's own metric over all photographs of the first kind of masks, on `images` and `masks`, else
    on those that it was scored on where they can be reached, else on the bundled ones. RegistryError in one line when
    it is worse, or cannot be compared (`force` promotes it all the same), and as registry.promote does.
    """
    with connected(tracking_uri) as client:
        find_version(client, f"models:/{name}/{version}")
        at = aliases.place(client, name, alias)
    if alias != CHAMPION or at.holder in (None, version):
        why = reason or "by hand"
        before = registry.promote(name, version, alias, reason=why, expected=at, tracking_uri=tracking_uri)
        return Promotion(before, None)
    from pipelines.evaluation import judging  # seconds to import, with torch

    found, notes, objection = None, [], ""
    against = f"{name} version {version} {{}} the champion, version {at.holder}"
    try:
        old, new = (
            judging.load_model(f"models:/{name}/{number}", tracking_uri=tracking_uri)
            for number in (at.holder, version)
        )
        photographs = judging.choose(new.metadata, images, masks)
        notes += [photographs.note] if photographs.note else []
        found = judging.compare(old, new, photographs, quiet)
        if found.low is None:
            objection = against.format(f"cannot be compared on {found.n} photographs, too few, with")
        elif found.gain < 0:
            objection = against.format("is worse than") + f": {found} on {photographs}"
    except (ValueError, OSError, StorageError) as error:
        objection = against.format("cannot be compared with") + f": {error}"
    if objection and not force:
        raise RegistryError(f"{objection}; --force promotes it all the same")
    notes += [objection] if objection else []
    said = f"{found} on {photographs}" if found else objection
    before = registry.promote(
        name,
        version,
        alias,
        reason=f"{reason}; {said}" if reason else said,
        score=found.b if found else None,
        comparison=asdict(found) | {"images": photographs.images} if found else None,
        forced=bool(objection),
        expected=at,
        tracking_uri=tracking_uri,
    )
    return Promotion(before, found, tuple(notes))
