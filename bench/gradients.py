"""How exact is the gradient of a batch that goes through the network in parts, by precision?

    python -m bench.gradients [--run FOLDER] [--parts N ...]

Relative errors, over all weights, against float64 of the gradient of a batch of configs/digits.yaml. Parts are those of
train.accumulation; DDP rounds as often over as many processes. In "bf16" (docs/precision.md) the blocks have bfloat16
gradients, to which every part but the first is added. For comparison, "next batch" is how far its gradient is from that
of this one. Weights: those at the start of training, each moved by N(0, 0.02^2), or the newest of a run of that
configuration. Prints a table, a row per number of parts.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from soflow import Batch, SolutionFlow
from soflow.assembly import assemble
from soflow.config import Config
from soflow.config_file import load_config
from soflow.data import batch_indices, open_source
from soflow.distributed import Processes
from soflow.kernels import reference
from soflow.objective import GuidedObjective
from soflow.rounding import Rounding, rounded
from soflow.run_folder import load_flow

RECIPE = Path(__file__).parents[1] / "configs/digits.yaml"
PARTS = (1, 8, 64)
MOVED = 0.02
PRECISIONS: tuple[Rounding, ...] = ("fp32", "bf16")


def measure(config: Config, weights: Mapping[str, Tensor] | None = None, number: int = 0) -> dict[str, float]:
    """Return the relative error of the gradient of step `number` by precision, and that of taking the next batch.

    weights: of the network; None are those at the start of training, moved.
    """
    training = assemble(config, Processes(0, 1, torch.device("cpu")), reference)
    flow, step = training.flow, training.step
    if weights is None:
        generator = torch.Generator().manual_seed(config.seed)
        weights = {
            name: x + MOVED * torch.randn(x.shape, generator=generator) for name, x in flow.network.state_dict().items()
        }
    flow.network.load_state_dict(dict(weights))
    source = open_source(config.data)

    def parts(number: int) -> list[Batch]:
        indices = batch_indices(len(source), config.train.batch_size, config.seed, number)
        return list(step.draw(*source.read(indices[list(step.positions)]), *step.clock(number)))

    def of(flow: SolutionFlow, batches: list[Batch]) -> Tensor:
        return gradient(flow, step.objective, batches, step.loss_scales)

    exact, batches = rounded(flow, "fp64"), parts(number)
    true = of(exact, [widened(batch) for batch in batches])
    found: dict[str, Tensor] = {precision: of(rounded(flow, precision), batches) for precision in PRECISIONS}
    found["next batch"] = of(exact, [widened(batch) for batch in parts(number + 1)])
    return {name: ((ours - true).norm() / true.norm()).item() for name, ours in found.items()}


def gradient(flow: SolutionFlow, objective: GuidedObjective, batches: list[Batch], loss_scales: list[float]) -> Tensor:
    """Return the gradient of the sum of scaled losses as one vector, fp64, of all weights of `flow`, which it fills."""
    flow.zero_grad()
    for batch, scale in zip(batches, loss_scales, strict=True):
        (objective(flow, batch).loss * scale).backward()
    return torch.cat([p.grad.double().flatten() for p in flow.parameters() if p.grad is not None])


def widened(batch: Batch) -> Batch:
    """Return the same numbers in float64."""
    x_0, x_1, t, l, s = (x.double() for x in (batch.x_0, batch.x_1, batch.t, batch.l, batch.s))
    return dataclasses.replace(batch, x_0=x_0, x_1=x_1, t=t, l=l, s=s)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="take the newest weights of this run")
    parser.add_argument("--parts", type=int, nargs="+", default=PARTS, help="numbers of parts (default 1 8 64)")
    args = parser.parse_args()
    weights, number = None, 0
    if args.run is not None:
        trained, number = load_flow(args.run, "model")
        weights = trained.network.state_dict()
    print("parts  " + "".join(f"{column:>12}" for column in (*PRECISIONS, "next batch")))
    for count in args.parts:
        errors = measure(load_config(RECIPE, [f"train.accumulation={count}"]), weights, number)
        print(f"{count:5}  " + "".join(f"{error:12.2g}" for error in errors.values()), flush=True)


if __name__ == "__main__":
    main()
