"""Is every fused op faster than eager PyTorch and than torch.compile, and how near to the memory roofline?

    python -m bench.kernels [--json FILE] [--quick]

Needs a GPU. A row per op and shape: milliseconds of the fused op, of the reference run eagerly and of the reference
compiled, forward and forward + backward, captured and measured by turns in one run (median, cold L2), and the GB/s of
the fused op for the bytes it must move at least, also as a fraction of what a copy of as many bytes reaches in the same
turns: what is small pays for its launch, and for the full L2 that it finds, as that copy does. An op whose result is
not that of the reference is not timed, and the exit code is 1. `uniform` and `normal` have no row: what they compute is
half of `draw`.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.figures import keep
from bench.resources import BATCH_SIZE, LATENT, NUM_CONSISTENCY, SHAPES
from bench.timing import median_ms
from soflow import kernels
from soflow.kernels import reference

# a fused op is compared with the reference in bf16: this many units of rounding of its largest value
ROUNDING_UNITS = 8
PIXELS = (128, 32, 32)
DEVICE = "cuda"


@dataclass(frozen=True)
class Workload:
    """An op with its inputs, those a gradient flows to, and the bytes it must move at least."""

    op: str
    shape: str
    inputs: tuple[Any, ...]
    gradients: tuple[int, ...]
    forward_bytes: int
    backward_bytes: int


@dataclass(frozen=True)
class Timing:
    """Medians in milliseconds, and the fused op's rate in GB/s. copy_ms: of a copy of as many bytes."""

    op: str
    shape: str
    direction: str
    fused_ms: float
    eager_ms: float
    compiled_ms: float
    copy_ms: float
    fused_gb_per_s: float
    fraction_of_copy: float


