"""What a run survives, and how it ends when it does not, with two processes on gloo.

The faults of saving and loading alone are in test_checkpoint.py (kill -9 at any moment, flipped bits, truncated, empty
and missing files, full disk, malicious files), those that one process shows in test_trainer.py (exact resume, seeds,
other configurations), the number of processes in test_distributed.py.
"""

import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import latent_folders
import numpy as np
import pytest
from processes import finish, metrics, ranks, recipe, status, torchrun

from soflow import checkpoint
from soflow.cli import main

FAULTY = "tests/faulty.py"
LONG = ("train.total_steps=100000", "train.log_every=5", "train.checkpoint_every=100000", "engine.timeout_s=60")
# not by lines: two processes that end at once may share one
WEIGHTS = re.compile(r"weights \w{64} (?:not )?finite after \d+")
SHORT = ("train.total_steps=12", "train.log_every=1", "train.checkpoint_every=4", "engine.timeout_s=60")


def only_checkpoint(run: Path) -> int:
    """The step of the one checkpoint there is, which is sound."""
    (folder,) = (path for path in (run / "checkpoints").iterdir() if path.name != "LATEST")
    return checkpoint.load(folder).step


def weights(output: str) -> str:
    """What a process says of its weights at the end."""
    return WEIGHTS.search(output)[0]


def wait_for_lines(run: Path, steps: list[int]) -> None:
    """Return when the first lines of the metrics are those of `steps`."""
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or [line["step"] for line in metrics(run)][: len(steps)] != steps:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_stopped(run: Path, outputs: list[str], name: str) -> None:
    """All processes stopped after one step, of which there is a checkpoint, and the run says so."""
    step = only_checkpoint(run)
    said = {weights(output) for output in outputs}
    assert len(said) == 1
    assert said.pop().endswith(f"finite after {step}")
    assert status(run) == {"state": "stopped", "step": step, "reason": name}


# ---------------------------------------------------------------- signals


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1")])
def test_a_signal_to_torchrun_stops_all_processes_at_one_step(tmp_path, signum, name):
    run = tmp_path / "tiny"
    agent = torchrun(
        2,
        FAULTY,
        *("none", "0", "0"),
        str(recipe(tmp_path, *LONG)),
        options=("--signals-to-handle=SIGTERM,SIGUSR1",),
    )
    wait_for_lines(run, [5, 10])
    agent.send_signal(signum)
    _, output = finish(agent)
    said = WEIGHTS.findall(output)
    assert len(said) == 2, output
    assert_stopped(run, said, name)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["term", "usr1"])
def test_a_signal_to_one_process_stops_all_of_them_at_one_step(tmp_path, fault):
    ends = [finish(process) for process in ranks(2, FAULTY, fault, "1", "7", str(recipe(tmp_path, *LONG)))]
    assert [code for code, _ in ends] == [0, 0], ends
    # known to all one step later
    assert only_checkpoint(tmp_path / "tiny") == 9
    assert status(tmp_path / "tiny")["state"] == "stopped"
    assert len({weights(output) for _, output in ends}) == 1


@pytest.mark.slow
def test_two_signals_during_a_save_leave_one_sound_checkpoint(tmp_path):
    file = recipe(tmp_path, *LONG, "train.checkpoint_every=10")
    ends = [finish(process) for process in ranks(2, FAULTY, "term-in-save", "0", "0", str(file), "train.keep_last=1")]
    assert [code for code, _ in ends] == [0, 0], ends
    assert_stopped(tmp_path / "tiny", [output for _, output in ends], "SIGTERM")


@pytest.mark.slow
def test_no_process_ends_before_the_last_checkpoint_is_written(tmp_path):
    """Slurm would end the others."""
    first, second = ranks(2, FAULTY, "slow-save", "0", "0", str(recipe(tmp_path, *LONG)))
    wait_for_lines(tmp_path / "tiny", [5])
    first.send_signal(signal.SIGTERM)
    code, _ = finish(second)
    assert status(tmp_path / "tiny")["state"] == "stopped"
    assert only_checkpoint(tmp_path / "tiny") > 0
    assert (code, finish(first)[0]) == (0, 0)


# ---------------------------------------------------------------- processes that die or hang


