"""How values of the audit trail and parameters are written: on the dashboard, in the admin, in sentences."""

from collections.abc import Mapping, Sequence
from typing import Any


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