def copy_bandwidth() -> float:
    """Return the GB/s, read and written, of copying 1 GiB."""
    from triton.testing import do_bench

    source = torch.empty(2**30, device=DEVICE, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / do_bench(lambda: target.copy_(source), return_mode="median") / 1e6


def network_workloads(shape: str, T: int, D: int, num_heads: int) -> list[Workload]:
    """Return the ops of one block as bf16 trains it: residual stream and modulations float32, branches bfloat16."""
    half = torch.bfloat16

    def activations(B: int, width: int, dtype: torch.dtype = half) -> Tensor:
        return torch.randn(B, T, width, device=DEVICE, dtype=dtype)

    def modulation(B: int) -> tuple[Tensor, ...]:
        return torch.randn(B, 6 * D, device=DEVICE).chunk(6, dim=1)

    x, (a, b, c, *_) = activations(BATCH_SIZE, D, torch.float32), modulation(BATCH_SIZE)
    d, (da, db, dc, *_) = activations(NUM_CONSISTENCY, D, torch.float32), modulation(NUM_CONSISTENCY)
    y, dy = activations(BATCH_SIZE, D), 1e-3 * activations(NUM_CONSISTENCY, D)
    small, eps = 1e-3 * d, 1e-6
    elements, few, wide = x.numel(), d.numel(), activations(BATCH_SIZE, 4 * D)
    qkv = activations(NUM_CONSISTENCY, 3 * D)
    wide_d, bias = activations(NUM_CONSISTENCY, 4 * D), torch.randn(4 * D, device=DEVICE, dtype=half)
    return [
        Workload("modulated_norm", shape, (x, a, b, eps, half), (0, 1, 2), 6 * elements, 10 * elements),
        Workload(
            "gate_residual_norm", shape, (x, y, a, b, c, eps, half), (0, 1, 2, 3, 4), 12 * elements, 18 * elements
        ),
        Workload("modulated_norm_difference", shape, (d, small, da, db, dc, eps, half), (), 10 * few, 0),
        Workload(
            "gate_residual_norm_difference",
            shape,
            (y[:NUM_CONSISTENCY], da, d, db, small, dy, da, db, dc, eps, half),
            (),
            18 * few,
            0,
        ),
        Workload("gelu", shape, (wide, bias), (0, 1), 4 * wide.numel(), 6 * wide.numel()),
        Workload("attention_difference", shape, (qkv, 1e-3 * qkv, num_heads), (), 14 * few, 0),
        Workload("gelu_difference", shape, (wide_d, 1e-3 * wide_d, bias), (), 6 * wide_d.numel(), 0),
    ]


def unet_workloads() -> list[Workload]:
    """Return the activation of a U-Net in fp32, at the width and size of its first level."""
    x = torch.randn(BATCH_SIZE, *PIXELS, device=DEVICE)
    d = torch.randn(NUM_CONSISTENCY, *PIXELS, device=DEVICE)
    n, m = 4 * x.numel(), 4 * d.numel()
    shape = "x".join(map(str, PIXELS))
    return [
        Workload("silu", shape, (x,), (0,), 2 * n, 3 * n),
        Workload("silu_difference", shape, (d, 1e-3 * d), (), 3 * m, 0),
    ]


def point_workloads() -> list[Workload]:
    """Return the ops of the training point and the loss in fp32."""
    x, x_1 = torch.randn(2, BATCH_SIZE, *LATENT, device=DEVICE)
    d = torch.randn(NUM_CONSISTENCY, *LATENT, device=DEVICE)
    rows = torch.rand(BATCH_SIZE, device=DEVICE) + 0.1
    keys = torch.arange(BATCH_SIZE, device=DEVICE)
    table = torch.randn(BATCH_SIZE, 4, device=DEVICE)
    n, m = 4 * x.numel(), 4 * d.numel()
    shape = "latents 4x32x32"
    return [
        Workload("draw", shape, (x, x.abs(), keys, keys, keys), (), 4 * n, 0),
        Workload("interpolate", shape, (x, x_1, rows, rows, rows, rows), (), 4 * n, 0),
        Workload("look_ahead", shape, (x, x_1, d, rows, rows, rows[:NUM_CONSISTENCY]), (), 3 * n + 2 * m, 0),
        Workload("solution_loss", shape, (x, d, x_1, x, table, rows, rows, 1.0, 0.01), (0,), 4 * n + m, 2 * n),
    ]


def _calls(work: Workload, op: Callable[..., Any]) -> tuple[Callable[[], Any], Callable[[], Any] | None]:
    """Forward, and forward + backward (None without a gradient), as functions without arguments."""
    leaves = [
        x.detach().requires_grad_(i in work.gradients) if isinstance(x, Tensor) and x.is_floating_point() else x
        for i, x in enumerate(work.inputs)
    ]

    def forward() -> Any:
        return op(*leaves)

    if not work.gradients:
        return forward, None
    outputs = _tensors(forward())
    grads = [torch.randn_like(out) for out in outputs if out.requires_grad]
    inputs = [leaves[i] for i in work.gradients]

    def both() -> Any:
        return torch.autograd.grad([out for out in _tensors(op(*leaves)) if out.requires_grad], inputs, grads)

    return forward, both


def _copy_of(volume: int) -> Callable[[], Any]:
    """A copy that reads and writes so many bytes together."""
    source = torch.zeros(volume // 2, device=DEVICE, dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _tensors(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def difference_from_reference(work: Workload) -> str | None:
    """Return what is wrong where the fused op does not give what the reference gives, to rounding; else None."""
    ours, theirs = (_tensors(getattr(ops, work.op)(*work.inputs)) for ops in (kernels, reference))
    for a, b in zip(ours, theirs, strict=True):
        error, size = (a - b).abs().max().item(), b.abs().max().item()
        if not error <= ROUNDING_UNITS * torch.finfo(b.dtype).eps * size:
            return f"{work.op}, {work.shape}: off by {error:.3g} of {size:.3g}"
    return None


def measure(work: Workload, milliseconds: float) -> list[Timing]:
    """Return the timings of one op, forward and forward + backward: each way by turns, captured."""
    torch._dynamo.reset()
    ways = {
        "fused": getattr(kernels, work.op),
        "eager": getattr(reference, work.op),
        "compiled": torch.compile(getattr(reference, work.op), dynamic=False),
    }
    timings = []
    for index, (direction, volume) in enumerate(
        (("forward", work.forward_bytes), ("forward + backward", work.forward_bytes + work.backward_bytes))
    ):
        calls = {name: call for name, op in ways.items() if (call := _calls(work, op)[index]) is not None}
        if calls:
            ms = median_ms(calls | {"copy": _copy_of(volume)}, milliseconds)
            times = ms["fused"], ms["eager"], ms["compiled"], ms["copy"]
            rate = volume / ms["fused"] / 1e6
            timings.append(Timing(work.op, work.shape, direction, *times, rate, ms["copy"] / ms["fused"]))
    return timings


def main() -> int:
    """Print the table, then one line of JSON, or what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--quick", action="store_true", help="two shapes, shorter rounds")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: got no GPU, expected one: bench.kernels times kernels", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    shapes = {name: SHAPES[name] for name in ("DiT-B/4", "DiT-XL/2")} if args.quick else SHAPES
    rows: list[Timing] = []
    wrong: list[str] = []
    result = {"gpu": torch.cuda.get_device_name(), "copy_gb_per_s": copy_bandwidth(), "wrong": wrong}
    header = ("op", "shape", "direction", "fused ms", "eager x", "compiled x", "GB/s", "of copy")
    print("{:32}{:18}{:20}{:>10}{:>9}{:>11}{:>8}{:>9}".format(*header))
    for make in (
        point_workloads,
        unet_workloads,
        *(lambda n=n, s=s: network_workloads(n, *s) for n, s in shapes.items()),
    ):
        for work in make():
            complaint = difference_from_reference(work)
            if complaint is not None:
                wrong.append(complaint)
                print(f"{complaint}: not timed", flush=True)
            for row in measure(work, 20 if args.quick else 60) if complaint is None else ():
                rows.append(row)
                ratios = row.eager_ms / row.fused_ms, row.compiled_ms / row.fused_ms
                print(
                    f"{row.op:32}{row.shape:18}{row.direction:20}{row.fused_ms:10.4f}{ratios[0]:9.2f}{ratios[1]:11.2f}"
                    f"{row.fused_gb_per_s:8.0f}{row.fraction_of_copy:9.2f}",
                    flush=True,
                )
            result["rows"] = [asdict(row) for row in rows]
            keep(args.json, result)
    if args.json is None:
        print(json.dumps(result))
    for complaint in wrong:
        print(f"wrong: {complaint}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
