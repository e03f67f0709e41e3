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
        isinstance(error, RuntimeError) and ("out of memory" in said or "DefaultCPUAllocator" in said)
    )


@contextmanager
def explaining(what: str) -> Iterator[None]:
    """Turn what fails here into a ModelLoadError that begins with `what`.

    Whatever it is: what libraries raise over the content of a checkpoint derives from nothing in particular.
    """
    try:
        yield
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(f"{what}: {describe(error)}") from error


def describe(error: Exception) -> str:
    """What an error says, in one line, or what to do where memory is short."""
    if is_out_of_memory(error):
        return f"Memory is short. {MEND}"
    return " ".join(str(error).split())[:MAX_SAID] or type(error).__name__
