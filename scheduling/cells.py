"""Cells of tables that people open in a spreadsheet."""

from typing import Any

FORMULA = ("=", "+", "-", "@", "\t", "\r")


def safe_cell(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula is marked as text."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def plain_cell(text: str) -> str:
    """The same without that mark."""
    return text[1:] if text.startswith("'") and text[1:].startswith(FORMULA) else text
