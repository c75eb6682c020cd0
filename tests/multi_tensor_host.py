"""Stands in for the CUDA extension on tensors of the CPU: the same kernels, compiled with g++; and its C functions."""

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("g++")

ADDRESSES = (
    "records",
    "gradients",
    "averages",
    "chunks",
    "steps",
    "groups",
    "profiles",
    "policy",
    "partials",
    "counters",
    "norms",
)
COUNTS = ("num_tensors", "num_averages", "num_chunks")


class Tables(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ADDRESSES] + [(name, ctypes.c_int64) for name in COUNTS]


def build(folder: Path) -> ctypes.CDLL:
    """Compile the kernels for the host."""
    library = folder / "multi_tensor_host.so"
    flags = ("-std=c++20", "-O2", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC", "-pthread")
    flags += ("-fsanitize=alignment",)
    command = [
        COMPILER,
        *flags,
        f"-I{ROOT / 'csrc'}",
        str(ROOT / "tests" / "multi_tensor_host.cpp"),
        "-o",
        str(library),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def extension(library: ctypes.CDLL) -> SimpleNamespace:
    """What `soflow.kernels.multi_tensor` expects of the module _soflow_C."""
    calls: list[str] = []
    misaligned = library.misaligned()  # a failed test may have left some

    def norm(tables: Tables, device: int, stream: int) -> None:
        calls.append("norm")
        library.norm(ctypes.byref(tables))
        assert library.misaligned() == misaligned

    def update(tables: Tables, norm_known: bool, device: int, stream: int) -> None:
        calls.append("update")
        library.update(ctypes.byref(tables), ctypes.c_bool(norm_known))
        assert library.misaligned() == misaligned

    def write(to: int, words: Sequence[int], device: int, stream: int) -> None:
        calls.append("write")
        (ctypes.c_uint64 * len(words)).from_address(to)[:] = words

    chunk, max_averages = (ctypes.c_int64 * 2).in_dll(library, "kSizes")
    return SimpleNamespace(
        Tables=Tables, CHUNK=chunk, MAX_AVERAGES=max_averages, norm=norm, update=update, write=write, calls=calls
    )
