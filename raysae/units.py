"""Seconds and bytes as a person says them."""

from __future__ import annotations


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours; what is missing is a dash."""
    if seconds is None or seconds != seconds:
        return "–"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 100 else f"{hours:.1f} h"


def size(n_bytes: float | None) -> str:
    """Bytes in decimal units; what is missing is a dash."""
    if n_bytes is None or n_bytes != n_bytes:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"
