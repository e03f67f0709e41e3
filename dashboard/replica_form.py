"""The form that changes how a worker forms batches: what an operator typed, checked field by field."""

from collections.abc import Mapping
from typing import Any, get_args

from inference.messages import BatchMode
from scheduling.core.sizing.strategies import SIZINGS, SizingError, build_sizing

MODES = {
    "continuous": "Requests join and leave the batch at any step.",
    "dynamic": "A batch starts when enough wait, one waited long, one is urgent, or memory is short.",
    "static": "A batch starts when it is full or nothing more waits, and ends as a whole.",
    "serial": "One request after the other.",
}
assert set(MODES) == set(get_args(BatchMode))
LARGEST_BATCH = 4096


def read_arguments(command: str, form: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What a command takes along, and a sentence for each field that cannot be used."""
    if command == "set_mode":
        return _read_mode(str(form.get("mode", "")))
    if command == "set_batch_size":
        return _read_batch_size(str(form.get("max_batch_size", "")))
    if command == "sizing":
        return _read_sizing(str(form.get("sizing", "")), form)
    return {}, {}


def _read_mode(mode: str) -> tuple[dict[str, Any], dict[str, str]]:
    if mode not in MODES:
        return {}, {"mode": f"mode must be one of {', '.join(MODES)}."}
    return {"mode": mode}, {}


def _read_batch_size(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    size = int(text) if text.isdecimal() and len(text) < 6 else 0
    if not 1 <= size <= LARGEST_BATCH:
        return {}, {"max_batch_size": f"The batch size must be a whole number from 1 to {LARGEST_BATCH:,}."}
    return {"max_batch_size": size}, {}


def _read_sizing(name: str, form: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    if name not in SIZINGS:
        return {}, {"sizing": f"sizing must be one of {', '.join(SIZINGS)}."}
    params: dict[str, float] = {}
    problems: dict[str, str] = {}
    for key, spec in SIZINGS[name].parameters.items():
        raw = str(form.get(f"{name}.{key}", spec.default))
        try:
            params[key] = float(raw)
        except ValueError:
            params[key] = float("nan")
        if not spec.minimum <= params[key] <= spec.maximum:
            problems[f"{name}.{key}"] = f"{key} must be a number from {spec.minimum:,.6g} to {spec.maximum:,.6g}."
    if not problems:
        try:
            build_sizing(name, params)
        except SizingError as error:  # what the fields say together
            problems["sizing"] = str(error)
    return {"name": name, "params": params}, problems
