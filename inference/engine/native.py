"""Compiles `kernels/` for this machine at first use and binds it; None where there is no C compiler."""

import ctypes
import fcntl
import hashlib
import logging
import mmap
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch

from inference.engine.batch import StepBatch

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "kernels"
BUILD = Path(__file__).parent / "build"
FLAGS = (
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
    "-fopenmp-simd",
    "-pthread",
)
TIMEOUT_S = 120

Pointer = ctypes.c_void_p
Long = ctypes.c_long


WeightKind = Literal["float32", "bfloat16", "int8", "amx"]
"""How packed weights are kept. Arithmetic is float32, but `amx` rounds a layer's inputs to bfloat16, too."""
KINDS: tuple[WeightKind, ...] = get_args(WeightKind)
PANEL = 32
"""Outputs that lie together."""


class Linear(ctypes.Structure):
    """A linear layer over packed weights."""

    _fields_ = [
        *((name, Pointer) for name in ("weight", "scale", "bias")),
        *((name, Long) for name in ("inputs", "outputs", "kind")),
    ]


class Batch(ctypes.Structure):
    """Pointers into a StepBatch."""

    _fields_ = [
        *((name, Long) for name in ("num_tokens", "num_parts", "table_width", "num_rows")),
        *((name, Pointer) for name in ("token_ids", "positions", "slots", "rows")),
        *((name, Pointer) for name in ("query_starts", "context_lens", "block_tables", "part_of")),
    ]


