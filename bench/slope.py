"""How exact is the slope q at each gap ratio r? Two evaluations against difference propagation, in several precisions.

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
from typing import Any, Literal

import torch
from torch import Tensor

from soflow import SolutionFlow
from soflow.models import DIT_PRESETS, DiT, build_network
from soflow.rounding import ROUNDED, rounded
from soflow.slope import LOOKAHEADS, slope

GAPS = (0.1, 0.01, 0.002, 0.0003125, 0.000001)
TIME, END = 0.6, 0.2
SMALL = "DiT-384x12"
SHAPES: dict[str, dict[str, Any]] = {
    SMALL: {"name": "DiT", "input_size": 16, "patch_size": 2, "hidden_size": 384, "depth": 12, "num_heads": 6},
    **{name: {"name": name} for name in DIT_PRESETS},
}
Weights = Literal["initial", "drawn"]


def random_network(shape: dict[str, Any], weights: Weights, seed: int = 0) -> DiT:
    """Return a DiT of 10 classes; also the weights that training starts at zero are drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = build_network(**shape, in_channels=4, num_classes=10)
        assert isinstance(network, DiT)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.requires_grad and weights == "initial":
                    parameter.add_(0.02 * torch.randn_like(parameter))
                elif parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * (parameter[0].numel() ** -0.5))
    return network


def measure(shape: dict[str, Any], weights: Weights, batch_size: int = 2) -> list[dict[str, Any]]:
    """Return one record per gap: relative errors of q by every way, and of F and dF by difference in bf16."""
    generator = torch.Generator().manual_seed(1)
    flow = SolutionFlow(random_network(shape, weights))
    size, labels = flow.network.input_size, torch.arange(batch_size) % 10
    x, v = torch.randn(2, batch_size, 4, size, size, generator=generator)
    t, s = (torch.full((batch_size,), time) for time in (TIME, END))
    exact, *flows = (rounded(flow, rounding) for rounding in ("fp64", *ROUNDED))
    of_rounded_weights = copy.deepcopy(flows[-1]).double()
    records = []
    for r in GAPS:
        # the middle time that a float32 run sees, for all precisions
        l = t + (s - t) * r
        wide = x.double(), v.double(), t.double(), l.double(), s.double(), labels
        true = slope(exact, *wide)
        record: dict[str, Any] = {"r": r}
        for lookahead in LOOKAHEADS:
            for rounding, ours in zip(ROUNDED, flows, strict=True):
                found = slope(ours, x, v, t, l, s, labels, lookahead=lookahead)
                record[f"{lookahead} {rounding}"] = _error(found.q, true.q)
        # the last way is difference bf16
        record["bf16 F"], record["bf16 dF"] = _error(found.F_t, true.F_t), _error(found.dF, true.dF)
        record["weights dF"] = _error(slope(of_rounded_weights, *wide).dF, true.dF)
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
