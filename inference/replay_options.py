"""What `manage.py replay` is told, read and checked: the fleet, its policies, its tenants."""

import json
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from math import inf
from pathlib import Path
from random import Random
from typing import Any, get_args

from inference.recorded import RecordedRun
from inference.what_if import settings_for
from scheduling.core.planner import Mode
from scheduling.core.policies import POLICIES, build_policy
from scheduling.core.policy import Policy
from scheduling.core.simulation.admission import AdmissionSettings
from scheduling.core.simulation.limits import TenantLimit
from scheduling.core.simulation.outcome import ServiceTarget, ServiceTargets
from scheduling.core.simulation.replica import SwapSettings
from scheduling.core.simulation.settings import SimulationSettings
from scheduling.core.simulation.trace import TraceRequest
from scheduling.core.sizing.controller import Sizing
from scheduling.core.sizing.cost_model import SwapLink
from scheduling.core.sizing.strategies import SIZINGS, build_sizing
from scheduling.core.triggers import parse_trigger

TTFT_TARGET_S = 5.0
Options = Mapping[str, Any]


class ReplayOptionError(Exception):
    """An option cannot be used; the message names it."""


def add_fleet_arguments(parser: ArgumentParser) -> None:
    """Options of the simulated fleet."""
    parser.add_argument("--policies", default="", help=f"some of {','.join(POLICIES)} (all)")
    parser.add_argument("--params", default="{}", metavar="JSON", help='such as {"wrr": {"high": 80}, "adaptive": {}}')
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--batch-size", type=int, help="most sequences in a batch (64)")
    size.add_argument("--sizing", choices=sorted(SIZINGS), help="let a controller choose the batch size")
    parser.add_argument(
        "--sizing-params", default="{}", metavar="JSON", help='of the controller, such as {"largest": 99}'
    )
    parser.add_argument("--replicas", type=int, help="engines that claim from the queue (1)")
    parser.add_argument("--kv-blocks", type=int, help="KV blocks of 16 tokens in each engine (16384)")
    parser.add_argument("--step-tokens", type=int, help="most tokens in one engine step (2048)")
    parser.add_argument("--mode", choices=get_args(Mode), help="how batches form (continuous)")
    parser.add_argument("--trigger", metavar="JSON", help='of dynamic and static batches, such as {"size": 8}')
    parser.add_argument("--swap", type=float, metavar="GB/S", help="preempted KV may go to host memory at this speed")
    parser.add_argument("--kv-bytes", type=int, default=131_072, help="KV bytes of a token, for --swap (131072)")
    parser.add_argument("--queue-limit", type=int, help="turn on backpressure with this bound on the queue (off)")
    parser.add_argument("--queue-tokens", type=int, help="bound on the tokens that wait (none)")
    parser.add_argument("--no-shed", action="store_true", help="a full queue refuses who comes, whoever waits")
    parser.add_argument(
        "--tenants", type=Path, metavar="FILE", help='JSON: {"name": {"rpm", "tpm", "tpd", "concurrency", "weight"}}'
    )
    parser.add_argument("--ttft-target", type=float, metavar="S", help="SLA: time to first token (5, or as set)")
    parser.add_argument("--e2e-target", type=float, metavar="S", help="SLA: time to the last token (none, or as set)")
    parser.add_argument("--seed", type=int, default=0, help="of controllers that draw at random (0)")


def read_policies(options: Options, recorded: RecordedRun | None) -> list[Policy]:
    """The policies to compare; the one that was in force with its own parameters unless told others.

    Raises PolicyError or ReplayOptionError.
    """
    given = _read_object(options["params"], "--params")
    names = [name.strip() for name in options["policies"].split(",")] if options["policies"] else list(POLICIES)
    if unknown := sorted(given.keys() - set(names)):
        raise ReplayOptionError(f"--params has parameters for {unknown[0]!r}, which is not among the policies.")
    if wrong := [name for name, params in given.items() if not isinstance(params, dict)]:
        raise ReplayOptionError(f"--params: what {wrong[0]} is given is an object, such as {{}}.")
    known: dict[str, Any] = {recorded.policy: recorded.params} if recorded is not None else {}
    return [build_policy(name, given.get(name, known.get(name))) for name in names]


