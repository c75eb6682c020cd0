"""Trainings of configs/digits.yaml that differ in one thing, judged alike: what several benchmarks share.

Every variant and seed is trained in a process of its own, one after the other, and judged as bench.digits does
(bench/judge.py). A training that was interrupted continues, and one that was finished and judged is not done again.
Steps are timed apart from that, by turns in one process, as CPU time: what else the machine does hardly matters. Memory
is what the tensors of a step need at most (`soflow.memory`).
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch

from bench.digits import balanced_labels, generate, read_metrics
from bench.judge import DigitsJudge
from bench.machine import machine
from soflow.assembly import assemble, training_ops
from soflow.checkpoint import replacing
from soflow.config import Config, Sampler
from soflow.config_file import load_config
from soflow.data import batch_indices, open_source
from soflow.distributed import Processes
from soflow.memory import predict_peak
from soflow.run_folder import load_flow

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "digits.yaml"
TRAIN_SCRIPT = ROOT / "train.py"
COUNT = 1080
REPORT = "judged.json"
TIMED_STEPS, TIMED_ROUNDS = 5, 7


class BenchError(RuntimeError):
    """A training that did not end as it should; the message says which and how."""


@dataclass(frozen=True)
class Variant:
    """Overrides of the configuration, and the samplers to judge with, each with numbers of network calls."""

    overrides: tuple[str, ...]
    samplers: tuple[tuple[Sampler, tuple[int, ...]], ...]


def overrides(variant: Variant, name: str, seed: int, steps: int, runs: Path) -> list[str]:
    """Return the overrides that make the training of `variant` with a seed."""
    place = [f"name={name}-{seed}", f"output_dir={json.dumps(str(runs))}", "train.sample_every=0"]
    return [*variant.overrides, f"seed={seed}", f"train.total_steps={steps}", *place]


def train(settings: Sequence[str], run: Path) -> None:
    """Train, or continue, one run in a process of its own."""
    done = subprocess.run([sys.executable, str(TRAIN_SCRIPT), str(CONFIG), *settings], cwd=ROOT, check=False)
    if done.returncode != 0:
        raise BenchError(f"{run}: training ended with exit code {done.returncode}, expected 0")


def judge_run(run: Path, variant: Variant, judge: DigitsJudge) -> dict[str, Any]:
    """Return scores of every sampler and number of network calls, and the last losses."""
    flow, step = load_flow(run)
    samples = []
    for sampler, calls in variant.samplers:
        flow.sampler = sampler
        for nfe in calls:
            scores = judge.score(generate(flow, nfe, COUNT, seed=0), balanced_labels(COUNT))
            samples.append({"sampler": sampler, "nfe": nfe, **asdict(scores)})
    last = read_metrics(run / "metrics.jsonl")[-1]
    losses = {name: last[f"loss/{name}"] for name in ("velocity_mse", "consistency_mse")}
    return {"step": step, **losses, "samples": samples}


def finished(run: Path, steps: int) -> dict[str, Any] | None:
    """Return the report of a run that was trained for `steps` steps and judged before; None for any other."""
    if not (run / REPORT).exists():
        return None
    report: dict[str, Any] = json.loads((run / REPORT).read_text(encoding="utf-8"))
    return report if report["step"] == steps else None


def measure_costs(configs: Mapping[str, Config]) -> dict[str, dict[str, float]]:
    """Return seconds and MiB of a step of each configuration; the seconds are the median of rounds by turns."""
    device = torch.device("cpu")
    trainings, memory = {}, {}
    for name, config in configs.items():
        step = assemble(config, Processes(0, 1, device), training_ops(config, device)).step
        source = open_source(config.data)
        indices = batch_indices(len(source), config.train.batch_size, config.seed, 0)
        trainings[name] = step, source.read(indices[list(step.positions)])
        memory[name] = predict_peak(config, source.image_shape, device) / 2**20
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    for number in range(TIMED_ROUNDS + 1):
        for name, (step, rows) in trainings.items():
            start = time.process_time()
            for _ in range(TIMED_STEPS):
                step(*rows, number)
            # the first round warms up
            if number:
                seconds[name].append((time.process_time() - start) / TIMED_STEPS)
    return {name: {"step_s": median(seconds[name]), "memory_mib": memory[name]} for name in configs}


def spread(values: Sequence[float], digits: int) -> str:
    """Return mean and standard deviation as text; of a single value the value."""
    text = f"{mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} +- {stdev(values):.{digits}f}"


def table(
    reports: Mapping[str, list[dict[str, Any]]], costs: Mapping[str, Mapping[str, float]], real: Mapping[str, float]
) -> str:
    """Return the printed tables, in Markdown: a line per variant, sampler and number of calls, then one per variant."""
    lines = ["| variant | sampler | NFE | agreement | Frechet | neighbour |", "|---|---|---|---|---|---|"]
    for name, runs in reports.items():
        for index, first in enumerate(runs[0]["samples"]):
            rows = [run["samples"][index] for run in runs]
            digits = {"agreement": 4, "frechet": 3, "neighbour": 3}
            scores = [spread([row[score] for row in rows], n) for score, n in digits.items()]
            lines.append(f"| {name} | {first['sampler']} | {first['nfe']} | {' | '.join(scores)} |")
    lines.append(f"| real images | | | {real['agreement']:.4f} | {real['frechet']:.3f} | {real['neighbour']:.3f} |")
    lines += [
        "",
        "| variant | velocity mse | consistency mse | seconds a step | memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for name, runs in reports.items():
        losses = [spread([run[key] for run in runs], 3) for key in ("velocity_mse", "consistency_mse")]
        cost = costs[name]
        lines.append(f"| {name} | {' | '.join(losses)} | {cost['step_s']:.3f} | {cost['memory_mib']:.1f} |")
    return "\n".join(lines)


def compare(
    description: str,
    variants: Mapping[str, Variant],
    question: str,
    num_seeds: int,
    arguments: Sequence[str] | None = None,
) -> int:
    """Run the command line of a benchmark: train, judge, time, print; return 0, or 1 when a training failed.

    question: names the benchmark's folder of runs and its file of results.  num_seeds: the default.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=num_seeds, help=f"trainings of each (default {num_seeds})")
    parser.add_argument("--steps", type=int, default=1000, help="steps of each (default 1000)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / question, help="folder of the runs")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / f"{question}.json")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.steps < 1:
        parser.error(f"--seeds, --steps: got {options.seeds}, {options.steps}, expected at least 1")
    torch.set_num_threads(1)
    judge, runs = DigitsJudge(), options.runs.resolve()
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    try:
        for seed in range(options.seeds):
            for name, variant in variants.items():
                run = runs / f"{name}-{seed}"
                report = finished(run, options.steps)
                if report is None:
                    train(overrides(variant, name, seed, options.steps, runs), run)
                    report = judge_run(run, variant, judge)
                    with replacing(run / REPORT) as partial:
                        partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
                reports[name].append(report)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    configs = {
        name: load_config(CONFIG, overrides(variant, name, 0, options.steps, runs))
        for name, variant in variants.items()
    }
    costs, real = measure_costs(configs), asdict(judge.real)
    result = {"steps": options.steps, "count": COUNT, **machine(), "real": real, "costs": costs, "runs": reports}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(reports, costs, real))
    return 0
