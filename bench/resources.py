"""What every kernel needs of the hardware: registers, instructions, shared memory, spills, and how wide it accesses.

    python -m bench.resources [--json] [--only NAME]

Needs Triton but no GPU: the launchers run on tensors without storage, at the shapes of the official models, and what
they would launch is compiled instead, for sm_80, sm_90 and sm_100. A row per kernel, shape and architecture; exits 1
when a kernel spills, needs more shared or tensor memory than a program may have, or moves more than a quarter of its
bytes by accesses below 16 bytes, as it would when Triton can no longer tell that a tensor's rows are aligned.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from soflow.kernels import activation, adaln, adaln_pair, attention_pair, loss, point, self_attention

MODULES: tuple[ModuleType, ...] = (activation, adaln, adaln_pair, attention_pair, loss, point, self_attention)
ARCHITECTURES = (80, 90, 100)
# bytes a program may have: 163 KiB on sm_80, 227 KiB on sm_90 and sm_100; columns of tensor memory on sm_100
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_MEMORY_LIMIT = 512
BATCH_SIZE, NUM_CONSISTENCY = 256, 64
# tokens, width and heads of the official networks
SHAPES = {
    "DiT-B/4": (64, 768, 12),
    "DiT-B/2": (256, 768, 12),
    "DiT-L/2": (256, 1024, 16),
    "DiT-XL/2": (256, 1152, 16),
}
# where attention is compiled in float32 too, which makes another code of its products: 64 tokens, and the widest heads
FLOAT32_SHAPES = ("DiT-B/4", "DiT-XL/2")
LATENT = (4, 32, 32)
# a number or three per row, which no thread can access 16 bytes of
FEW_NUMBERS = "1 and 3 per row"
WIDE = 16
# bytes of scalars that a program may load beside its rows: the keys of a draw, three of 8 bytes
SCALARS = 24
# accesses of global memory in PTX: width and bits of loads and stores, bytes of asynchronous copies
ACCESS = re.compile(r"\b(?:ld|st)\.[\w.:]*?global[\w.:]*?(?:\.v(\d))?\.[busf](\d+)\b")
COPY = re.compile(r"\bcp\.async\.\w+\.shared\.global\S*\s+\[[^]]*\],\s*\[[^]]*\],\s*(\w+)")
# one of the disassembly, but for what fills the last line
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?!NOP\b)\S", re.MULTILINE)
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """What a launcher asked for: the kernel, the type of each argument, constants, and the options of the compiler."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Resources:
    """What the compiler says of one kernel, shape and architecture.

    warps: of a program.  instructions: of the machine's code, every one counted once.  shared: bytes; spills: bytes of
    local memory.  moved: bytes that a thread loads from global memory or stores there, every instruction counted once;
    narrow: those of them by accesses below 16 bytes, scalars of a row included.
    """

    kernel: str
    shape: str
    arch: str
    warps: int
    registers: int
    instructions: int
    shared: int
    spills: int
    tensor_memory: int
    moved: int
    narrow: int


