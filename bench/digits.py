"""Judge a run of configs/digits.yaml: do 1, 2 and 4 network calls make digits, like real ones, and new ones?

    python -m bench.digits runs/digits [--seed N] [--count N]

Writes into the run folder samples.png (10 classes x 10 images, one network call each), losses.png and report.json, and
prints the table. For one seed everything but the timings is the same again on the same machine. How the images are
judged is told in bench/judge.py.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

from bench.judge import NUM_CLASSES, DigitsJudge, JudgeError, Scores
from soflow import SolutionFlow, sample, sample_noise
from soflow.checkpoint import replacing
from soflow.config_file import load_config
from soflow.data import DIGITS_HELD_OUT_PER_CLASS
from soflow.images import grid, save_png, to_uint8
from soflow.run_folder import load_flow

NFE = (1, 2, 4)
SHAPE = (1, 8, 8)
GRID_COLUMNS = 10
SEED_STRIDE = 2**20
"""Image i of --seed N has the seed N * 2**20 + i: no two runs of this command share an image."""


@dataclass(frozen=True)
class Result:
    """What one number of network calls gave: scores, and the time of drawing noise and sampling all images."""

    nfe: int
    scores: Scores
    seconds: float
    images_per_s: float


def balanced_labels(count: int) -> Tensor:
    """Return labels 0, ..., 0, 1, ..., 9, equally many of each, (count,) int64; count is a multiple of 10."""
    return torch.arange(NUM_CLASSES).repeat_interleave(count // NUM_CLASSES)


def generate(flow: SolutionFlow, nfe: int, count: int, seed: int) -> Tensor:
    """Return `count` images (count, 1, 8, 8) of `balanced_labels(count)`, of which each has a seed of its own."""
    noise, renoise = sample_noise(seed * SEED_STRIDE + torch.arange(count), SHAPE, nfe)
    return sample(flow, balanced_labels(count), (count, *SHAPE), nfe=nfe, noise=noise, renoise=renoise)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines of a metrics.jsonl with the columns used here; null, which stands for no number, becomes NaN.

    Raises JudgeError for a line that lacks one, and OSError for a file that cannot be read.
    """
    columns = ("step", "loss/velocity_mse", "loss/consistency_mse", "gap_ratio", "time/step_s")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            record = json.loads(line)
            records.append({name: math.nan if record[name] is None else record[name] for name in columns})
        except (ValueError, TypeError, KeyError) as error:
            raise JudgeError(
                f"{path}, line {number}: expected JSON with {', '.join(columns)}, but: {error!r}"
            ) from error
    if not records:
        raise JudgeError(f"{path}: got an empty file, expected a line per interval of training")
    return records


def training_seconds(metrics: Sequence[dict[str, float]]) -> float:
    """Return the seconds spent in training steps, summed over the intervals of `metrics`."""
    starts = [0.0] + [record["step"] for record in metrics[:-1]]
    return sum((record["step"] - start) * record["time/step_s"] for start, record in zip(starts, metrics, strict=True))


def plot_losses(path: Path, metrics: Sequence[dict[str, float]], velocity_share: float) -> None:
    """Draw both mean square errors, their sum weighted by their rows' shares of the batch, and r, as a PNG."""
    steps = [record["step"] for record in metrics]
    velocity = [record["loss/velocity_mse"] for record in metrics]
    consistency = [record["loss/consistency_mse"] for record in metrics]
    total = [velocity_share * v + (1 - velocity_share) * c for v, c in zip(velocity, consistency, strict=True)]
    # Not from pyplot, which keeps figures and looks for a screen.
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    losses, gap = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    losses.plot(steps, velocity, label="velocity")
    losses.plot(steps, consistency, label="consistency (slope)")
    losses.plot(steps, total, label=f"{velocity_share:.2f} velocity + {1 - velocity_share:.2f} consistency", ls="--")
    losses.set(ylabel="mean square error", ylim=(0, None))
    losses.legend(frameon=False)
    gap.plot(steps, [record["gap_ratio"] for record in metrics], color="black")
    gap.set(xlabel="step", ylabel="gap ratio r", yscale="log")
    gap.yaxis.set_minor_formatter(NullFormatter())
    for axes in (losses, gap):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def table(real: Scores, results: Sequence[Result]) -> str:
    """Return the printed table: a line per number of network calls, and one of the real images."""
    rows = [
        (
            str(result.nfe),
            *_score_cells(result.scores, real),
            f"{result.seconds:.2f}",
            f"{result.images_per_s:.0f}",
        )
        for result in results
    ]
    header = ("NFE", "agreement", "Frechet", "x real", "neighbour", "seconds", "images/s")
    lines = [header, *rows, ("real", *_score_cells(real, real), "", "")]
    return "\n".join("  ".join(cell.rjust(9) for cell in line).rstrip() for line in lines)


