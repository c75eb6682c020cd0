"""What does a checkpoint cost the training, written beside it or in its way?

    python -m bench.checkpoint [--hidden-size N] [--depth N] [--batch-size N] [--steps N] [--rounds N] [--json FILE]

Trains a DiT on the digits in rounds of `--steps` steps, by turns: without a checkpoint, with one that a thread writes
while the steps go on, and with one that the steps wait for; each is saved before the first step of its round. Medians
of the rounds: what the save holds the training up at once (ms), what a round takes longer than one without (ms), and
that in percent of the round. --steps must be enough for the thread to finish within its round; else the row says so.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.figures import keep
from soflow.checkpoint import Writer
from soflow.config import Config, DataConfig, EngineConfig, NetworkConfig, TrainConfig
from soflow.distributed import Processes, resolve_device
from soflow.trainer import Trainer

WAYS = ("none", "beside", "in the way")


@dataclass(frozen=True)
class Round:
    """One round. stall_s: until the first step could begin; seconds: all of it; late: the thread was not done."""

    stall_s: float
    seconds: float
    late: bool


@dataclass(frozen=True)
class Cost:
    """One way of saving: medians over the rounds."""

    way: str
    stall_ms: float
    extra_ms: float
    percent_of_round: float
    finished_in_round: bool


def run_round(trainer: Trainer, writer: Writer, way: str, steps: int) -> Round:
    """Save as `way` says, then train."""
    start = time.perf_counter()
    if way != "none":
        trainer._save(writer)
        if way == "in the way":
            writer.wait()
    stall = time.perf_counter() - start
    for _ in range(steps):
        trainer._train_step()
    if trainer.processes.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    late = writer.busy
    writer.wait()
    return Round(stall, seconds, late)


def measure(trainer: Trainer, steps: int, rounds: int) -> list[Cost]:
    """Return the cost of each way, rounds by turns after one of each that does not count."""
    times: dict[str, list[Round]] = {way: [] for way in WAYS}
    with Writer(trainer.folder.checkpoints, 1, 0, lambda path: None) as writer:
        for number in range(rounds + 1):
            for way in WAYS:
                done = run_round(trainer, writer, way, steps)
                if number:
                    times[way].append(done)
    plain = statistics.median(done.seconds for done in times["none"])
    costs = []
    for way, all_done in times.items():
        extra = statistics.median(done.seconds for done in all_done) - plain
        stall = statistics.median(done.stall_s for done in all_done)
        costs.append(Cost(way, 1e3 * stall, 1e3 * extra, 100 * extra / plain, not any(done.late for done in all_done)))
    return costs


def main() -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("hidden-size", 256), ("depth", 6), ("batch-size", 32), ("steps", 20), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            name="checkpoint",
            output_dir=folder,
            network=NetworkConfig(
                name="DiT",
                input_size=8,
                in_channels=1,
                num_classes=10,
                patch_size=2,
                hidden_size=args.hidden_size,
                depth=args.depth,
                num_heads=args.hidden_size // 64,
            ),
            data=DataConfig(source="digits"),
            train=TrainConfig(total_steps=10**9, batch_size=args.batch_size),
            engine=EngineConfig(threads=1),
        )
        trainer = Trainer(config, Processes(0, 1, resolve_device("auto")))
        costs = measure(trainer, args.steps, args.rounds)
        gigabytes = sum(file.stat().st_size for file in trainer.folder.checkpoints.rglob("*") if file.is_file()) / 1e9
    print(f"{trainer.processes.device}, one checkpoint of {gigabytes:.2f} GB in {args.steps} steps")
    print(f"{'written':<12}{'stall ms':>10}{'extra ms':>10}{'of round':>10}")
    for cost in costs:
        late = "" if cost.finished_in_round else "  not finished in its round: give more --steps"
        print(f"{cost.way:<12}{cost.stall_ms:10.1f}{cost.extra_ms:10.1f}{cost.percent_of_round:9.1f}%{late}")
    keep(args.json, [asdict(cost) for cost in costs])
    return 0


if __name__ == "__main__":
    sys.exit(main())
