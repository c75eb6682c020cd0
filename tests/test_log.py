"""The log of a run: metrics.jsonl without gap or repeat, TensorBoard, plain lines that a progress bar does not tear."""

import contextlib
import io
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from soflow.log import LogError, NullLog, RunLog

VALUES = {
    "loss/total": 0.75,
    "loss/velocity_mse": 1.5,
    "loss/consistency_mse": 0.0625,
    "grad_norm": 12.5,
    "throughput/images_per_s": 1234.5,
}


class Terminal(io.StringIO):
    """A stream that says it is a terminal and records what it is sent."""

    def isatty(self) -> bool:
        return True


def run(folder: Path, first_step: int, last_step: int, total_steps: int = 10) -> None:
    """Log every second step, with the loss 1 / step."""
    log = RunLog(folder, total_steps, first_step)
    for step in range(first_step + 1, last_step + 1):
        log.advance(step)
        if step % 2 == 0:
            log.interval(step, {"loss/total": 1 / step})
    log.close()


def metrics(folder: Path) -> list[dict]:
    return [
        json.loads(line, parse_constant=pytest.fail) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def expected(*steps: int) -> list[dict]:
    return [{"step": step, "loss/total": 1 / step} for step in steps]


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(name)]


# ---------------------------------------------------------------- metrics.jsonl


def test_one_line_per_interval_step_first(tmp_path: Path):
    log = RunLog(tmp_path / "runs" / "a", 10, 0)
    log.interval(5, VALUES)
    # on disk before the run ends
    assert (tmp_path / "runs" / "a" / "metrics.jsonl").read_text() == json.dumps({"step": 5, **VALUES}) + "\n"
    log.interval(10, {"loss/total": 0.1 + 0.2})
    log.close()
    assert metrics(tmp_path / "runs" / "a") == [{"step": 5, **VALUES}, {"step": 10, "loss/total": 0.1 + 0.2}]


