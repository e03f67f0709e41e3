"""The document a live page shows: how it changes by numbered updates, and how the parts of it are spelled.

A page takes a snapshot and then applies updates; `static/js/state.js` mirrors `apply`. An update holds a JSON merge
patch (RFC 7396) of the document, and at most one new history row per model. A document therefore holds no nulls
outside history rows: what is not known is left out.
"""

from collections.abc import Mapping
from typing import Any

Document = dict[str, Any]

HISTORY_ROWS = 300
"""Rows kept per model: five minutes, one a second."""


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> Document:
    """The merge patch that turns `old` into `new`; null stands for a key that went away."""
    patch: Document = {key: None for key in old if key not in new}
    for key, value in new.items():
        if key not in old:
            patch[key] = value
        elif old[key] != value:
            both = isinstance(value, Mapping) and isinstance(old[key], Mapping)
            patch[key] = diff(old[key], value) if both else value
    return patch


def merge(target: Any, patch: Mapping[str, Any]) -> Document:
    """`target` with a merge patch applied; `target` itself stays as it is."""
    merged: Document = dict(target) if isinstance(target, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping):
            merged[key] = merge(merged.get(key), value)
        else:
            merged[key] = value
    return merged


def extend_history(history: Mapping[str, list[Any]], rows: Mapping[str, Any], models: Mapping[str, Any]) -> Document:
    """`history` with a row per model added, the oldest dropped, and models that are gone left out."""
    return {
        name: ([*history.get(name, []), *([rows[name]] if name in rows else [])])[-HISTORY_ROWS:] for name in models
    }


def apply(snapshot: Document, update: Document) -> Document:
    """The snapshot that a page holds after `update`. Raises ValueError where an update before it is missing."""
    if update["seq"] != snapshot["seq"] + 1 or update["epoch"] != snapshot["epoch"]:
        raise ValueError(f"Update {update['seq']} does not follow {snapshot['seq']}.")
    state = merge(snapshot["state"], update["patch"])
    history = extend_history(snapshot["history"], update["rows"], state["models"])
    return {**snapshot, "seq": update["seq"], "state": state, "history": history}


def prune(value: Any) -> Any:
    """`value` without keys whose value is None."""
    if isinstance(value, Mapping):
        return {str(key): prune(part) for key, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [prune(part) for part in value]
    return value