def _score_cells(scores: Scores, real: Scores) -> tuple[str, ...]:
    ratio = scores.frechet / real.frechet
    return f"{scores.agreement:.4f}", f"{scores.frechet:.3f}", f"{ratio:.2f}", f"{scores.neighbour:.3f}"


def judge_run(run: Path, count: int, seed: int) -> None:
    """Judge the run in folder `run`, write samples.png, losses.png and report.json there, and print the table.

    Raises OSError, or ValueError (ConfigError, CheckpointError, JudgeError), for a run that cannot be read or judged.
    """
    config = load_config(run / "config.yaml")
    network = config.network
    shape = (network.in_channels, network.input_size, network.input_size)
    if shape != SHAPE or network.num_classes != NUM_CLASSES:
        got = f"a network for images {shape} of {network.num_classes} classes"
        raise JudgeError(f"{run}: got {got}, expected one for digits, {SHAPE} of {NUM_CLASSES}")
    metrics = read_metrics(run / "metrics.jsonl")
    flow, step = load_flow(run)
    judge = DigitsJudge()
    # The first call allocates, which is not what the others are timed for.
    generate(flow, 1, count, seed)
    results, one_step = [], torch.empty(0)
    for nfe in NFE:
        start = time.perf_counter()
        images = generate(flow, nfe, count, seed)
        seconds = time.perf_counter() - start
        results.append(Result(nfe, judge.score(images, balanced_labels(count)), seconds, count / seconds))
        if nfe == 1:
            one_step = images
    report = {
        "run": config.name,
        "step": step,
        "weights": "ema",
        "seed": seed,
        "count": count,
        "training_seconds": training_seconds(metrics),
        "real": asdict(judge.real),
        "samples": [
            {
                "nfe": result.nfe,
                **asdict(result.scores),
                "frechet_over_real": result.scores.frechet / judge.real.frechet,
                "seconds": result.seconds,
                "images_per_s": result.images_per_s,
            }
            for result in results
        ],
    }
    first_of_each_class = one_step.unflatten(0, (NUM_CLASSES, -1))[:, :GRID_COLUMNS].flatten(0, 1)
    save_png(run / "samples.png", grid(to_uint8(first_of_each_class), columns=GRID_COLUMNS))
    num_velocity = int(config.objective.fm_ratio * config.train.batch_size)
    plot_losses(run / "losses.png", metrics, num_velocity / config.train.batch_size)
    with replacing(run / "report.json") as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{run}: step {step}, EMA weights, {report['training_seconds']:.1f} s of training, {count} images per NFE")
    print(table(judge.real, results))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 for a run that cannot be judged."""
    parser = argparse.ArgumentParser(prog="python -m bench.digits", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run of configs/digits.yaml")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other images (default 0)")
    parser.add_argument("--count", type=int, default=1080, help="images per number of network calls (default 1080)")
    options = parser.parse_args(arguments)
    if not 0 <= options.seed < 2**42:
        parser.error(f"--seed: got {options.seed}, expected 0 to 2**42 - 1")
    fewest = NUM_CLASSES * DIGITS_HELD_OUT_PER_CLASS
    if options.count < fewest or options.count % NUM_CLASSES or options.count > SEED_STRIDE:
        parser.error(f"--count: got {options.count}, expected a multiple of 10 from {fewest} to {SEED_STRIDE}")
    try:
        judge_run(options.run, options.count, options.seed)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
