"""A running request as its client's coroutine holds it."""

import asyncio
from collections.abc import Callable

from inference.gateway.errors import ClientGone
from inference.gateway.replies import Mailbox
from inference.gateway.served import ServedModel
from inference.messages import Finish, InferenceRequest
from scheduling.limits import Admission


class Reply:
    """Read it until `finish` is set; `abandon` it when the client has left."""

    def __init__(
        self,
        model: ServedModel,
        request: InferenceRequest,
        *,
        close: Callable[["Reply"], None],
        drain_time_s: Callable[[str, int], float],
    ) -> None:
        self.request = request
        self.model = model
        self.admission: Admission | None = None
        """What the tenant's limits answered; None for a request that was let in before, by its idempotency key."""
        self.mailbox = Mailbox(asyncio.get_running_loop().time())
        self.entered = False
        """Whether the request is in the queue, or was."""
        self.abandoned = False
        self.withdrawn = False
        """Whether it was let in for nothing, so that its tenant gets all of the charge back."""
        self._close = close
        self._drain_time_s = drain_time_s

    @property
    def is_shared(self) -> bool:
        """Whether others may wait for the same request, so that nobody who leaves cancels it."""
        return self.request.reply_to == self.request.id

    @property
    def retry_after_s(self) -> float:
        """When a request like this one will probably be let in again, where this one was dropped from the queue."""
        return self._drain_time_s(self.model.name, self.request.priority)

    async def read(self) -> str:
        """Wait for more text and take it. "" is a sign of life to pass on, or the end (`finish`).

        Raises GatewayError where the request ended without `finish`.
        """
        mailbox = self.mailbox
        await mailbox.wait()
        text = mailbox.take(asyncio.get_running_loop().time())
        if not text and mailbox.error is not None and mailbox.finish is None:
            raise mailbox.error
        return text

    async def read_all(self) -> str:
        """Wait for the end and take the whole text. Raises GatewayError where it ended without `finish`."""
        mailbox = self.mailbox
        mailbox.whole = True
        while mailbox.finish is None:
            await mailbox.wait()
            if mailbox.error is not None and mailbox.finish is None:
                raise mailbox.error
        return mailbox.take(asyncio.get_running_loop().time())

    @property
    def finish(self) -> Finish | None:
        """How it ended."""
        return self.mailbox.finish

    def withdraw(self) -> None:
        """`abandon`, since another answer to the same request was refused."""
        self.withdrawn = True
        self.abandon()

    def abandon(self) -> None:
        """Cancel unless it has ended, or others may wait for it. Returns at once."""
        if not self.abandoned:
            self.abandoned = True
            self.mailbox.fail(ClientGone())
            self._close(self)
