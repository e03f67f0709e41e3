"""What can go wrong with an in-process batcher."""


class BatcherError(Exception):
    """The batcher cannot take or answer this request."""


class BatcherClosedError(BatcherError):
    """Requests are taken only inside the batcher's `async with`."""

    def __init__(self) -> None:
        super().__init__(self.__doc__)


class BatcherFullError(BatcherError):
    """As many requests wait as the batcher may hold."""

    def __init__(self, max_waiting: int) -> None:
        super().__init__(f"{max_waiting} requests wait already; no more are taken until some have run.")


class BatcherRequestError(BatcherError):
    """What is said of a request cannot be used; the message says which, and what can."""


class BatchResultError(BatcherError):
    """The batch function gave another number of results than it got requests."""

    def __init__(self, num_requests: int, num_results: int) -> None:
        super().__init__(f"The batch function got {num_requests} requests and gave {num_results} results.")