@pytest.mark.slow
def test_when_one_process_is_killed_the_other_fails_promptly(tmp_path):
    survivor, killed = ranks(2, FAULTY, "kill", "1", "7", str(recipe(tmp_path, *LONG)))
    assert killed.wait(90) == -signal.SIGKILL
    died = time.monotonic()
    code, output = finish(survivor)
    assert time.monotonic() - died < 15
    assert code == 1
    assert re.search(r"error: step 8: process 1 has given no sign of life since step \d; process 0 got: ", output)
    assert status(tmp_path / "tiny")["state"] == "failed"


@pytest.mark.slow
def test_under_torchrun_no_process_outlives_one_that_was_killed(tmp_path):
    agent = torchrun(2, FAULTY, "kill", "0", "7", str(recipe(tmp_path, *LONG)))
    code, _ = finish(agent)
    assert code != 0
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False)
    assert left.stdout == ""


@pytest.mark.slow
def test_torchrun_restarts_a_killed_process_and_the_run_ends_as_if_nothing_had_been(tmp_path):
    whole = [finish(process) for process in ranks(2, FAULTY, "none", "0", "0", str(recipe(tmp_path / "whole", *SHORT)))]
    file = recipe(tmp_path / "broken", *SHORT)
    code, output = finish(torchrun(2, FAULTY, "kill", "1", "9", str(file), options=("--max-restarts=1",)))
    assert code == 0, output
    said = [text for text in WEIGHTS.findall(output) if text.endswith(" after 12")]
    assert said == [weights(whole[0][1])] * 2
    assert status(tmp_path / "broken" / "tiny")["state"] == "complete"
    assert [line["step"] for line in metrics(tmp_path / "broken" / "tiny")] == list(range(1, 13))


@pytest.mark.slow
def test_a_process_that_is_stopped_is_named_after_the_time_limit(tmp_path):
    waiting, stopped = ranks(2, FAULTY, "stop", "1", "7", str(recipe(tmp_path, *LONG)), "engine.timeout_s=5")
    try:
        wait_for_lines(tmp_path / "tiny", [5])
        began = time.monotonic()
        code, output = finish(waiting)
        # the last: steps after the first interval, and the end of Python on a busy machine; else it waits for ever
        assert time.monotonic() - began < 5 + 5 + 10
        assert code == 1
        assert re.search(r"error: step 8: .*process 1 has given no sign of life since step \d", output), output
    finally:
        stopped.kill()
        stopped.communicate()


# ---------------------------------------------------------------- numbers that are not finite


@pytest.mark.slow
@pytest.mark.parametrize("action", ["skip", "stop"])
def test_nan_in_one_process_is_skipped_by_all_or_stops_all(tmp_path, action):
    file = recipe(tmp_path, *SHORT, f"optim.nonfinite={action}")
    ends = [finish(process) for process in ranks(2, FAULTY, "nan", "1", "6", str(file))]
    said = {weights(output) for _, output in ends}
    assert len(said) == 1
    assert " finite after" in said.pop()
    run = tmp_path / "tiny"
    if action == "skip":
        assert [code for code, _ in ends] == [0, 0]
        assert [line["skipped_steps"] for line in metrics(run)] == [0] * 6 + [1] + [0] * 5
    else:
        assert [code for code, _ in ends] == [1, 1]
        assert all("step 8: 1 step(s) in a row had no finite gradient" in output for _, output in ends), ends
        assert only_checkpoint(run) == 4


@pytest.mark.slow
def test_too_many_bad_steps_in_a_row_stop_the_run_and_keep_its_checkpoint(tmp_path):
    file = recipe(tmp_path, *SHORT, "optim.nonfinite=skip", "optim.max_bad_steps=3")
    ends = [finish(process) for process in ranks(2, FAULTY, "nan-forever", "1", "5", str(file), "train.log_every=100")]
    assert [code for code, _ in ends] == [1, 1]
    assert all("3 step(s) in a row had no finite gradient; lower optim.lr" in output for _, output in ends)
    assert checkpoint.load(tmp_path / "tiny" / "checkpoints" / "step-00000004").step == 4
    assert "3 step(s) in a row" in status(tmp_path / "tiny")["reason"]


