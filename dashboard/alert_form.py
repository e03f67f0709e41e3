"""What the form of an alert rule says: values for the fields that came, and a sentence for each that cannot be used."""

from collections.abc import Mapping
from typing import Any

from dashboard.alerts.services import CHANGEABLE

WHOLE = ("window_s", "short_window_s", "hold_s", "clear_s")
MAX_WHOLE = 2**31 - 1


def read_rule_form(form: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Field -> value, and field -> problem. A box that is not ticked is not sent: `enabled` is then False."""
    changes: dict[str, Any] = {"enabled": form.get("enabled") in ("on", "1", "true")}
    problems: dict[str, str] = {}
    for name in CHANGEABLE:
        raw = str(form.get(name, "")).strip()
        if name in ("model", "severity") and name in form:
            changes[name] = raw.replace("\0", "")
        elif name in WHOLE and raw:
            if raw.isascii() and raw.isdigit() and int(raw) <= MAX_WHOLE:
                changes[name] = int(raw)
            else:
                problems[name] = "Give a whole number of seconds."
        elif name == "threshold" and name in form:
            try:
                changes[name] = float(raw)
            except ValueError:
                problems[name] = "Give a number."
    return changes, problems
