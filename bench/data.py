"""How fast each loader brings batches of latents, and what it costs: against the official layout, in one run.

    python -m bench.data [--loader NAME] [--samples N] [--seconds S] [--rounds N] [--device cpu|cuda] [--json FILE]

official: an HDF5 file of float32, read sample by sample by a Dataset behind a DataLoader with 0 and 2 workers (made
here in that layout). Ours: `plain` and `dali` on shards of float16 and float32. All hold the same samples and give mean
and standard deviation in float32 on the device, scaled, with labels. Each runs in a process of its own, in rounds of
alternating order, after an epoch to warm up. Columns:

    samples/s    of an idle consumer, the median of the rounds; ratio: over the faster official loader
    cpu us       processor time of all processes and threads, per sample
    private MiB  memory of all processes that no file backs, beyond that of the interpreter with its imports
    waiting      share of the time that a consumer waits which computes 20 ms per batch; on a GPU, forward and backward
                 of DiT-B/2 in TF32, which is less than a step and so the harder case

Prints a table, then one line of JSON, with the machine's load over five minutes: where others compute too, processor
time says more than samples/s.
"""

import argparse
import importlib
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bench.figures import keep
from soflow.config import DataConfig
from soflow.data import LATENT_SCALE, BatchOrder, Hdf5Source, convert_hdf5, epoch_order, open_feeder, open_source
from soflow.data.feeder import has_dali
from soflow.models import build_network

ROOT = Path(__file__).parents[1]
SHAPE = (8, 32, 32)
BATCH = 256
SHARD_BYTES = 2**26
STEP_S, STEPS = 0.02, 20
LOADERS = ("official 0", "official 2", "plain float16", "plain float32", "dali float16", "dali float32")


@dataclass
class Measurement:
    """One loader in one process."""

    loader: str
    samples_per_s: float
    cpu_us: float
    private_mib: float
    waiting: float


class OfficialDataset(Dataset[tuple[torch.Tensor, int]]):
    """The samples of the HDF5 file, opened by whichever process reads first, one read per sample."""

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        self.count = count
        self.latents: Any = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self.latents is None:
            import h5py

            file = h5py.File(self.path, "r")
            self.latents, self.labels = file["latents"], file["labels"]
        return torch.from_numpy(self.latents[index]), int(self.labels[index])


def write_data(root: Path, count: int) -> None:
    """Write the same random latents as HDF5, and as shards of either type."""
    import h5py

    rng = np.random.default_rng(0)
    with h5py.File(root / "official.hdf5", "w") as file:
        latents = file.create_dataset("latents", shape=(count, *SHAPE), dtype=np.float32)
        for start in range(0, count, BATCH):
            rows = min(BATCH, count - start)
            latents[start : start + rows] = rng.standard_normal((rows, *SHAPE), dtype=np.float32) * 5.0
        file.create_dataset("labels", data=np.arange(count, dtype=np.int64) % 1000)
        file.create_dataset("amount", data=np.int64(count))
        file.create_dataset("latent_size", data=np.int64(SHAPE[1]))
    source = Hdf5Source(root / "official.hdf5")
    convert_hdf5(source, root / "float16", "float16", SHARD_BYTES)
    convert_hdf5(source, root / "float32", "float32", SHARD_BYTES)


