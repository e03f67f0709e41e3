"""Sequences for planners under test, and a text stream for those whose text does not matter."""

from scheduling.core.sequence import SamplingParams, Sequence


def make_sequence(
    name: str, prompt: int = 4, output: int = 4, priority: int = 3, *, urgent: bool = False, failures: int = 0
) -> Sequence:
    return Sequence(
        id=name,
        attempt=1,
        tenant="t",
        priority=priority,
        arrival_s=0.0,
        tokens=[7 + i % 3 for i in range(prompt)],
        num_prompt_tokens=prompt,
        max_tokens=output,
        sampling=SamplingParams(),
        is_urgent=urgent,
        failures=failures,
    )


class SilentStream:
    """A text stream without text."""

    stopped = False

    def push(self, token_id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""
