"""How exact is the slope q at each gap r? Two evaluations against difference propagation, in several precisions.

    python -m bench.slope [--network NAME] [--weights initial|drawn] [--batch-size N]

Relative errors of q against float64 at t = 0.6, s = 0.2. "tf32-like" rounds the inputs of every product with a weight
to 10 bits of mantissa, as TF32 tensor cores do; "bf16" is the policy of that name (docs/precision.md). The last columns
are of difference propagation in bf16: errors of F and of dF, and what rounding the weights alone does to dF, computed
in float64: an error of the network that was stored, not of the way the difference was taken.

Networks: DiT-384x12 (on 16 x 16 latents in patches of 2), or any preset, such as DiT-B/4. Weights: those at the start
of training, each moved by N(0, 0.02^2), or all drawn as N(0, 1 / fan-in), which bends the network far more than
training does. Without options both networks and both kinds are measured. Prints a table each, then one line of JSON.
"""

import argparse
import copy
import json
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from soflow.kernels import reference
from soflow.models import DIT_PRESETS, DiT, Network, build_network
from soflow.models.pair import PairOps
from soflow.paths import slope_coefficients
from soflow.precision import working_copy

GAPS = (0.1, 0.01, 0.002, 0.0003125, 0.000001)
TIME, END = 0.6, 0.2
SMALL = "DiT-384x12"
SHAPES: dict[str, dict[str, Any]] = {
    SMALL: {"name": "DiT", "input_size": 16, "patch_size": 2, "hidden_size": 384, "depth": 12, "num_heads": 6},
    **{name: {"name": name} for name in DIT_PRESETS},
}
Weights = Literal["initial", "drawn"]


def round_to_tf32(x: Tensor) -> Tensor:
    """Return x, fp32, rounded to the 10 bits of mantissa that a TF32 product sees (ties away from zero)."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def tf32_ops() -> Any:
    """Return the reference ops with the inputs of every product with a weight rounded to TF32."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference.linear(round_to_tf32(x), round_to_tf32(weight), bias)

    return SimpleNamespace(**{**vars(reference), "linear": linear, "linear_difference": linear})


def random_network(shape: dict[str, Any], weights: Weights, seed: int = 0) -> DiT:
    """Return a DiT of 10 classes; also the weights that training starts at zero are drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build_network(**shape, in_channels=4, num_classes=10)
        assert isinstance(network, DiT)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.requires_grad and weights == "initial":
                    parameter.add_(0.02 * torch.randn_like(parameter))
                elif parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * (parameter[0].numel() ** -0.5))
    return network


@torch.no_grad()
def slope(network: Network, x: Tensor, v: Tensor, r: float, lookahead: str) -> tuple[Tensor, Tensor, Tensor]:
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


def measure(shape: dict[str, Any], weights: Weights, batch_size: int = 2) -> list[dict[str, Any]]:
    """Return one record per gap: relative errors of q by every way, and of F and dF by difference in bf16."""
    generator = torch.Generator().manual_seed(1)
    fp32 = random_network(shape, weights)
    x, v = torch.randn(2, batch_size, 4, fp32.input_size, fp32.input_size, generator=generator)
    exact = copy.deepcopy(fp32).double()
    tf32 = copy.deepcopy(fp32)
    tf32.ops = PairOps(tf32_ops())
    bf16, _ = working_copy(fp32, "bf16")
    rounded = copy.deepcopy(bf16).double()
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
        _, dF_of_rounded, _ = slope(rounded, x.double(), v.double(), r, "difference")
        record["weights dF"] = _error(dF_of_rounded, true_dF)
        records.append(record)
    return records


def _error(ours: Tensor, true: Tensor) -> float:
    return ((ours.double() - true).norm() / true.norm()).item()


def main() -> None:
    """Print the tables and the line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=SHAPES, help="this network only")
    parser.add_argument("--weights", choices=("initial", "drawn"), help="these weights only")
    parser.add_argument("--batch-size", type=int, default=2, help="samples that the errors are taken over (default 2)")
    args = parser.parse_args()
    tables = []
    for name in (args.network,) if args.network else (SMALL, "DiT-B/4"):
        for weights in (args.weights,) if args.weights else ("initial", "drawn"):
            rows = measure(SHAPES[name], weights, args.batch_size)
            tables.append({"network": name, "weights": weights, "rows": rows})
            print(f"{name}, {weights} weights")
            print("  ".join(column.rjust(max(len(column), 9)) for column in rows[0]))
            for row in rows:
                print("  ".join(f"{value:{max(len(column), 9)}.2g}" for column, value in row.items()), flush=True)
    print(json.dumps({"batch_size": args.batch_size, "torch": torch.__version__, "tables": tables}))


if __name__ == "__main__":
    main()