# ---------------------------------------------------------------- data and disk


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("loader-raises", "error: shard 7: got nonsense"),
        ("loader-hangs", r"error: step 8: (no progress for 4 s|process 1 is still in step 8|all processes are alive)"),
        ("loader-dies", "error: step 8: process 1 has given no sign of life"),
    ],
)
def test_a_loader_that_fails_ends_all_processes_within_the_time_limit(tmp_path, fault, message):
    started = ranks(2, FAULTY, fault, "1", "7", str(recipe(tmp_path, *LONG)), "engine.timeout_s=4")
    wait_for_lines(tmp_path / "tiny", [5])
    began = time.monotonic()
    ends = [finish(process) for process in started]
    assert time.monotonic() - began < 4 + 15
    assert all(code != 0 for code, _ in ends)
    assert re.search(message, "".join(output for _, output in ends)), ends
    if fault == "loader-hangs":
        assert "process 1 ended in" in ends[1][1]


@pytest.mark.slow
def test_a_sample_with_nan_is_named_by_all_processes(tmp_path):
    latents = latent_folders.write_latents(tmp_path / "latents", counts=(16,))
    latents[5, 0, 1, 1] = np.nan
    entry = latent_folders.write_npy(tmp_path / "latents" / "latents-00000.npy", latents)
    latent_folders.rewrite_manifest(tmp_path / "latents", shards=[entry])
    network = "network={name: DiT, input_size: 4, in_channels: 4, num_classes: 3, patch_size: 2, hidden_size: 16"
    data = f"data={{source: latents, root: {tmp_path / 'latents'}}}"
    file = recipe(tmp_path, *SHORT, f"{network}, depth: 1, num_heads: 2}}", data)
    ends = [finish(process) for process in ranks(2, "-m", "soflow.cli", "train", str(file))]
    said = "samples 5 hold NaN or infinity (steps 0 to 0), expected finite data: try soflow inspect"
    assert all(code != 0 and said in output for code, output in ends), ends
    assert status(tmp_path / "tiny")["reason"] == said


@pytest.mark.slow
def test_a_full_disk_stops_all_processes_and_keeps_the_checkpoint_before(tmp_path):
    file = recipe(tmp_path, *LONG, "train.checkpoint_every=10")
    ends = [finish(process) for process in ranks(2, FAULTY, "disk", "0", "15", str(file))]
    assert all(code != 0 for code, _ in ends)
    assert all("cannot save the checkpoint" in output for _, output in ends), ends
    assert only_checkpoint(tmp_path / "tiny") == 10
    assert status(tmp_path / "tiny")["state"] == "failed"


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    file = recipe(tmp_path, *SHORT)
    assert main(["train", str(file), f"output_dir={tmp_path / 'file'}"]) == 2
    assert "file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.slow
def test_a_status_that_cannot_be_written_is_every_process_s_error(tmp_path):
    (tmp_path / "tiny").mkdir()
    file = recipe(tmp_path, *SHORT)
    shutil.copy(file, tmp_path / "tiny" / "config.yaml")
    (tmp_path / "tiny" / "status.json.tmp").mkdir()
    ends = [finish(process) for process in ranks(2, FAULTY, "none", "0", "0", str(file))]
    assert [code for code, _ in ends] == [2, 2], ends
    assert all("status.json.tmp: Is a directory" in output for _, output in ends), ends


@pytest.mark.slow
def test_a_second_job_in_the_same_folder_is_refused(tmp_path):
    file = recipe(tmp_path, *LONG)
    (first,) = ranks(1, FAULTY, "none", "0", "0", str(file))
    wait_for_lines(tmp_path / "tiny", [5])
    (second,) = ranks(1, FAULTY, "none", "0", "0", str(file))
    code, output = finish(second)
    assert code == 2
    assert re.search(rf"error: .*tiny: process {first.pid} of \S+ trains there, expected nobody", output)
    assert first.poll() is None
    first.kill()
    first.communicate()
    # the lock died with its process
    (third,) = ranks(1, FAULTY, "none", "0", "0", str(file), "train.log_every=1")
    wait_for_lines(tmp_path / "tiny", [1, 2])
    third.terminate()
    code, output = finish(third)
    assert code == 3, output
    assert status(tmp_path / "tiny")["state"] == "stopped"
