"""Where each mode's time goes: its steps by what they compute and for how many, beside the limit of the machine."""

from typing import Any, NamedTuple, get_args

from benchmarks.modes import SLOTS, Request, run_ours
from benchmarks.roofline import MeteredRunner, StepNote
from inference.messages import BatchMode

LEAST_SEQUENCES = (1, 2, 4, 8, SLOTS)
"""Decode steps are told apart by these numbers of sequences, and those that also read prompts from all of them."""
PROMPTS = "reading prompts"


class Kind(NamedTuple):
    """Steps of one kind. Shares are of the mode's processor time, and of the limit within these steps."""

    steps: int
    tokens: int
    """That were sampled."""
    step_ms: float
    share: float
    of_limit: float


def measure_profile(runner: MeteredRunner, workload: list[Request]) -> dict[str, Any]:
    """One round of each of our modes."""
    found: dict[str, Any] = {}
    print(f"  {'':<12}{'steps of':<18}{'steps':>7}{'tokens':>8}{'ms':>8}{'of time':>9}{'of limit':>10}")
    for mode in get_args(BatchMode):
        run_ours(runner, mode, workload)
        spent = {name: seconds / (runner.elapsed_s - runner.turns_s) for name, seconds in runner.spent_s.items()}
        spent["rest"] = runner.outside
        kinds = sort_steps(runner.notes)
        found[mode] = {"kinds": {name: kind._asdict() for name, kind in kinds.items()}, "spent": spent}
        found[mode]["cpu_s"] = sum(note.cpu_s for note in runner.notes)
        found[mode]["least_s"] = runner.least_s
        for name, kind in kinds.items():
            print(
                f"  {mode:<12}{name:<18}{kind.steps:>7}{kind.tokens:>8}{kind.step_ms:>8.2f}{kind.share:>9.0%}"
                f"{kind.of_limit:>10.0%}"
            )
        print(f"  {mode:<12}" + ", ".join(f"{name} {share:.1%}" for name, share in spent.items()))
    for what in ("cpu_s", "least_s"):
        found[f"{what}_static_over_continuous"] = found["static"][what] / found["continuous"][what]
    print(
        f"  continuous over static by processor time of the steps: {found['cpu_s_static_over_continuous']:.2f}; with "
        f"every step at the limit: {found['least_s_static_over_continuous']:.2f}"
    )
    return found


def sort_steps(notes: list[StepNote]) -> dict[str, Kind]:
    """The kinds of a run's steps, those that there are."""
    of_kind: dict[str, list[StepNote]] = {PROMPTS: [note for note in notes if note.prompt_tokens]}
    for least, above in zip(LEAST_SEQUENCES, (*LEAST_SEQUENCES[1:], SLOTS + 1), strict=True):
        name = f"{least} to {above - 1} decoding" if above - least > 1 else f"{least} decoding"
        of_kind[name] = [note for note in notes if not note.prompt_tokens and least <= note.sequences < above]
    total_s = sum(note.cpu_s for note in notes)
    return {
        name: Kind(
            steps=len(some),
            tokens=sum(note.sampled for note in some),
            step_ms=1000 * sum(note.seconds for note in some) / len(some),
            share=sum(note.cpu_s for note in some) / total_s,
            of_limit=sum(note.least_s for note in some) / sum(note.cpu_s for note in some),
        )
        for name, some in of_kind.items()
        if some
    }
