"""On equal terms: how good are SoFlow, MeanFlow and flow matching in 1, 2 and 4 network calls, and what do they cost?

    python -m bench.objectives [--seeds N] [--steps N] [--runs FOLDER] [--results FILE]

Trains configs/digits.yaml with each objective and N seeds (default 3), one process after the other, and judges each run
as bench.digits does (bench/judge.py). Data, network, batch, optimizer, average, number of steps, guidance and the
weights of the losses are the same; what differs is what each paper defines:

    soflow         times and gap of configs/digits.yaml, sampled from fresh noise each time
    meanflow       t and s are the larger and the smaller of two logit-normal times (-0.4, 1), sampled in a chain
    flow_matching  every row trains the velocity; Euler steps, and for comparison Heun steps and 64 Euler steps

A run that was interrupted continues, and one that was finished and judged is not done again. Prints the table, mean and
standard deviation over seeds, and writes runs, machine and versions to the JSON file.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from bench.digits import balanced_labels, generate, read_metrics, training_seconds
from bench.judge import DigitsJudge
from soflow.checkpoint import replacing
from soflow.flow import Sampler
from soflow.run_folder import load_flow

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "digits.yaml"
TRAIN_SCRIPT = ROOT / "train.py"
OVERRIDES = {
    "soflow": (),
    "meanflow": ("times.t_mean=-0.4", "times.t_std=1.0", "times.s_mean=-0.4", "times.s_std=1.0", "flow.sampler=chain"),
    "flow_matching": ("objective.fm_ratio=1", "flow.sampler=euler"),
}
SAMPLERS: dict[str, tuple[tuple[Sampler, tuple[int, ...]], ...]] = {
    "soflow": (("renoise", (1, 2, 4)),),
    "meanflow": (("chain", (1, 2, 4)),),
    "flow_matching": (("euler", (1, 2, 4, 64)), ("heun", (2, 4))),
}
COUNT = 1080
REPORT = "objectives.json"


class BenchError(RuntimeError):
    """A run that did not end as it should; the message says which and how."""


def train(name: str, seed: int, steps: int, runs: Path) -> Path:
    """Train, or continue, one run in a process of its own; return its folder, with its peak memory in it."""
    run = runs / f"{name}-{seed}"
    command = [
        sys.executable,
        str(TRAIN_SCRIPT),
        str(CONFIG),
        f"name={run.name}",
        f"output_dir={json.dumps(str(runs))}",
    ]
    command += [f"objective.name={name}", *OVERRIDES[name], f"seed={seed}", f"train.total_steps={steps}"]
    process = subprocess.Popen([*command, "train.sample_every=0"], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise BenchError(f"{run}: training ended with exit code {process.returncode}, expected 0")
    # Linux counts in KiB
    (run / "peak_rss.json").write_text(json.dumps({"peak_rss_gib": usage.ru_maxrss / 2**20}) + "\n", encoding="utf-8")
    return run


def judge_run(run: Path, name: str, judge: DigitsJudge) -> dict[str, Any]:
    """Return scores of every sampler and number of network calls, seconds of training, and peak memory."""
    flow, step = load_flow(run)
    samples = []
    for sampler, calls in SAMPLERS[name]:
        flow.sampler = sampler
        for nfe in calls:
            scores = judge.score(generate(flow, nfe, COUNT, seed=0), balanced_labels(COUNT))
            samples.append({"sampler": sampler, "nfe": nfe, **asdict(scores)})
    peak = json.loads((run / "peak_rss.json").read_text(encoding="utf-8"))
    seconds = training_seconds(read_metrics(run / "metrics.jsonl"))
    return {"step": step, "training_seconds": seconds, **peak, "samples": samples}


def finished(run: Path, steps: int) -> dict[str, Any] | None:
    """Return the report of a run that was trained for `steps` steps and judged before; None for any other."""
    if not (run / REPORT).exists():
        return None
    report: dict[str, Any] = json.loads((run / REPORT).read_text(encoding="utf-8"))
    return report if report["step"] == steps else None


def machine() -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    packages = {name: version(name) for name in ("torch", "numpy", "scikit-learn")}
    return {"machine": platform.machine(), "system": platform.system(), "python": platform.python_version(), **packages}


def spread(values: Sequence[float], digits: int) -> str:
    """Return mean and standard deviation as text; of a single value the value."""
    text = f"{mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} +- {stdev(values):.{digits}f}"


def table(reports: dict[str, list[dict[str, Any]]], real: dict[str, float]) -> str:
    """Return the printed table, in Markdown: a line per objective, sampler and number of network calls."""
    lines = ["| objective | sampler | NFE | agreement | Frechet | neighbour |", "|---|---|---|---|---|---|"]
    for name, runs in reports.items():
        for index, first in enumerate(runs[0]["samples"]):
            rows = [run["samples"][index] for run in runs]
            scores = [
                spread([row[score] for row in rows], 4 if score == "agreement" else 3)
                for score in ("agreement", "frechet", "neighbour")
            ]
            lines.append(f"| {name} | {first['sampler']} | {first['nfe']} | {' | '.join(scores)} |")
    lines.append(f"| real images | | | {real['agreement']:.4f} | {real['frechet']:.3f} | {real['neighbour']:.3f} |")
    lines += ["", "| objective | seconds of training | peak memory of the process, GiB |", "|---|---|---|"]
    for name, runs in reports.items():
        seconds, memory = ([run[key] for run in runs] for key in ("training_seconds", "peak_rss_gib"))
        lines.append(f"| {name} | {spread(seconds, 1)} | {spread(memory, 3)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 1 when a training failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each objective (default 3)")
    parser.add_argument("--steps", type=int, default=1000, help="steps of each (default 1000)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "objectives", help="folder of the runs")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "objectives.json")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.steps < 1:
        parser.error(f"--seeds, --steps: got {options.seeds}, {options.steps}, expected at least 1")
    torch.set_num_threads(1)
    judge = DigitsJudge()
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in OVERRIDES}
    try:
        for seed in range(options.seeds):
            for name in OVERRIDES:
                run = options.runs / f"{name}-{seed}"
                report = finished(run, options.steps)
                if report is None:
                    report = judge_run(train(name, seed, options.steps, options.runs), name, judge)
                    with replacing(run / REPORT) as partial:
                        partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
                reports[name].append(report)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result = {"steps": options.steps, "count": COUNT, **machine(), "real": asdict(judge.real), "runs": reports}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(reports, asdict(judge.real)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
