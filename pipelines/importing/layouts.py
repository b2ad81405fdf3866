"""The checkpoint layouts of public implementations, as the models declare them."""

from __future__ import annotations

import difflib

from models import list_models, model_class
from models.checkpoint_layout import CheckpointLayout


def all_layouts() -> dict[str, CheckpointLayout]:
    """Model name -> layout, for the models that have one."""
    declared = {name: model_class(name).checkpoint_layout for name in list_models()}
    return {name: layout for name, layout in declared.items() if layout is not None}


def find_layout(name: str) -> CheckpointLayout:
    """The layout of one model. ValueError: it has none; the message suggests a similar name that has one."""
    known = all_layouts()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"no layout {name!r} to import from: {hint}")
    return known[name]
