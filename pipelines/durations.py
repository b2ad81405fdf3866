"""Durations and remaining times as text."""

from __future__ import annotations


def format_duration(seconds: float) -> str:
    """0.4 s, 12 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"


def format_eta(done: float, total: float, elapsed_s: float) -> str:
    """Remaining time at the mean rate so far, as m:ss or h:mm:ss; empty before the first progress and at the end."""
    if not done or not total or done >= total:
        return ""
    remaining_s = round(elapsed_s * (total - done) / done)
    return (
        f"{remaining_s // 60}:{remaining_s % 60:02d}"
        if remaining_s < 3600
        else f"{remaining_s // 3600}:{remaining_s // 60 % 60:02d}:{remaining_s % 60:02d}"
    )
