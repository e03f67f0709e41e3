"""Whether weights and KV cache have room on a device, looked at before they are put there; and what is said if not."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from inference.engine.errors import ModelLoadError
from inference.host_memory import read_host_memory

MEND = "End what else takes memory there, lower kv_memory_bytes, or serve a smaller model or a smaller dtype."
MAX_SAID = 300
"""Characters of what another library said that are passed on."""
GIB = 2**30


def free_bytes(device: torch.device) -> int:
    """What is free on a device now. Raises ModelLoadError where the device has not even memory to say so."""
    if device.type != "cuda":
        return read_host_memory().available
    with explaining(f"The free memory of {device} cannot be read"):
        return torch.cuda.mem_get_info(device)[0]


def check_room(device: torch.device, *, weight_bytes: int, kv_bytes: int) -> None:
    """Raise ModelLoadError where more is asked for than is free. `kv_bytes` is 0 for a cache that takes the rest."""
    free = free_bytes(device)
    if weight_bytes + kv_bytes > free:
        cache = f" and the KV cache {kv_bytes / GIB:.2f} GiB" if kv_bytes else ""
        raise ModelLoadError(
            f"The weights take {weight_bytes / GIB:.2f} GiB{cache}, and {free / GIB:.2f} GiB of memory are free on "
            f"{device}. {MEND}"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short; torch has no one class for it."""
    said = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in said for words in ("out of memory", "DefaultCPUAllocator", "STATUS_ALLOC_FAILED"))
    )


@contextmanager
def explaining(what: str, mend: str = "") -> Iterator[None]:
    """Turn what fails here into a ModelLoadError that begins with `what`, and ends with what mends it.

    Whatever it is: what libraries raise over the content of a checkpoint derives from nothing in particular.
    """
    try:
        yield
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(f"{what}: {describe(error, mend)}") from error


def describe(error: Exception, mend: str = "") -> str:
    """What an error says, in one line, and what to do: `mend`, or what helps where memory is short."""
    if is_out_of_memory(error):
        return f"Memory is short. {MEND}"
    said, kind = " ".join(str(error).split())[:MAX_SAID].rstrip("."), type(error).__name__
    if " " not in said:  # the name of something that is missing, or nothing
        said = f"{kind}: {said}" if said else kind
    return f"{said}. {mend}".rstrip()