class _Recorder:
    """Stands in for a kernel: kernel[grid](...) is written down instead of run."""

    def __init__(self, kernel: JITFunction, launches: list[Launch]) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._record

    def _record(self, *arguments: Any, **keywords: Any) -> None:
        names = [parameter.name for parameter in self.kernel.params]
        options = {name: keywords.pop(name) for name in ("num_warps", "num_stages") if name in keywords}
        values = {**dict(zip(names, arguments, strict=False)), **keywords}
        signature, constants, divisible = [], [], []
        for index, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            kind = "constexpr" if parameter.is_constexpr or (type(value) is int and value == 1) else _kind(value)
            signature.append((parameter.name, kind))
            if kind == "constexpr":
                constants.append((parameter.name, value))
            elif isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                divisible.append(index)
        self.launches.append(
            Launch(self.kernel, tuple(signature), tuple(constants), tuple(divisible), tuple(options.items()))
        )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Yield a list to which every launch of our kernels is appended while the block runs, instead of running."""
    launches: list[Launch] = []
    kernels = [(m, name, k) for m in MODULES for name, k in vars(m).items() if isinstance(k, JITFunction)]
    for module, name, kernel in kernels:
        setattr(module, name, _Recorder(kernel, launches))
    try:
        yield launches
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


def launch_network(
    T: int, D: int, num_heads: int, batch_size: int = BATCH_SIZE, num_consistency: int = NUM_CONSISTENCY
) -> None:
    """Call every launcher that one block of a network of T tokens, width D and so many heads needs, as bf16 trains it.

    The residual stream and the modulations are float32, what the branches read and write bfloat16.
    """
    half = torch.bfloat16

    def activations(B: int, width: int, dtype: torch.dtype = half) -> Tensor:
        return torch.empty(B, T, width, device="meta", dtype=dtype)

    def modulation(B: int) -> list[Tensor]:
        return list(torch.empty(B, 6 * D, device="meta").chunk(6, dim=1))

    x, (a, b, c, *_) = activations(batch_size, D, torch.float32), modulation(batch_size)
    d, (da, db, dc, *_) = activations(num_consistency, D, torch.float32), modulation(num_consistency)
    y, dy = activations(batch_size, D), activations(num_consistency, D)
    eps = 1e-6
    h, mean, rstd = adaln._launch_modulated_norm_fwd(x, a, b, eps, half)
    adaln._launch_modulated_norm_bwd(x, b, mean, rstd, h)
    adaln_pair._launch_modulated_norm_difference(d, d, da, db, dc, eps, half)
    z, h, mean, rstd = adaln._launch_gate_residual_norm_fwd(x, y, a, b, c, eps, half)
    adaln._launch_gate_residual_norm_bwd(y, a, z, b, mean, rstd, z, h)
    adaln_pair._launch_gate_residual_norm_difference(dy, da, d, db, d, dy, da, db, dc, eps, half)
    wide, bias = activations(batch_size, 4 * D), torch.empty(4 * D, device="meta", dtype=half)
    activation._launch_gelu_fwd(wide, bias)
    activation._launch_gelu_bwd(wide, bias, wide)
    activation._launch_gelu_difference(activations(num_consistency, 4 * D), activations(num_consistency, 4 * D), bias)
    launch_attention(T, D, num_heads, half, batch_size)
    activation._launch_silu_fwd(a.contiguous())
    activation._launch_silu_bwd(a.contiguous(), a.contiguous())
    activation._launch_silu_difference(da.contiguous(), da.contiguous())


def launch_attention(T: int, D: int, num_heads: int, dtype: torch.dtype, batch_size: int = BATCH_SIZE) -> None:
    """Call every launcher of attention, whose products have their inputs in `dtype`."""
    qkv = torch.empty(batch_size, T, 3 * D, device="meta", dtype=dtype)
    o, lse = self_attention._launch_attention_fwd(qkv, num_heads)
    self_attention._launch_attention_bwd(qkv, o, lse, o, num_heads)
    attention_pair._launch_attention_difference(qkv, qkv, num_heads)


def launch_few_numbers() -> None:
    """Call the launchers that draw what a row needs beside its noise: times, and whether to drop the label."""
    keys = torch.empty(BATCH_SIZE, device="meta", dtype=torch.int64)
    point._launch_uniform(keys, keys, 3, keys, 1)
    point._launch_normal(keys, keys, 2, keys, 3)


def launch_point(
    shape: tuple[int, ...] = LATENT, batch_size: int = BATCH_SIZE, num_consistency: int = NUM_CONSISTENCY
) -> None:
    """Call every launcher of the training point and the loss, for samples of that shape, in fp32."""
    x = torch.empty(batch_size, *shape, device="meta")
    d = torch.empty(num_consistency, *shape, device="meta")
    rows = torch.empty(batch_size, device="meta")
    keys = torch.empty(batch_size, device="meta", dtype=torch.int64)
    point._launch_uniform(keys, keys, 3, keys, x[0].numel())
    point._launch_normal(keys, keys, 2, keys, x[0].numel())
    point._launch_draw(x, x, keys, keys, keys)
    point._launch_interpolate(x, x, rows, rows, rows, rows)
    dt = torch.empty(num_consistency, device="meta")
    point._launch_look_ahead(x, x, d, rows, rows, dt)
    point._launch_look_ahead(x, x, None, rows, rows, dt)
    coefficients = torch.empty(batch_size, 4, device="meta")
    for dtype in (torch.float32, torch.bfloat16):
        loss._launch_solution_loss(x.to(dtype), d.to(dtype), x, x, coefficients, rows, rows, 1.0, 0.01)


def compile_launch(launch: Launch, arch: int) -> dict[str, int]:
    """Return what `Resources` has in numbers, of a launch on sm_`arch`."""
    names = [name for name, _ in launch.signature]
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        constexprs={(names.index(name),): value for name, value in launch.constants},
        attrs={(index,): [["tt.divisibility", 16]] for index in launch.divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report, code = _tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", file.name)
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    sizes = access_sizes(compiled.asm["ptx"])
    return {
        "warps": compiled.metadata.num_warps,
        "registers": usage["REG"],
        "instructions": len(INSTRUCTION.findall(code)),
        "shared": compiled.metadata.shared,
        "spills": usage["STACK"] + usage["LOCAL"],
        "tensor_memory": getattr(compiled.metadata, "tmem_size", None) or 0,
        "moved": sum(sizes),
        "narrow": sum(size for size in sizes if size < WIDE),
    }


def access_sizes(ptx: str) -> list[int]:
    """Return the bytes of each access of a thread to global memory that there is in the code."""
    sizes = [int(width or 1) * int(bits) // 8 for width, bits in ACCESS.findall(ptx)]
    return sizes + [int(size, 0) for size in COPY.findall(ptx)]


def _tool(name: str, *arguments: str) -> str:
    """Return what a program that comes with Triton prints."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def measure(only: str = "") -> list[Resources]:
    """Return a row for every kernel whose name contains `only`, distinct launch and architecture."""
    runs: dict[str, Callable[[], None]] = {name: partial(launch_network, *shape) for name, shape in SHAPES.items()}
    for name in FLOAT32_SHAPES:
        runs[f"{name} float32"] = partial(launch_attention, *SHAPES[name], torch.float32)
    runs["latents 4x32x32"] = launch_point
    runs[FEW_NUMBERS] = launch_few_numbers
    shapes: dict[Launch, list[str]] = {}
    for shape, run in runs.items():
        with recorded_launches() as launches:
            run()
        for launch in launches:
            if only in launch.kernel.__name__ and shape not in shapes.setdefault(launch, []):
                shapes[launch].append(shape)
    return [
        Resources(launch.kernel.__name__, ", ".join(names), f"sm_{arch}", **compile_launch(launch, arch))
        for launch, names in shapes.items()
        for arch in ARCHITECTURES
    ]


