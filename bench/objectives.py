"""On equal terms: how good are SoFlow, MeanFlow and flow matching in 1, 2 and 4 network calls, and what do they cost?

    python -m bench.objectives [--seeds N] [--steps N] [--runs FOLDER] [--results FILE]

Trains configs/digits.yaml with each objective and N seeds (default 3), see bench/trainings.py. Data, network, batch,
optimizer, average, number of steps, guidance and the weights of the losses are the same; what differs is what each
paper defines:

    soflow         times and gap of configs/digits.yaml, sampled from fresh noise each time
    meanflow       t and s are the larger and the smaller of two logit-normal times (-0.4, 1), sampled in a chain
    flow_matching  every row trains the velocity; Euler steps, and for comparison Heun steps and 64 Euler steps

Prints the tables, mean and standard deviation over seeds, and writes runs, machine and versions to the JSON file.
"""

import sys
from collections.abc import Sequence

from bench.trainings import Variant, compare

FEW = (1, 2, 4)
LOGIT_NORMAL = ("times.t_mean=-0.4", "times.t_std=1.0", "times.s_mean=-0.4", "times.s_std=1.0")
VARIANTS = {
    "soflow": Variant(("objective.name=soflow",), (("renoise", FEW),)),
    "meanflow": Variant(("objective.name=meanflow", *LOGIT_NORMAL, "flow.sampler=chain"), (("chain", FEW),)),
    "flow_matching": Variant(
        ("objective.name=flow_matching", "objective.fm_ratio=1", "flow.sampler=euler"),
        (("euler", (*FEW, 64)), ("heun", FEW[1:])),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 1 when a training failed."""
    return compare(__doc__, VARIANTS, "objectives", 3, arguments)


if __name__ == "__main__":
    sys.exit(main())
