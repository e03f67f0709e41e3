"""What can go wrong in the engine."""


class EngineError(Exception):
    """The engine failed."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())


class ModelLoadError(EngineError):
    """The checkpoint cannot be served; the message says why and what to do."""


class OutOfDeviceMemory(EngineError):  # noqa: N818
    """The device ran out of memory in a forward pass. Nothing was sampled; plan a smaller step and try again."""


class DeviceStarved(EngineError):  # noqa: N818
    """The device has no memory left, not for the smallest step of any request. Something else takes it."""


class DeviceLost(EngineError):  # noqa: N818
    """The device failed and takes no more work from this process."""


class InvalidPart(EngineError):  # noqa: N818
    """A part of a step cannot be computed; the others can."""