class Heads(ctypes.Structure):
    """Shape and options of one layer's attention."""

    _fields_ = [
        *((name, Long) for name in ("heads", "kv_heads", "head_dim", "window")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


class Layer(ctypes.Structure):
    """A decoder layer of the Llama family."""

    _fields_ = [
        *((name, Pointer) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((name, Linear) for name in ("qkv", "output", "gate_up", "down")),
        ("heads", Heads),
        ("keys", Pointer),
        ("values", Pointer),
    ]


class Model(ctypes.Structure):
    """A model of the Llama family."""

    _fields_ = [
        ("num_layers", Long),
        ("hidden", Long),
        ("eps", ctypes.c_float),
        *((name, Pointer) for name in ("layers", "embedding", "cos", "sin", "norm")),
        ("lm_head", Linear),
    ]


class Space(ctypes.Structure):
    """Scratch of a forward pass, and where its logits go."""

    _fields_ = [(name, Pointer) for name in ("x", "normed", "wide", "inner", "logits")]


class BoundBatch:
    """A batch as the kernels read it; keeps the arrays alive."""

    def __init__(self, batch: StepBatch) -> None:
        self.batch = batch
        self.struct = Batch(
            num_tokens=len(batch.token_ids),
            num_parts=len(batch.context_lens),
            table_width=batch.block_tables.shape[1],
            num_rows=len(batch.sample_rows),
            token_ids=batch.token_ids.ctypes.data,
            positions=batch.positions.ctypes.data,
            slots=batch.slots.ctypes.data,
            rows=batch.sample_rows.ctypes.data,
            query_starts=batch.query_starts.ctypes.data,
            context_lens=batch.context_lens.ctypes.data,
            block_tables=batch.block_tables.ctypes.data,
            part_of=batch.part_of.ctypes.data,
        )
        self.address = ctypes.addressof(self.struct)


class PackedLinear(torch.nn.Module):
    """A linear layer on the CPU, float32 in and out, whose weights are laid out for our kernel."""

    def __init__(
        self, kernels: ctypes.CDLL, weight: torch.Tensor, bias: torch.Tensor | None, kind: WeightKind = "float32"
    ) -> None:
        """`weight` is [outputs, inputs]; it is copied, so the caller may drop it."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        width = -(-self.out_features // PANEL) * PANEL
        scale = torch.zeros(width) if kind == "int8" else None
        if scale is None:
            weight = weight.to(torch.float32 if kind == "float32" else torch.bfloat16)
        else:
            weight, scale[: self.out_features] = quantize(weight)
            scale *= 2.0**-24
        weight = weight.contiguous()
        whole = {"amx": 32, "int8": 2}.get(kind, 1)
        depth = -(-self.in_features // whole) * whole
        self._packed = large_empty(width * depth * weight.itemsize)
        kernels.pack(weight.data_ptr(), self.out_features, self.in_features, KINDS.index(kind), self._packed.data_ptr())
        self._scale = scale
        self._bias = bias.float().clone() if bias is not None else None
        self._linear = kernels.linear
        self.struct = Linear(
            self._packed.data_ptr(), _address(scale), _address(self._bias), self.in_features, self.out_features,
            KINDS.index(kind),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] to [..., outputs]."""
        x = x.contiguous()
        out = torch.empty((*x.shape[:-1], self.out_features))
        self._linear(ctypes.addressof(self.struct), x.data_ptr(), x.numel() // self.in_features, out.data_ptr())
        return out


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 weights [outputs, inputs] and the scale [outputs] that gives them back, symmetric around zero."""
    scale = weight.float().abs().amax(1) / 127
    divisor = torch.where(scale > 0, scale, 1)
    return (weight.float() / divisor[:, None]).round().to(torch.int8), scale


def large_empty(num_bytes: int) -> torch.Tensor:
    """Zeroed bytes on large pages where the system has them: small ones cost a pass over all weights a tenth."""
    memory = mmap.mmap(-1, max(num_bytes, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def load_kernels(compiler: str | None = None, build: Path | None = None) -> ctypes.CDLL | None:
    """The compiled kernels, built where this source was not yet built for this processor.

    `compiler` is a path; by default the first of cc, gcc and clang that is here. `build` is the folder; by default the
    first that may be written of: beside this module, the user's cache, the system's temporary folder.
    """
    compiler = compiler or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    library = _find_library(compiler, [build] if build else _build_folders())
    if library is None:
        return None
    try:
        kernels = ctypes.CDLL(str(library))
    except OSError:
        logger.warning("The compiled CPU kernels cannot be loaded; plain torch is used", exc_info=True)
        return None
    kernels.linear.argtypes = [Pointer, Pointer, Long, Pointer]
    kernels.pack.argtypes = [Pointer, Long, Long, Long, Pointer]
    kernels.paged_attention.argtypes = [Pointer] * 9
    kernels.llama_forward.argtypes = [Pointer] * 3
    kernels.set_threads.argtypes = [ctypes.c_int]
    for function in (kernels.set_threads, kernels.linear, kernels.pack, kernels.paged_attention, kernels.llama_forward):
        function.restype = None
    kernels.has_tiles.restype = ctypes.c_int
    return kernels


def _build_folders() -> list[Path]:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expandvars("$HOME/.cache")
    temporary = Path(tempfile.gettempdir()) / f"penstock-kernels-{os.getuid()}"
    return [BUILD, *([Path(cache) / "penstock-kernels"] if Path(cache).is_absolute() else []), temporary]


def _find_library(compiler: str | None, folders: list[Path]) -> Path | None:
    """A library built before, else a new one in the first folder that takes it."""
    name = f"kernels-{_fingerprint()}.so"
    trusted = [folder for folder in folders if not folder.exists() or _is_ours(folder)]
    for folder in trusted:
        if (folder / name).is_file() and _is_ours(folder):  # it may have been made only now
            return folder / name
    if compiler is None:
        logger.warning("The CPU kernels cannot be compiled, there is no C compiler; plain torch is used")
        return None
    for folder in trusted:
        if _can_write(folder):
            return folder / name if _compile(compiler, folder / name) else None
    logger.warning("The CPU kernels cannot be compiled, no folder for them may be written; plain torch is used")
    return None


def _is_ours(folder: Path) -> bool:
    """Whether nobody else but root can have put code there that we would load."""
    status = folder.lstat()
    others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(status.st_mode) and status.st_uid in (0, os.getuid()) and not others_write


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return _is_ours(folder)
    except OSError:
        return False


def _fingerprint() -> str:
    """Changes with the source, the flags and the processor; not with the system's version."""
    flags = ""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        flags = next((line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
    key = "\n".join((platform.system(), platform.machine(), platform.processor(), flags, *FLAGS))
    source = b"".join(file.read_bytes() for file in sorted(SOURCES.iterdir()))
    return hashlib.sha256(key.encode() + source).hexdigest()[:16]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _compile(compiler: str, library: Path) -> bool:
    """Build aside and move into place. Of processes that start together one builds and the others wait for it."""
    try:
        with _locked(library.parent), tempfile.TemporaryDirectory(dir=library.parent) as folder:
            if library.is_file():
                return True
            out = Path(folder) / library.name
            command = [compiler, *FLAGS, *map(str, sorted(SOURCES.glob("*.c"))), "-o", str(out), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
            if done.returncode == 0:
                out.replace(library)
                return True
            logger.warning("The CPU kernels cannot be compiled; plain torch is used: %s", done.stderr.strip()[:500])
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.warning("The CPU kernels cannot be compiled; plain torch is used: %s", error)
    return False
