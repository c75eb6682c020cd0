"""`soflow sample` by several processes, and what is left of its files when it fails; test_cli.py says what it draws."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from processes import finish, ranks, torchrun

from soflow import distributed, sampling
from soflow.cli import main
from soflow.trainer import Trainer

# 50 images: turns of 2 or 3 processes do not divide the batches evenly, and the last batch is smaller
SEEDS = ("--seeds", "0-49", "--batch-size", "7", "--nfe", "2")
# soflow sample, with a FAULT in process RANK before its second batch
FAULTY = """
import os, resource, signal, sys
import torch
from soflow import sampling
from soflow.cli import main

fault, rank, sample, calls = sys.argv[1], int(sys.argv[2]), sampling.sample, []

def faulty(*args):
    calls.append(args)
    x = sample(*args)
    if int(os.environ["RANK"]) != rank or len(calls) < 2:
        return x
    if fault == "disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1))
    elif fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return x * torch.nan if fault == "nan" else x

sampling.sample = faulty
sys.exit(main(["sample", *sys.argv[3:]]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with a checkpoint of step 2."""
    torch.use_deterministic_algorithms(True)
    config = tiny.config(tmp_path_factory.mktemp("run"), "train.total_steps=2")
    trainer = Trainer(config, distributed.Processes(0, 1, torch.device("cpu")))
    trainer.fit()
    return trainer.folder.path


def calling(action: Callable[[int], None]) -> Callable[..., torch.Tensor]:
    """The sampler of the library, with `action(number of calls before)` before each call."""
    calls: list[None] = []
    sample = sampling.sample

    def wrapped(*args: object) -> torch.Tensor:
        action(len(calls))
        calls.append(None)
        return sample(*args)

    return wrapped


@pytest.mark.slow
@pytest.mark.parametrize("num", [2, 3])
def test_the_files_are_the_same_for_any_number_of_processes(run, tmp_path, num):
    def files(name: str) -> list[str]:
        return [*SEEDS, "--npz", str(tmp_path / f"{name}.npz"), "--grid", str(tmp_path / f"{name}.png")]

    assert main(["sample", str(run), *files("alone")]) == 0
    code, output = finish(torchrun(num, "-m", "soflow.cli", "sample", str(run), *files("shared")))
    assert code == 0, output
    assert output.count("50 images, 2 NFE by renoise, ema weights of step 2, ") == 1
    assert f" s on cpu, {num} processes: " in output
    for suffix in ("npz", "png"):
        assert (tmp_path / f"shared.{suffix}").read_bytes() == (tmp_path / f"alone.{suffix}").read_bytes()
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "rank", "message"),
    [("nan", 1, "the network draws NaN or infinity"), ("disk", 0, "File too large")],
)
def test_an_error_of_one_process_ends_all(run, tmp_path, fault, rank, message):
    npz = tmp_path / "a.npz"
    npz.write_bytes(b"old")
    argv = ("--seeds", "0-499", "--batch-size", "100", "--npz", str(npz), "--grid", str(tmp_path / "a.png"))
    ends = [finish(process) for process in ranks(2, "-c", FAULTY, fault, str(rank), str(run), *argv)]
    assert [code for code, _ in ends] == [2, 2], ends
    for here, (_, output) in enumerate(ends):
        (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
        assert message in line
        assert line.startswith(f"error: process {rank}: ") == (here != rank)
        assert "Traceback" not in output
    assert str(npz) in ends[0][1] or fault == "nan"
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    assert npz.read_bytes() == b"old"


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_and_leaves_no_file(run, tmp_path):
    argv = ("--seeds", "0-99", "--batch-size", "10", "--npz", str(tmp_path / "a.npz"))
    first, second = [finish(process) for process in ranks(2, "-c", FAULTY, "kill", "1", str(run), *argv)]
    assert second[0] == -signal.SIGKILL
    assert first[0] == 1, first
    assert "error: another process is gone, or does not answer: " in first[1]
    assert "Traceback" not in first[1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_leaves_no_file(run, tmp_path, signum):
    npz, partial = tmp_path / "a.npz", tmp_path / "a.npz.tmp"
    agent = torchrun(2, "-m", "soflow.cli", "sample", str(run), "--seeds", "0-999999", "--npz", str(npz))
    deadline = time.monotonic() + 120
    while not partial.exists() or partial.stat().st_size < 100_000:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    agent.send_signal(signum)
    code, _ = finish(agent)
    assert code != 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_is_refused_is_refused_by_all(tmp_path):
    argv = ("-m", "soflow.cli", "sample", str(tmp_path / "no-run"), "--npz", str(tmp_path / "a.npz"))
    ends = [finish(process) for process in ranks(2, *argv)]
    assert [code for code, _ in ends] == [2, 2], ends
    assert all(output.startswith(f"error: {tmp_path / 'no-run'}: ") for _, output in ends), ends


def test_images_are_written_batch_by_batch(run, tmp_path, monkeypatch):
    """What is drawn is on the disk two batches later, but for the buffer of a file."""
    partial = tmp_path / "a.npz.tmp"
    sizes: list[int] = []
    monkeypatch.setattr(sampling, "sample", calling(lambda call: sizes.append(partial.stat().st_size)))
    argv = ["--seeds", "0-499", "--batch-size", "100", "--npz", str(tmp_path / "a.npz")]
    assert main(["sample", str(run), *argv]) == 0
    batch = 100 * 8 * 8 * 3
    assert len(sizes) == 5
    for call, size in enumerate(sizes):
        assert (call - 1) * batch - 8192 <= size <= call * batch + 8192


@pytest.fixture
def python_s_interrupt():
    """SIGINT as in the foreground: a shell starts what runs in the background with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_the_old_file(run, tmp_path, capsys, monkeypatch, python_s_interrupt, signum):
    npz = tmp_path / "a.npz"
    npz.write_bytes(b"old")
    handler = signal.getsignal(signum)
    monkeypatch.setattr(sampling, "sample", calling(lambda call: call and os.kill(os.getpid(), signum)))
    assert main(["sample", str(run), *SEEDS, "--npz", str(npz)]) == 130
    assert capsys.readouterr().err.endswith("error: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    assert npz.read_bytes() == b"old"
    assert signal.getsignal(signum) is handler


def test_processes_that_see_different_checkpoints_are_refused(run, tmp_path, capsys, monkeypatch):
    class Second(distributed.Processes):
        def agree(self, value: int) -> int:
            return value + 1

    @contextmanager
    def join(device: str, timeout_s: float, field: str):
        yield Second(0, 1, torch.device(device))

    monkeypatch.setattr(distributed, "join_processes", join)
    assert main(["sample", str(run), "--npz", str(tmp_path / "a.npz"), "--device", "cpu"]) == 2
    assert f"{run}: got step 2 here and 3 in process 0, expected a step folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_classes_take_turns_across_batches(run, tmp_path, monkeypatch):
    """Also where a batch ends within a turn. What is drawn would not tell: young networks hardly heed their labels."""
    labels = []
    sample = sampling.sample
    monkeypatch.setattr(sampling, "sample", lambda *args: labels.extend(args[1].tolist()) or sample(*args))
    argv = ["--classes", "3,7-8", "--seeds", "0-8", "--batch-size", "4", "--npz", str(tmp_path / "a.npz")]
    assert main(["sample", str(run), *argv]) == 0
    assert labels == [3, 7, 8] * 3