def read_settings(options: Options, recorded: RecordedRun | None, policy: Policy) -> SimulationSettings:
    """The fleet: as told, else as recorded, else the defaults. Raises ValueError and its kin."""
    base = settings_for(recorded, policy) if recorded is not None else SimulationSettings(policy=policy)
    given = {
        "num_replicas": options["replicas"],
        "num_blocks": options["kv_blocks"],
        "mode": options["mode"],
        "batch_size": options["batch_size"],
        "step_tokens": options["step_tokens"],
    }
    chosen = {key: value for key, value in given.items() if value is not None}
    if any(isinstance(value, int) and value < 1 for value in chosen.values()):
        raise ReplayOptionError("Batch size, replicas, KV blocks and step tokens are at least 1.")
    if options["trigger"] is not None:
        chosen["trigger"] = parse_trigger(_read_object(options["trigger"], "--trigger"))
        if (mode := options["mode"] or base.mode) not in ("dynamic", "static"):
            raise ReplayOptionError(f"--trigger starts the batches of --mode dynamic and static; in {mode} none do.")
    if not all(_is_amount(options[name]) for name in ("ttft_target", "e2e_target") if options[name] is not None):
        raise ReplayOptionError("--ttft-target and --e2e-target are seconds, above 0.")
    if options["ttft_target"] is not None or options["e2e_target"] is not None or recorded is None:
        ttft_s = TTFT_TARGET_S if options["ttft_target"] is None else options["ttft_target"]
        chosen["targets"] = ServiceTargets(default=ServiceTarget(ttft_s=ttft_s, e2e_s=options["e2e_target"]))
    fields = {name: getattr(base, name) for name in base.__dataclass_fields__}
    if options["trace"] is not None or options["rate"] != 1.0:
        chosen["pace"] = ()  # other seconds than those that were recorded
    more = {"sizing": _read_sizing(options), "admission": _read_admission(options), "swap": _read_swap(options)}
    return SimulationSettings(**{**fields, **more, **chosen})


def read_tenants(options: Options) -> dict[str, dict[str, Any]]:
    """Limits and weights by tenant, from the file that is named. Raises ReplayOptionError."""
    path = options["tenants"]
    if path is None:
        return {}
    try:
        tenants = _read_object(path.read_text(), f"The file {path}")
    except OSError as error:
        raise ReplayOptionError(f"The file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ReplayOptionError(f"The file {path} is not text: {error}.") from error
    for name, values in tenants.items():
        if not isinstance(values, dict) or values.keys() - {"rpm", "tpm", "tpd", "concurrency", "weight"}:
            raise ReplayOptionError(f"The file {path}: {name} may have rpm, tpm, tpd, concurrency and weight.")
        weight = values.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0.01 <= weight <= 1000:
            raise ReplayOptionError(f"The file {path}: the weight of {name} lies between 0.01 and 1000.")
    return tenants


def with_weights(trace: Sequence[TraceRequest], tenants: Mapping[str, Mapping[str, Any]]) -> Sequence[TraceRequest]:
    """The trace with the tenants' weights."""
    weights = {name: float(values["weight"]) for name, values in tenants.items() if "weight" in values}
    if not weights:
        return trace
    return [request._replace(share=weights.get(request.tenant, request.share)) for request in trace]


def _read_sizing(options: Options) -> Callable[[int], Sizing] | None:
    name, params = options["sizing"], _read_object(options["sizing_params"], "--sizing-params")
    if name is None:
        if params:
            raise ReplayOptionError("--sizing-params are those of a controller: name it with --sizing.")
        return None
    build_sizing(name, params)  # what is wrong with them is said before anything runs
    return lambda index: build_sizing(name, params, random=Random(options["seed"] + index))  # noqa: S311


def _read_admission(options: Options) -> AdmissionSettings | None:
    limit, tokens = options["queue_limit"], options["queue_tokens"]
    if (limit is not None and limit < 1) or (tokens is not None and tokens < 1):
        raise ReplayOptionError("The queue's bound is at least 1.")
    limits = {
        name: TenantLimit(**{key: value for key, value in values.items() if key != "weight"})
        for name, values in read_tenants(options).items()
    }
    if limit is None and tokens is None and not limits:
        return None
    return AdmissionSettings(queue_limit=limit, tokens_limit=tokens, shed=not options["no_shed"], tenants=limits)


def _read_swap(options: Options) -> SwapSettings | None:
    speed, kv_bytes = options["swap"], options["kv_bytes"]
    if speed is None:
        return None
    if not _is_amount(speed) or kv_bytes < 1:
        raise ReplayOptionError("--swap and --kv-bytes are above 0.")
    return SwapSettings(link=SwapLink(bytes_per_s=1e9 * speed), kv_bytes_per_token=kv_bytes)


def _is_amount(value: float) -> bool:
    """Whether it is a number above 0; `nan` and `inf` are read as numbers, too."""
    return 0 < value < inf


def _read_object(text: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ReplayOptionError(f"{what} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ReplayOptionError(f"{what} is a JSON object, not {text!r:.60}.")
    return value
