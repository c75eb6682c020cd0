"""Which attention is fastest at the shapes of the networks, and what does the look-ahead cost beside it?

    python -m bench.attention [--json FILE] [--quick]

Needs a GPU. First table: attention on packed qkv in bf16, forward and forward + backward, by our kernels and by each
backend of PyTorch's scaled_dot_product_attention, medians of captured calls by turns in one run, cold L2: what
`soflow.kernels.tuning.attention_is_fused` waits for. PyTorch's backward adds with atomics; "ordered" is without, as a
training has it (`engine.deterministic`), which cudnn refuses. A way whose result is not that of float32 is not timed.

Second table: the joint call of a network (F of every row with gradient, the difference of a quarter of them riding
along) against what it replaces: F with gradient, and another evaluation of that quarter. bf16, forward only.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.figures import keep
from bench.timing import median_ms
from soflow import kernels
from soflow.determinism import choose_algorithms
from soflow.kernels import reference, self_attention
from soflow.models import build_network
from soflow.precision import working_copy

# batch, tokens, heads, numbers per head: B/4, B/2, L/2, XL/2
SHAPES = ((256, 64, 12, 64), (256, 256, 12, 64), (256, 256, 16, 64), (256, 256, 16, 72))
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
ORDERED = ", ordered"
NETWORKS = ("DiT-B/4", "DiT-B/2")
# of bf16, whose largest outputs the float32 ones are compared with
TOLERANCE = 0.02
DEVICE = "cuda"


def ways(num_heads: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return attention of packed qkv by name: ours, and every backend of PyTorch, as it comes and ordered."""

    def library(backend: SDPBackend) -> Callable[[Tensor], Tensor]:
        def attention(qkv: Tensor) -> Tensor:
            with sdpa_kernel([backend]):
                return reference.attention(qkv, num_heads)

        return attention

    ours = {"ours": lambda qkv: self_attention._Attention.apply(qkv, num_heads)}
    theirs = {name: library(backend) for name, backend in BACKENDS.items()}
    return ours | theirs | {name + ORDERED: way for name, way in theirs.items()}


def obstacle(way: Callable[[Tensor], Tensor], qkv: Tensor, do: Tensor, exact: tuple[Tensor, ...]) -> str | None:
    """Return why a way cannot be timed: it refuses the shape, or is wrong; else None."""
    leaf = qkv.detach().requires_grad_()
    try:
        o = way(leaf)
        (dqkv,) = torch.autograd.grad(o, leaf, do)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    for ours, true in zip((o, dqkv), exact, strict=True):
        off = ((ours.float() - true).norm() / true.norm()).item()
        if not off < TOLERANCE:
            return f"wrong: off by {off:.2g}"
    return None


def measure_attention(shape: tuple[int, int, int, int], milliseconds: float) -> list[dict[str, Any]]:
    """Return one record per way: milliseconds forward and forward + backward, or why there are none."""
    B, T, num_heads, head_dim = shape
    qkv = torch.randn(B, T, 3 * num_heads * head_dim, device=DEVICE, dtype=torch.bfloat16)
    do = torch.randn(B, T, num_heads * head_dim, device=DEVICE, dtype=torch.bfloat16)
    wide = qkv.float().requires_grad_()
    o = reference.attention(wide, num_heads)
    exact = (o.detach(), *torch.autograd.grad(o, wide, do.float()))
    records: dict[str, dict[str, Any]] = {}
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, way in ways(num_heads).items():
        # read when a call is captured, which a replay keeps
        choose = partial(choose_algorithms, same_bits=name.endswith(ORDERED))
        choose()
        records[name] = {"shape": shape, "way": name, "obstacle": obstacle(way, qkv, do, exact)}
        if records[name]["obstacle"] is None:
            leaf = qkv.detach().requires_grad_()
            calls[name, "forward_ms"] = partial(_forward, choose, way, qkv)
            calls[name, "both_ms"] = partial(_both, choose, way, leaf, do)
    for (name, column), ms in median_ms(calls, milliseconds).items():
        records[name][column] = ms
    return list(records.values())


def _forward(choose: Callable[[], None], way: Callable[[Tensor], Tensor], qkv: Tensor) -> Tensor:
    choose()
    return way(qkv)


def _both(choose: Callable[[], None], way: Callable[[Tensor], Tensor], leaf: Tensor, do: Tensor) -> tuple[Tensor, ...]:
    choose()
    return torch.autograd.grad(way(leaf), leaf, do)


def measure_joint_call(name: str, batch_size: int, milliseconds: float) -> dict[str, Any]:
    """Return milliseconds of the joint call, of both evaluations it replaces, and of the one with gradient alone."""
    with torch.device(DEVICE):
        master = build_network(name, num_classes=1000, ops=kernels)
        network, _ = working_copy(master, "bf16")
        x, v = torch.randn(2, batch_size, 4, 32, 32)
        t, s = torch.full((batch_size,), 0.6), torch.full((batch_size,), 0.2)
        labels = torch.arange(batch_size) % 1000
    moved = batch_size - batch_size // 4
    dt = 0.01 * (s - t)[moved:]
    dx = v[moved:] * dt[:, None, None, None]

    def separate() -> None:
        network(x, t, s, labels)
        with torch.no_grad():
            network(x[moved:] + dx, t[moved:] + dt, s[moved:], labels[moved:])

    calls: dict[tuple[str, str], Callable[[], Any]] = {
        (name, "joint_ms"): lambda: network.forward_difference(x, dx, t, dt, s, labels),
        (name, "separate_ms"): separate,
        (name, "alone_ms"): lambda: network(x, t, s, labels),
    }
    return {"network": name, "batch_size": batch_size} | {
        column: ms for (_, column), ms in median_ms(calls, milliseconds).items()
    }


def main() -> int:
    """Print both tables, then one line of JSON, or what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="shorter rounds, the joint call of one network")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: got no GPU, expected one: bench.attention times kernels", file=sys.stderr)
        return 2
    # PyTorch asks before its first product
    choose_algorithms(same_bits=False)
    torch.manual_seed(0)
    milliseconds = 20 if args.quick else 100
    rows: list[dict[str, Any]] = []
    joint: list[dict[str, Any]] = []
    record = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "attention": rows, "joint": joint}

    print(f"{'B, T, heads, d':20}{'way':20}{'forward ms':>12}{'+ backward':>12}")
    for shape in SHAPES:
        for row in measure_attention(shape, milliseconds):
            rows.append(row)
            times = "".join(f"{row[column]:12.4f}" for column in ("forward_ms", "both_ms") if column in row)
            print(f"{', '.join(map(str, shape)):20}{row['way']:20}{times or row['obstacle']}", flush=True)
        keep(args.json, record)
    print(f"{'network':20}{'joint ms':>12}{'separate':>12}{'alone':>12}")
    for name in NETWORKS[: 1 if args.quick else None]:
        row = measure_joint_call(name, 256, milliseconds)
        joint.append(row)
        print(f"{name:20}{row['joint_ms']:12.3f}{row['separate_ms']:12.3f}{row['alone_ms']:12.3f}", flush=True)
        keep(args.json, record)
    if args.json is None:
        print(json.dumps(record))
    bad = [row for row in rows if row["obstacle"] and (row["way"] == "ours" or row["obstacle"].startswith("wrong"))]
    for row in bad:
        print(f"{row['way']}, {row['shape']}: {row['obstacle']}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
