"""Compiles `kernels.c` for this machine at first use and binds it; None where there is no C compiler."""

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from inference.engine.batch import StepBatch

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "kernels.c"
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


class Linear(ctypes.Structure):
    """A linear layer over packed weights."""

    _fields_ = [("weight", Pointer), ("bias", Pointer), ("inputs", Long), ("outputs", Long)]


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
    """A float32 linear layer on the CPU whose weights are laid out for our kernel; one set or several side by side."""

    def __init__(self, kernels: ctypes.CDLL, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """`weight` is [outputs, inputs]; it is copied, so the caller may drop it."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        weight = weight.contiguous()
        panels = -(-self.out_features // 32)
        self._packed = torch.empty(panels * self.in_features * 32)
        kernels.pack(weight.data_ptr(), self.out_features, self.in_features, self._packed.data_ptr())
        self._bias = bias.clone() if bias is not None else None
        self._linear = kernels.linear
        self.struct = Linear(
            self._packed.data_ptr(), self._bias.data_ptr() if self._bias is not None else None, self.in_features,
            self.out_features,
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] to [..., outputs]."""
        x = x.contiguous()
        out = torch.empty((*x.shape[:-1], self.out_features))
        self._linear(ctypes.addressof(self.struct), x.data_ptr(), x.numel() // self.in_features, out.data_ptr())
        return out


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
    kernels.pack.argtypes = [Pointer, Long, Long, Pointer]
    kernels.paged_attention.argtypes = [Pointer] * 9
    kernels.llama_forward.argtypes = [Pointer] * 3
    kernels.set_threads.argtypes = [ctypes.c_int]
    for function in (kernels.set_threads, kernels.linear, kernels.pack, kernels.paged_attention, kernels.llama_forward):
        function.restype = None
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
        if (folder / name).is_file():
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
    return hashlib.sha256(key.encode() + SOURCE.read_bytes()).hexdigest()[:16]


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
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(out), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
            if done.returncode == 0:
                out.replace(library)
                return True
            logger.warning("The CPU kernels cannot be compiled; plain torch is used: %s", done.stderr.strip()[:500])
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.warning("The CPU kernels cannot be compiled; plain torch is used: %s", error)
    return False
