"""How times and values are written, in pages and in the sentences that selectors make."""

from collections.abc import Mapping, Sequence
from typing import Any

NONE = "–"  # noqa: RUF001


def duration(seconds: float | None) -> str:
    """Seconds as the two largest units that matter."""
    if seconds is None:
        return NONE
    if seconds < 0.9995:
        return f"{seconds * 1000:.1f} ms" if seconds < 0.00995 else f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = int(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def say_value(value: Any) -> str:
    """A value of the audit trail or a parameter, as people write it."""
    if value is None or value in ("", [], {}):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_inside(inner)}" for name, inner in value.items() if inner not in (None, "", [], {}))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "; ".join(say_value(inner) for inner in value)
    return str(value)


def _inside(value: Any) -> str:
    return f"({say_value(value)})" if isinstance(value, Mapping | list) else say_value(value)
