"""One uploaded photograph: its files, and what the page shows of it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(eq=False)
class Photo:
    """One uploaded photograph."""

    id: str
    name: str
    """Shown only."""
    folder: Path
    """Its files and those of its results."""
    path: Path
    width: int
    """Upright, as all sizes here."""
    height: int
    format: str
    mode: str
    notes: list[str]
    frames: int
    frame: int | None
    """From 1; None: the file has one."""
    view: Path
    hole_percent: float = 0.0
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def mask(self) -> Path:
        return self.folder / "mask.png"

    @property
    def lines(self) -> Path:
        return self.folder / "lines.png"

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "name": self.name,
            "width": self.width,
            "height": self.height,
            "format": self.format,
            "mode": self.mode,
            "notes": self.notes,
            "frames": self.frames,
            "frame": self.frame or 1,
            "view": f"/api/photos/{self.id}/view",
            "hole_percent": self.hole_percent,
        }
