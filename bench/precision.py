"""Does bf16 train as well as float32, and does it need difference propagation for that? A controlled experiment.

    python -m bench.precision [--seeds N] [--steps N] [--runs FOLDER] [--json FILE]

Trains configs/digits.yaml to a last gap r of 0.0003125, in float32, in bf16 with two evaluations and in bf16 with
difference propagation: the same seeds, noise, times and schedule for each. Judges one-step samples as bench.digits
does.
Runs that are already in the folder are continued or taken as they are. Prints mean and standard deviation over the
seeds, then one line of JSON.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.digits import balanced_labels, generate, read_metrics, training_seconds
from bench.judge import DigitsJudge
from soflow.run_folder import load_flow

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "digits.yaml"
GAP_END = 0.0003125
VARIANTS = {
    "fp32 difference": ("engine.precision=fp32", "objective.lookahead=difference"),
    "bf16 two_pass": ("engine.precision=bf16", "objective.lookahead=two_pass"),
    "bf16 difference": ("engine.precision=bf16", "objective.lookahead=difference"),
}
COLUMNS = ("agreement", "frechet_over_real", "velocity_mse", "consistency_mse", "training_seconds")
COUNT = 1080


def train(runs: Path, variant: str, seed: int, steps: int) -> Path:
    """Train one variant with one seed in a process of its own, or continue it; return its folder."""
    name = f"{variant.replace(' ', '-')}-{seed}"
    overrides = [*VARIANTS[variant], f"times.gap_end={GAP_END}", f"seed={seed}", f"train.total_steps={steps}"]
    overrides += ["train.sample_every=0", f"name={name}", f"output_dir={json.dumps(str(runs))}"]
    command = [sys.executable, "train.py", str(CONFIG), *overrides]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return runs / name


def judge(run: Path, judge: DigitsJudge) -> dict[str, float]:
    """Return the scores of one-step samples of a finished run, and its last losses."""
    flow, _ = load_flow(run)
    scores = judge.score(generate(flow, 1, COUNT, seed=0), balanced_labels(COUNT))
    metrics = read_metrics(run / "metrics.jsonl")
    return {
        "agreement": scores.agreement,
        "frechet_over_real": scores.frechet / judge.real.frechet,
        "velocity_mse": metrics[-1]["loss/velocity_mse"],
        "consistency_mse": metrics[-1]["loss/consistency_mse"],
        "training_seconds": training_seconds(metrics),
    }


def main() -> None:
    """Train, judge and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default 5)")
    parser.add_argument("--steps", type=int, default=1000, help="training steps (default 1000)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "precision", help="folder of the runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    args = parser.parse_args()
    digits_judge = DigitsJudge()
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for variant in VARIANTS:
            result = judge(train(args.runs.resolve(), variant, seed, args.steps), digits_judge)
            rows.append({"variant": variant, "seed": seed, **result})
            print(f"seed {seed}, {variant}: " + ", ".join(f"{k} {result[k]:.4g}" for k in COLUMNS), file=sys.stderr)
    print("".join(name.rjust(22) for name in ("", *COLUMNS)))
    for variant in VARIANTS:
        cells = [_mean_and_spread([row[column] for row in rows if row["variant"] == variant]) for column in COLUMNS]
        print("".join(cell.rjust(22) for cell in (variant, *cells)))
    record = {
        "gap_end": GAP_END,
        "steps": args.steps,
        "machine": f"{platform.machine()}, one thread",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rows": rows,
    }
    text = json.dumps(record)
    if args.json is not None:
        args.json.write_text(text + "\n", encoding="utf-8")
    print(text)


def _mean_and_spread(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4g} +- {spread:.2g}"


if __name__ == "__main__":
    main()
