"""Several processes on this machine: under torchrun, or started one by one, for an exit code of each."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny

from soflow.config_file import dump_config

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    # a restart finds the store of the last one otherwise, in two of three tries
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
# of a training of 20 steps that shows all that several processes must agree on
SETTINGS = (
    "train.total_steps=20",
    "train.batch_size=24",
    "train.log_every=1",
    "train.checkpoint_every=10",
    "network.depth=2",
    "optim.clip_norm=0.5",
    "optim.warmup_steps=4",
    "optim.schedule=cosine",
    "ema.profiles=[0.1]",
)
# what differs between two runs of one training; everything else may not
TIMINGS = {"time/step_s", "time/data", "throughput/images_per_s", "throughput/mfu", "memory/peak_gib"}


def recipe(output_dir: Path, *overrides: str) -> Path:
    """The file of the tiny configuration, whose run is `output_dir`/tiny."""
    file = output_dir / "tiny.yaml"
    output_dir.mkdir(parents=True, exist_ok=True)
    file.write_text(dump_config(tiny.config(output_dir, *overrides)), encoding="utf-8")
    return file


def torchrun(num: int, *args: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start torchrun; the address, because it hangs where the machine cannot resolve its own name."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", *options]
    return _start([*command, f"--nproc-per-node={num}", *args], ENVIRONMENT)


def ranks(num: int, *args: str) -> list[subprocess.Popen[str]]:
    """Start `num` processes that find each other."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num)}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num)]
    return [_start([sys.executable, *args], {**common, **names}) for names in own]


def _start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str]:
    """Exit code and output of a process that must end by itself."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, output


def train(folder: Path, num: int, *overrides: str) -> Path:
    """The run folder of a training with SETTINGS by `num` processes."""
    ends = [finish(process) for process in ranks(num, "train.py", str(recipe(folder, *SETTINGS, *overrides)))]
    assert [code for code, _ in ends] == [0] * num, ends
    return folder / "tiny"


def assert_same_metrics(run: Path, expected: Path, tolerance: float, steps: Sequence[int] = range(1, 21)) -> None:
    """Every line of the logs of both trainings with SETTINGS, of these steps, says the same, but for what it took."""
    ours, theirs = metrics(run), metrics(expected)
    assert [line["step"] for line in ours] == list(steps)
    for line, other in zip(ours, theirs, strict=True):
        assert line.keys() == other.keys()
        for key in other.keys() - TIMINGS:
            assert line[key] == pytest.approx(other[key], rel=tolerance, abs=tolerance), (line["step"], key)


def metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def status(run: Path) -> dict:
    """What a run says of itself."""
    return json.loads((run / "status.json").read_text(encoding="utf-8"))