def test_a_line_is_on_the_disk_when_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A machine that goes down, with a checkpoint of that step on its disk, leaves no gap in the log."""
    synced: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        fsync(descriptor)
        synced.append((tmp_path / "metrics.jsonl").read_text())

    with contextlib.closing(RunLog(tmp_path, 10, 0)) as log:
        monkeypatch.setattr(os, "fsync", record)
        log.interval(2, VALUES)
        assert [json.loads(text)["step"] for text in synced] == [2]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path, capsys: pytest.CaptureFixture):
    log = RunLog(tmp_path, 10, 0)
    log.interval(5, {"loss/total": math.nan, "grad_norm": math.inf, "gap_ratio": -math.inf})
    log.close()
    assert metrics(tmp_path) == [{"step": 5, "loss/total": None, "grad_norm": None, "gap_ratio": None}]
    line = capsys.readouterr().out
    assert "loss       nan" in line
    assert "grad norm       inf" in line


@pytest.mark.parametrize(("stopped_at", "resumed_at"), [(10, 4), (7, 4), (7, 5), (7, 7), (7, 0), (10, 10)])
def test_a_resumed_run_has_no_gap_and_no_repeat(tmp_path: Path, stopped_at: int, resumed_at: int):
    run(tmp_path, 0, stopped_at)
    run(tmp_path, resumed_at, 10)
    assert metrics(tmp_path) == expected(2, 4, 6, 8, 10)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}


@pytest.mark.parametrize("cut", range(1, len('{"step": 6, "loss/total": 0.16666666666666666}\n')))
def test_a_half_written_last_line_is_dropped(tmp_path: Path, cut: int):
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps(line) + "\n" for line in expected(2, 4, 6))
    path.write_text(whole[:-cut])
    # the line lacks only its newline when cut is 1
    steps = (2, 4, 6) if cut == 1 else (2, 4)
    RunLog(tmp_path, 10, 6).close()
    assert metrics(tmp_path) == expected(*steps)
    assert path.read_text().endswith("\n")


@pytest.mark.parametrize("line", ["", "{", "[2]", "3", '{"loss": 1}', '{"step": "two"}', "\x00"])
def test_another_line_that_is_no_metric_is_refused_and_kept(tmp_path: Path, line: str):
    text = '{"step": 1}\n' + line + '\n{"step": 3}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(LogError, match=r"metrics\.jsonl, line 2: got .*, expected a JSON object with a step"):
        RunLog(tmp_path, 10, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_cutting_back_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(tmp_path, 0, 10)

    def refuse(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space left on device"):
        RunLog(tmp_path, 10, 4)
    assert metrics(tmp_path) == expected(2, 4, 6, 8, 10)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}


def test_what_needs_no_cut_is_not_rewritten(tmp_path: Path):
    run(tmp_path, 0, 6)
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    run(tmp_path, 6, 10)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match="file"):
        RunLog(tmp_path / "file", 10, 0)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_full_disk_is_named(tmp_path: Path):
    command = [sys.executable, __file__, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    failures = [line for line in done.stdout.splitlines() if not line.startswith("step ")]
    assert failures == [f"[Errno 27] cannot write the log: File too large: '{tmp_path}'"] * 2


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that not even root can write")
def test_what_tensorboard_cannot_write_is_named_once(tmp_path: Path, capfd: pytest.CaptureFixture):
    hook = threading.excepthook
    (tmp_path / "tensorboard").symlink_to("/proc/self/task")
    with pytest.raises(OSError, match="cannot write the log: ") as raised:
        RunLog(tmp_path, 10, 0)
    assert raised.value.filename.startswith(f"{tmp_path}/tensorboard/events")
    threading.excepthook = hook
    (tmp_path / "tensorboard").unlink()
    log = RunLog(tmp_path, 10, 0)
    shutil.rmtree(tmp_path / "tensorboard")

    def two_intervals() -> None:
        # what ends the thread in the first may be noticed in the second only
        log.interval(1, VALUES)
        log.interval(2, VALUES)

    with pytest.raises(OSError, match="cannot write the log: No such file or directory: '.*/tensorboard/events"):
        two_intervals()
    with contextlib.suppress(OSError):
        log.close()
    assert threading.excepthook is hook
    assert "Traceback" not in capfd.readouterr().err


# ---------------------------------------------------------------- TensorBoard


def test_scalars_reach_tensorboard_at_once_and_resume_purges_later_ones(tmp_path: Path):
    log = RunLog(tmp_path, 10, 0)
    log.interval(2, {"loss/total": 0.5})
    log.interval(4, {"loss/total": 0.25})
    assert scalars(tmp_path, "loss/total") == [(2, 0.5), (4, 0.25)]
    log.interval(6, {f"many/{number}": 0.0 for number in range(200)} | {"loss/total": 0.125})
    assert scalars(tmp_path, "loss/total") == [(2, 0.5), (4, 0.25), (6, 0.125)]
    log.close()
    log = RunLog(tmp_path, 10, 4)
    log.interval(6, {"loss/total": 2.0})
    log.close()
    assert scalars(tmp_path, "loss/total") == [(2, 0.5), (4, 0.25), (6, 2.0)]


@pytest.mark.parametrize("channels", [1, 3])
def test_images_reach_tensorboard(tmp_path: Path, channels: int):
    log = RunLog(tmp_path, 10, 0)
    log.image(3, "samples", np.zeros((4, 6, channels), np.uint8))
    log.close()
    (image,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("samples")
    assert (image.step, image.height, image.width) == (3, 4, 6)


# ---------------------------------------------------------------- stdout and the progress bar


def test_plain_lines_are_aligned_and_say_what_matters(tmp_path: Path, capsys: pytest.CaptureFixture):
    log = RunLog(tmp_path, 20_000, 0)
    log.interval(100, VALUES)
    log.interval(20_000, {name: value / 1000 for name, value in VALUES.items()})
    log.info("checkpoint saved")
    log.close()
    captured = capsys.readouterr()
    first, last, info = captured.out.splitlines()
    assert info == "checkpoint saved"
    assert captured.err == ""
    first, first_left = first[:-5].rsplit(maxsplit=1)
    last, last_left = last[:-5].rsplit(maxsplit=1)
    assert first == (
        "step   100/20000    0.5%  loss    0.7500  mse velocity     1.500  mse consistency   0.06250"
        "  grad norm     12.50     1234.5 images/s"
    )
    assert last == (
        "step 20000/20000  100.0%  loss 0.0007500  mse velocity  0.001500  mse consistency 6.250e-05"
        "  grad norm   0.01250        1.2 images/s"
    )
    assert first_left.count(":") == 2
    assert last_left == "0:00:00"


@pytest.mark.parametrize(("seconds", "left"), [(30.0, "0:04:30 left"), (40_000.0, "4 days, 4:00:00 left")])
def test_time_left_counts_the_steps_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, seconds: float, left: str
):
    now = 1000.0
    monkeypatch.setattr("soflow.log.time.monotonic", lambda: now)
    log = RunLog(tmp_path, 2000, 1000)
    now += seconds
    log.interval(1100, {})
    log.close()
    assert capsys.readouterr().out.endswith(f"  {left}\n")


def test_no_progress_bar_unless_stderr_is_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture):
    run(tmp_path, 0, 10)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert len(captured.out.splitlines()) == 5


def test_lines_do_not_tear_the_progress_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    log = RunLog(tmp_path, 10, 4)
    for step in range(5, 11):
        log.advance(step)
        log.info(f"line {step}")
    log.close()
    # a carriage return starts the row of the screen again
    rows = [row.rstrip("\r").rsplit("\r", 1)[-1] for row in terminal.getvalue().split("\n")]
    assert [row for row in rows if row.startswith("line")] == [f"line {step}" for step in range(5, 11)]
    assert all("line" not in row or row.startswith("line") for row in rows)
    assert "4/10" in terminal.getvalue()
    assert "10/10" in rows[-2] or "10/10" in rows[-1]


def test_another_process_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    log = NullLog()
    log.advance(1)
    log.interval(1, VALUES)
    log.image(1, "samples", np.zeros((2, 2, 3), np.uint8))
    log.info("text")
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


if __name__ == "__main__":
    full = RunLog(Path(sys.argv[1]), 1000, 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    try:
        for finished in range(1, 1000):
            full.interval(finished, VALUES)
    except OSError as error:
        print(error)
    try:
        full.close()
    except OSError as error:
        print(error)
