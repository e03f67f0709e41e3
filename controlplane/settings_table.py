"""The README's table of settings, made from their descriptions: `python -m controlplane.settings_table`."""

import json
from pathlib import Path

from controlplane.config import ROOT, Config


def settings_table() -> str:
    """Markdown, a row per setting."""
    rows = ["| Variable | Default | What it is |", "| --- | --- | --- |"]
    for name, field in Config.model_fields.items():
        variable = field.alias or f"PENSTOCK_{name.upper()}"
        rows.append(f"| `{variable}` | {_default(field.default)} | {field.description} |")
    return "\n".join(rows)


def _default(value: object) -> str:
    if value in ("", [], None):
        return ""
    if isinstance(value, Path):
        value = value.relative_to(ROOT)
    return f"`{json.dumps(value) if isinstance(value, list | bool) else value}`"


if __name__ == "__main__":
    print(settings_table())  # noqa: T201
