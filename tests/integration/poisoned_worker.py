"""An engine process whose device is lost whenever a step holds the token POISON; run as the engine's command."""

import os
from collections.abc import Sequence

import inference.worker.__main__ as worker
from inference.engine.errors import DeviceLost
from inference.engine.runner import ModelRunner, Results
from scheduling.core.sequence import StepPart

POISON = 319


class PoisonedRunner(ModelRunner):
    """A real runner, until it is given the poison."""

    def start(self, parts: Sequence[StepPart]) -> Results:
        """Begin a step. Raises DeviceLost."""
        if any(part.sequence.tokens[0] == POISON for part in parts):
            raise DeviceLost
        return super().start(parts)


if __name__ == "__main__":
    vars(worker)["ModelRunner"] = PoisonedRunner
    os._exit(worker.main())
