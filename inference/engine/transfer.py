"""Arrays on their way between host and device: many in one copy, which nobody waits for before it is needed."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

TYPES: dict[Any, torch.dtype] = {
    np.bool_: torch.bool,
    np.int32: torch.int32,
    np.int64: torch.int64,
    np.float32: torch.float32,
    np.float64: torch.float64,
}
ALIGN_BYTES = 16


def upload(arrays: Seq[npt.NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """Their like on the device, in their shapes and types; the arrays may change afterwards.

    On CUDA the copy is made from pinned memory, which torch gives to nobody else before it is over.
    """
    starts, end = [], 0
    for array in arrays:
        starts.append(end)
        end += -(-array.nbytes // ALIGN_BYTES) * ALIGN_BYTES
    staging = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda" and end > 0)
    for array, start in zip(arrays, starts, strict=True):
        room = staging.numpy()[start : start + array.nbytes]
        room.view(array.dtype).reshape(array.shape)[...] = array
    there = staging.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(TYPES[array.dtype.type]).view(array.shape)
        for array, start in zip(arrays, starts, strict=True)
    ]


def download(tensor: torch.Tensor) -> Callable[[], npt.NDArray[Any]]:
    """Begin to fetch a tensor; the call that is returned waits for it, and for nothing that was begun later."""
    if tensor.device.type == "cpu":
        return tensor.numpy
    here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    here.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> npt.NDArray[Any]:
        done.synchronize()
        return here.numpy()

    return wait
