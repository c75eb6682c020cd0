"""Several processes on this machine: under torchrun, or started one by one, for an exit code of each."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

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


def metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def status(run: Path) -> dict:
    """What a run says of itself."""
    return json.loads((run / "status.json").read_text(encoding="utf-8"))
