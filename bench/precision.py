"""Does bf16 train as well as float32, and does it need difference propagation for that? A controlled experiment.

    python -m bench.precision [--seeds N] [--steps N] [--runs FOLDER] [--results FILE]

Trains configs/digits.yaml, see bench/trainings.py, down to a gap ratio r of 0.0003125, as the CIFAR-10 recipe does: in
float32, in bf16 with two evaluations and in bf16 with difference propagation; with the same seeds, noise, times and
schedule. Prints the tables, mean and standard deviation over N seeds (default 5), and writes the JSON file.
"""

import sys
from collections.abc import Sequence

from bench.trainings import Variant, compare
from soflow.config import Sampler

GAP_END = "times.gap_end=0.0003125"
ONE_STEP: tuple[tuple[Sampler, tuple[int, ...]], ...] = (("renoise", (1,)),)
VARIANTS = {
    "fp32-difference": Variant((GAP_END, "engine.precision=fp32"), ONE_STEP),
    "bf16-two_pass": Variant((GAP_END, "engine.precision=bf16", "objective.lookahead=two_pass"), ONE_STEP),
    "bf16-difference": Variant((GAP_END, "engine.precision=bf16"), ONE_STEP),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 1 when a training failed."""
    return compare(__doc__, VARIANTS, "precision", 5, arguments)


if __name__ == "__main__":
    sys.exit(main())