def batches(loader: str, root: Path, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield the mean of one batch after the other, without end; its standard deviation is on the device too."""
    kind, variant = loader.split()
    if kind != "official":
        source = open_source(DataConfig(source="latents", root=str(root / variant)))
        config = DataConfig(source="latents", root=str(root / variant), feeder=kind)  # type: ignore[arg-type]
        order = BatchOrder(len(source), BATCH, 0, tuple(range(BATCH)))
        for rows in open_feeder(config, source, order, device):
            yield rows.mean
    count = json.loads((root / "float16" / "manifest.json").read_text())["n"]
    dataset = OfficialDataset(root / "official.hdf5", count)
    for epoch in range(2**31):
        data: Any = DataLoader(
            dataset,
            BATCH,
            sampler=epoch_order(count, 0, epoch).tolist(),
            num_workers=int(variant),
            prefetch_factor=4 if int(variant) else None,
            drop_last=True,
            pin_memory=device.type == "cuda",
        )
        for latents, labels in data:
            mean, std = (latents.to(device, non_blocking=True) * LATENT_SCALE).chunk(2, dim=1)
            labels.to(device, non_blocking=True), std
            yield mean


def family() -> list[int]:
    """Return this process and its children."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [os.getpid(), *map(int, children)]


def cpu_seconds() -> float:
    """Return the processor time of this process and its children, living and dead."""
    ticks = 0
    for process in family():
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:15] if process == os.getpid() else fields[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def private_mib() -> float:
    """Return the memory of this process and its children that is neither shared nor backed by a file."""
    total = 0
    for process in family():
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
    return total / 1024


def consumer(device: torch.device) -> Callable[[torch.Tensor], None]:
    """Return what a step would do with a batch: sleep, or on a GPU, train DiT-B/2."""
    if device.type == "cpu":
        return lambda mean: time.sleep(STEP_S)
    torch.backends.cuda.matmul.allow_tf32 = True
    network = build_network("DiT-B/2").to(device)
    t = torch.full((BATCH,), 0.5, device=device)

    def train(mean: torch.Tensor) -> None:
        network.zero_grad()
        network(mean, t, t).square().mean().backward()

    return train


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(loader: str, root: Path, device: torch.device, seconds: float) -> Measurement:
    """Return what one loader does in this process: first alone, then behind a computation."""
    torch.set_num_threads(1)
    torch.zeros(1, device=device)
    importlib.import_module({"official": "h5py", "plain": "numpy", "dali": "nvidia.dali"}[loader.split()[0]])
    before = private_mib()
    warmup = json.loads((root / "float16" / "manifest.json").read_text())["n"] // BATCH
    stream = batches(loader, root, device)
    for _ in range(warmup):
        next(stream)
    synchronize(device)
    start, cpu, count = time.perf_counter(), cpu_seconds(), 0
    while time.perf_counter() - start < seconds:
        next(stream)
        count += BATCH
    synchronize(device)
    elapsed, used, memory = time.perf_counter() - start, cpu_seconds() - cpu, private_mib() - before
    compute, batch = consumer(device), next(stream).clone()
    compute(batch)

    def series(steps: int, rows: Iterator[torch.Tensor]) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            compute(next(rows))
        synchronize(device)
        return time.perf_counter() - start

    # half of it before and half after: a clock that drifts would pass for waiting
    alone = series(STEPS // 2, itertools.repeat(batch))
    paced = series(STEPS, stream)
    alone += series(STEPS // 2, itertools.repeat(batch))
    waiting = max(0.0, 1.0 - alone / paced)
    return Measurement(loader, count / elapsed, 1e6 * used / count, memory, waiting)


def measure_apart(loader: str, root: Path, device: str, seconds: float) -> Measurement:
    """Return `measure` of a process of its own."""
    command = [sys.executable, "-m", "bench.data", "--one", loader, "--root", str(root)]
    done = subprocess.run(
        [*command, "--device", device, "--seconds", str(seconds)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def compare(
    samples: int, seconds: float, device: str, some: Sequence[str] = LOADERS, rounds: int = 2
) -> list[dict[str, Any]]:
    """Return a row per loader: medians of the rounds, and ratios to the faster official one."""
    loaders = [name for name in some if has_dali() or not name.startswith("dali")]
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), samples)
        found: dict[str, list[Measurement]] = {name: [] for name in loaders}
        for turn in range(rounds):
            for name in loaders[:: -1 if turn % 2 else 1]:
                found[name].append(measure_apart(name, Path(folder), device, seconds))
    rows = []
    for name, measured in found.items():
        columns = zip(*(list(asdict(one).values())[1:] for one in measured), strict=True)
        rows.append(asdict(Measurement(name, *(statistics.median(column) for column in columns))))
    official = max((row for row in rows if row["loader"].startswith("official")), key=lambda row: row["samples_per_s"])
    for row in rows:
        row["ratio"] = row["samples_per_s"] / official["samples_per_s"]
        row["private_ratio"] = row["private_mib"] / official["private_mib"]
    return rows


def main() -> int:
    """Print the table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loader", choices=LOADERS, action="append", help="this one beside an official one")
    parser.add_argument("--rounds", type=int, default=2, help="default 2")
    parser.add_argument("--samples", type=int, default=16384, help="samples of 32 KiB in float32 (default 16384)")
    parser.add_argument("--seconds", type=float, default=3.0, help="per loader and round (default 3)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--one", choices=LOADERS, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.samples < BATCH:
        parser.error(f"--samples: got {args.samples}, expected at least a batch of {BATCH}")
    if not 0 < args.seconds < math.inf:
        parser.error(f"--seconds: got {args.seconds}, expected a number above 0")
    some = args.loader or LOADERS
    if args.rounds < 1:
        parser.error(f"--rounds: got {args.rounds}, expected at least 1")
    if not any(name.startswith("official") for name in some):
        parser.error(f"--loader: got {', '.join(some)}, expected an official one among them, to compare with")
    if args.one is not None:
        print(json.dumps(asdict(measure(args.one, args.root, torch.device(args.device), args.seconds))))
        return 0
    rows, load = compare(args.samples, args.seconds, args.device, some, args.rounds), os.getloadavg()[1]
    print(f"{'loader':16}{'samples/s':>11}{'ratio':>8}{'cpu us':>9}{'private MiB':>13}{'waiting':>9}")
    for row in rows:
        print(
            f"{row['loader']:16}{row['samples_per_s']:11.0f}{row['ratio']:8.2f}{row['cpu_us']:9.1f}"
            f"{row['private_mib']:13.0f}{row['waiting']:9.1%}"
        )
    result = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} CPU cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "load": load,
        "samples": args.samples,
        "batch": BATCH,
        "rows": rows,
    }
    keep(args.json, result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
