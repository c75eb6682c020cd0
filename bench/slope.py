"""How exact is the slope q at each gap r? Two evaluations against difference propagation, in several precisions.

    python -m bench.slope [--hidden-size 384] [--depth 12]

Relative errors of q against float64, on a DiT with random weights at t = 0.6, s = 0.2. "tf32-like" rounds the inputs of
every product to 10 bits of mantissa, as TF32 tensor cores do; "bf16" computes every product with a weight in bfloat16.
Prints a table, then one line of JSON.
"""

import argparse
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from soflow.kernels import reference
from soflow.models import DiT
from soflow.models.pair import PairOps
from soflow.paths import slope_coefficients

GAPS = (0.1, 0.01, 0.002, 0.0003125, 0.000001)
TIME, END = 0.6, 0.2


def set_product_dtype(network: nn.Module, dtype: torch.dtype) -> None:
    """Store the weights of linear and patch layers as `dtype`, in which their products are then computed."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.data = module.weight.data.to(dtype)


def round_to_tf32(x: Tensor) -> Tensor:
    """Return x, fp32, rounded to the 10 bits of mantissa that a TF32 product sees (ties away from zero)."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def tf32_ops() -> Any:
    """Return the reference ops with the inputs of every product with a weight rounded to TF32."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference.linear(round_to_tf32(x), round_to_tf32(weight), bias)

    return SimpleNamespace(**{**vars(reference), "linear": linear, "linear_difference": linear})


def random_network(hidden_size: int, depth: int, seed: int = 0) -> DiT:
    """Return a DiT whose weights, also those that training starts at zero, are drawn at their usual size."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = DiT(16, 2, 4, hidden_size, depth, hidden_size // 64, 10)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name != "pos_embed":
                    parameter.copy_(torch.randn_like(parameter) * (parameter[0].numel() ** -0.5))
    return network


@torch.no_grad()
def slope(network: DiT, x: Tensor, v: Tensor, r: float, lookahead: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return F_t, dF and q of the Euler parameterization, by either look-ahead.  x, v: (B, C, H, W)."""
    t, s = (torch.full((len(x),), value, dtype=torch.float32).to(x.dtype) for value in (TIME, END))
    # the middle time that a float32 run sees, for all precisions
    l = (t.float() + (s.float() - t.float()) * r).to(x.dtype)
    labels = torch.arange(len(x)) % 10
    dx = v * (l - t)[:, None, None, None]
    if lookahead == "difference":
        F_t, dF = network.forward_difference(x, dx, t, l - t, s, labels)
    else:
        F_t = network(x, t, s, labels)
        dF = network(x + dx, l, s, labels) - F_t
    c = slope_coefficients("euler", t, l, s)[..., None, None, None]
    return F_t, dF, c[:, 0] * x + c[:, 1] * v + c[:, 2] * F_t + c[:, 3] * dF


def measure(hidden_size: int, depth: int, batch_size: int = 2) -> list[dict[str, Any]]:
    """Return one record per gap: relative errors of q by every way, and of dF and F by difference in bf16."""
    generator = torch.Generator().manual_seed(1)
    x, v = torch.randn(2, batch_size, 4, 16, 16, generator=generator)

    def build(change: Callable[[DiT], object] = lambda network: None) -> DiT:
        network = random_network(hidden_size, depth)
        change(network)
        return network

    exact = build(lambda network: network.double())
    fp32 = build()
    tf32 = build(lambda network: setattr(network, "ops", PairOps(tf32_ops())))
    bf16 = build(lambda network: set_product_dtype(network, torch.bfloat16))
    ways = [
        (f"{lookahead} {precision}", network, lookahead)
        for lookahead in ("two_pass", "difference")
        for precision, network in (("fp32", fp32), ("tf32-like", tf32), ("bf16", bf16))
    ]
    records = []
    for r in GAPS:
        true_F, true_dF, true_q = slope(exact, x.double(), v.double(), r, "difference")
        record: dict[str, Any] = {"r": r}
        for way, network, lookahead in ways:
            F_t, dF, q = slope(network, x, v, r, lookahead)
            record[way] = _error(q, true_q)
        # the last way is difference bf16
        record["bf16 F"], record["bf16 dF"] = _error(F_t, true_F), _error(dF, true_dF)
        records.append(record)
    return records


def _error(ours: Tensor, true: Tensor) -> float:
    return ((ours.double() - true).norm() / true.norm()).item()


def main() -> None:
    """Print the table and the line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=384, help="width of the network, a multiple of 64")
    parser.add_argument("--depth", type=int, default=12, help="number of blocks")
    args = parser.parse_args()
    records = measure(args.hidden_size, args.depth)
    columns = list(records[0])
    print("  ".join(name.rjust(max(len(name), 9)) for name in columns))
    for record in records:
        print("  ".join(f"{record[name]:{max(len(name), 9)}.2g}" for name in columns))
    print(
        json.dumps({"hidden_size": args.hidden_size, "depth": args.depth, "torch": torch.__version__, "rows": records})
    )


if __name__ == "__main__":
    main()
