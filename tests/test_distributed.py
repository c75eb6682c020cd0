"""One global batch is one training, whatever the number of processes (gloo)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from soflow import checkpoint
from soflow.config_file import dump_config
from soflow.distributed import Processes, join_processes, resolve_device
from soflow.trainer import Trainer

ROOT = Path(__file__).parent.parent
SETTINGS = ("train.total_steps=20", "train.batch_size=24", "train.log_every=1", "train.checkpoint_every=10")


def torchrun(num: int, *args: str) -> subprocess.CompletedProcess[str]:
    # The address: torchrun hangs where the machine cannot resolve its own name.
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
        f"--nproc-per-node={num}",
        "train.py",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *args], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def losses(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("num", [2, 3])
def test_processes_train_the_same_model(tmp_path, num):
    """24 rows on 3 processes, 12 of them velocity rows: even shares; losses of 20 steps within 1e-5."""
    alone = Trainer(tiny.config(tmp_path / "alone", *SETTINGS), Processes(0, 1, torch.device("cpu")))
    alone.fit()
    config = tiny.config(tmp_path / "together", *SETTINGS)
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    result = torchrun(num, str(file))
    assert result.returncode == 0, result.stderr
    ours, theirs = losses(tmp_path / "together" / "tiny"), losses(alone.folder.path)
    assert [line["step"] for line in ours] == list(range(1, 21))
    for line, expected in zip(ours, theirs, strict=True):
        for key in expected.keys() - {"time/step_s", "throughput/images_per_s"}:
            assert line[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-5), (line["step"], key)
    # The checkpoint of several processes continues on one.
    step_folder = tmp_path / "together" / "tiny" / "checkpoints" / "step-00000010"
    assert checkpoint.load(step_folder).step == 10
    assert Trainer(config, Processes(0, 1, torch.device("cpu")), resume=step_folder).finished == 10


def test_error_of_the_first_process_ends_all(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "other.txt").write_text("kept")
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(tiny.config(tmp_path)), encoding="utf-8")
    result = torchrun(2, str(file))
    assert result.returncode != 0
    assert "without config.yaml" in result.stderr


def test_alone_needs_no_process_group():
    with join_processes("cpu", 60) as processes:
        assert (processes.rank, processes.world_size, processes.is_first) == (0, 1, True)
        assert processes.agree("x") == "x"
        assert processes.sum(torch.ones(2)).tolist() == [1, 1]
        processes.wait()
    assert not torch.distributed.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu_is_said():
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(ValueError, match=r"engine\.device: got 'cuda'"):
        resolve_device("cuda")