def failures(rows: list[Resources]) -> list[str]:
    """Return a line for every row that spills, needs more than the architecture has or is mostly narrow."""
    lines = []
    for row in rows:
        limit = SHARED_LIMIT[int(row.arch.removeprefix("sm_"))]
        for name, value, allowed in (
            ("spills", row.spills, 0),
            ("shared", row.shared, limit),
            ("tensor_memory", row.tensor_memory, TENSOR_MEMORY_LIMIT),
            ("narrow", row.narrow, row.moved if row.shape == FEW_NUMBERS else max(SCALARS, row.moved // 4)),
        ):
            if value > allowed:
                lines.append(f"{row.kernel}, {row.shape}, {row.arch}: {name} {value}, expected at most {allowed}")
    return lines


def main() -> int:
    """Print the table, write it as JSON where asked, and return 1 when a kernel needs more than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON, not as a table")
    parser.add_argument("--only", default="", metavar="NAME", help="kernels whose name contains NAME")
    args = parser.parse_args()
    rows = measure(args.only)
    if args.json:
        print(json.dumps([{**asdict(row), "triton": triton.__version__} for row in rows], indent=1))
    else:
        numbers = ("warps", "registers", "instructions", "shared", "spills", "moved", "narrow")
        print(f"{'kernel':42}{'arch':8}" + "".join(f"{name:>14}" for name in numbers) + "  shape")
        for row in rows:
            print(f"{row.kernel:42}{row.arch:8}" + "".join(f"{getattr(row, n):14}" for n in numbers) + f"  {row.shape}")
    bad = failures(rows)
    print("\n".join(bad), file=sys.stderr, end="\n" if bad else "")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
