import contextlib
import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import latent_folders
import numpy as np
import pytest
import tiny
import tiny_vae
import torch
from PIL import Image
from processes import TIMINGS

from soflow import checkpoint
from soflow.audit import audit
from soflow.config import Config, EngineConfig
from soflow.config_file import ConfigError, dump_config, load_config
from soflow.data import ArraySource, DataError, DigitsSource
from soflow.distributed import Processes
from soflow.images import to_uint8
from soflow.log import NullLog
from soflow.run_folder import RunError, load_flow
from soflow.sampling import sample, sample_noise
from soflow.step import gap_ratio_at
from soflow.times import at_least_gap
from soflow.trainer import DivergedError, Trainer, configure_torch, require_matching_data
from soflow.vae import VaeError, load_vae

ALONE = Processes(0, 1, torch.device("cpu"))


def train(config: Config, until: int | None = None) -> Trainer:
    trainer = Trainer(config, ALONE)
    trainer.fit(until)
    return trainer


def metrics(trainer: Trainer) -> list[dict]:
    lines = (trainer.folder.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in lines]


def assert_same_state(a: Trainer, b: Trainer) -> None:
    averages = ((x.network, y.network) for x, y in zip(a.averages, b.averages, strict=True))
    for x, y in ((a.flow.network, b.flow.network), *averages):
        for name, tensor in x.state_dict().items():
            assert torch.equal(tensor, y.state_dict()[name]), name
    state_a, state_b = a.optimizer.state_dict(), b.optimizer.state_dict()
    assert state_a["param_groups"] == state_b["param_groups"]
    assert state_a["state"].keys() == state_b["state"].keys()
    for index, entries in state_a["state"].items():
        for key, value in entries.items():
            assert torch.equal(value, state_b["state"][index][key]), (index, key)
    assert metrics(a) == metrics(b)


def test_loss_falls(tmp_path):
    overrides = ("train.total_steps=120", "train.log_every=40", "train.batch_size=32", "optim.lr=3e-3")
    lines = metrics(train(tiny.config(tmp_path, *overrides)))
    assert [line["step"] for line in lines] == [40, 80, 120]
    assert lines[-1]["loss/velocity_mse"] < 0.8 * lines[0]["loss/velocity_mse"]


@pytest.mark.parametrize(
    "settings", [("ema.profiles=[0.05,0.1]",), ("optim.name=radam", "ema.every=3", "ema.dtype=float64")]
)
@pytest.mark.parametrize("stop", range(1, 8))
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, stop, settings):
    whole = train(tiny.config(tmp_path / "whole", *settings))
    config = tiny.config(tmp_path / "parts", *settings)
    train(config, until=stop)
    resumed = Trainer(config, ALONE)
    assert resumed.finished == stop
    assert resumed.fit()
    assert_same_state(resumed, whole)


@pytest.mark.parametrize("feeder", ["resident", "plain"])
def test_an_own_source_trains_as_the_data_set_it_holds(tmp_path, feeder):
    """To the bit as the digits do, resumed as well; other data are refused then, and its samples need none."""
    digits = DigitsSource("train")
    config = tiny.config(tmp_path / "own", "data.source=own", f"data.feeder={feeder}")
    Trainer(config, ALONE, source=digits).fit(until=4)
    with pytest.raises(RunError, match="got a checkpoint of the data set"):
        Trainer(config, ALONE, source=ArraySource(-digits.images, digits.labels))
    with pytest.raises(DataError, match=r"^data.source: got 'own' and no source"):
        Trainer(config, ALONE)
    own = Trainer(config, ALONE, source=digits)
    assert own.fit()
    assert_same_state(own, train(tiny.config(tmp_path / "digits")))
    assert load_flow(own.folder.path)[1] == 8


def test_a_source_that_is_not_asked_for_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"^data.source: got 'digits', expected 'own'"):
        Trainer(tiny.config(tmp_path), ALONE, source=DigitsSource("train"))
    assert not list(tmp_path.iterdir())


def test_an_own_source_of_latents_needs_a_vae_for_its_grids(tmp_path):
    source = ArraySource(torch.zeros(12, 4, 8, 8), torch.arange(12) % 10)
    own = ("data.source=own", "network.in_channels=4")
    with pytest.raises(RunError, match=r"^train.sample_every: got 4, expected 0, or a VAE in train.sample_vae"):
        Trainer(tiny.config(tmp_path, *own, "train.sample_every=4"), ALONE, source=source)
    assert not list(tmp_path.iterdir())
    vae = tiny_vae.save(tmp_path / "vae")
    grids = ("train.total_steps=1", "train.sample_every=1", f"train.sample_vae={vae}")
    trainer = Trainer(tiny.config(tmp_path, *own, *grids), ALONE, source=source)
    assert trainer.fit()
    assert (trainer.folder.samples / "step-00000001.png").exists()


def test_resume_repeats_what_was_not_saved(tmp_path):
    """Killed after step 7 with a checkpoint at 4: steps 5 to 7 run again, and no line of the metrics is doubled."""
    config = tiny.config(tmp_path / "parts", "train.checkpoint_every=4", "train.log_every=1")
    interrupted = Trainer(config, ALONE)
    interrupted.fit(until=7)
    (newest,) = [f for f in interrupted.folder.checkpoints.glob("step-*") if f.name.endswith("7")]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    resumed = Trainer(config, ALONE)
    assert resumed.finished == 4
    resumed.fit()
    assert_same_state(resumed, train(tiny.config(tmp_path / "whole", "train.log_every=1")))


def test_same_seed_repeats_and_another_differs(tmp_path):
    a, b = train(tiny.config(tmp_path / "a")), train(tiny.config(tmp_path / "b"))
    assert_same_state(a, b)
    other = train(tiny.config(tmp_path / "c", "seed=4"))
    assert metrics(other) != metrics(a)


def test_fused_ops_train_the_same_on_the_cpu(tmp_path):
    """Where they are their reference behind the bindings: losses of 8 steps equal to rounding."""
    lines = [metrics(train(tiny.config(tmp_path / ops, f"engine.ops={ops}"))) for ops in ("fused", "reference")]
    for fused, reference in zip(*lines, strict=True):
        assert fused == pytest.approx(reference, rel=1e-4)


def test_method_is_watched(tmp_path):
    """Means over an interval of what each step's batch and network say, and nothing where no row looks ahead."""
    trainer = train(tiny.config(tmp_path, "train.log_every=4"))
    first, last = metrics(trainer)
    assert 0 < first["method/lipschitz"] < last["method/lipschitz"]
    # times depend on the step and the place in the batch, not on the samples
    samples = trainer.source.read(np.arange(12))
    batches = [batch for step in range(4, 8) for batch in trainer.step.draw(*samples, *trainer.step.clock(step))]
    shares = [at_least_gap(batch.t, batch.l)[batch.num_velocity :].double().mean().item() for batch in batches]
    assert last["method/min_gap_share"] == pytest.approx(sum(shares) / 4)
    assert 0 < last["method/min_gap_share"] < 1
    assert first["method/guidance_collapse"] == 0
    (line, *_) = metrics(train(tiny.config(tmp_path / "velocity", "objective.fm_ratio=1.0")))
    assert not [name for name in line if name.startswith("method/")]


def test_the_gap_of_the_log_is_that_of_the_last_step(tmp_path):
    config = tiny.config(tmp_path)
    lines = metrics(train(config))
    assert [line["gap_ratio"] for line in lines] == [gap_ratio_at(config, line["step"] - 1) for line in lines]


def test_collapse_is_told_once_and_survives_a_resume(tmp_path, monkeypatch, capsys):
    measured = Trainer._interval_means

    def collapsing(trainer: Trainer) -> dict[str, float]:
        return measured(trainer) | {"loss/velocity_mse": 1.0, "loss/consistency_mse": 0.8**trainer.finished}

    monkeypatch.setattr(Trainer, "_interval_means", collapsing)
    overrides = ("train.total_steps=12", "train.log_every=1")
    whole = train(tiny.config(tmp_path / "whole", *overrides))
    assert [line["method/guidance_collapse"] for line in metrics(whole)] == [0.0] * 9 + [1.0] * 3
    assert capsys.readouterr().out.count("warning: guidance may be collapsing") == 1
    config = tiny.config(tmp_path / "parts", *overrides)
    for stop in (7, 11, 12):
        parts = train(config, until=stop)
    assert_same_state(parts, whole)
    assert capsys.readouterr().out.count("warning: guidance may be collapsing") == 1


@pytest.mark.parametrize("fm_ratio", [0.0, 1.0])
def test_either_loss_alone_trains(tmp_path, fm_ratio):
    line = metrics(train(tiny.config(tmp_path, f"objective.fm_ratio={fm_ratio}")))[-1]
    absent = "velocity" if fm_ratio == 0 else "consistency"
    assert line[f"loss/{absent}_mse"] == 0


def test_unconditional_training(tmp_path):
    overrides = ("network.num_classes=0", "objective.cfg_scale=1.0", "objective.mix_ratio=1.0", "train.sample_every=4")
    trainer = train(tiny.config(tmp_path, *overrides))
    rows = trainer.source.read(np.arange(len(trainer.step.positions)))
    (batch,) = trainer.step.draw(*rows, *trainer.step.clock(0))
    assert batch.labels is None
    assert len(list(trainer.folder.samples.glob("*.png"))) == 2


def test_finished_run_is_left_as_it_is(tmp_path):
    config = tiny.config(tmp_path)
    first = train(config)
    files = {path: path.stat().st_mtime_ns for path in first.folder.checkpoints.rglob("*") if path.is_file()}
    again = Trainer(config, ALONE)
    assert again.fit()
    assert_same_state(again, first)
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_what_a_kill_in_the_last_save_left_goes_when_the_run_is_started_again(tmp_path):
    config = tiny.config(tmp_path)
    checkpoints = train(config).folder.checkpoints
    before = sorted(checkpoints.iterdir())
    shutil.copytree(checkpoints / "step-00000008", checkpoints / "step-00000004.old.tmp")
    (checkpoints / "LATEST.tmp").write_text("step")
    assert train(config).finished == 8
    assert sorted(checkpoints.iterdir()) == before


def test_a_run_keeps_its_newest_checkpoints_and_its_milestones(tmp_path):
    kept = ("train.checkpoint_every=1", "train.keep_last=1", "train.keep_every=3")
    run = train(tiny.config(tmp_path, *kept)).folder
    assert list(checkpoint.saved_steps(run.checkpoints)) == [3, 6, 8]


def test_checkpoints_on_a_disk_that_is_not_there_are_no_reason_to_start_again(tmp_path):
    config = tiny.config(tmp_path)
    folder = train(config).folder
    folder.checkpoints.rename(tmp_path / "disk")
    folder.checkpoints.symlink_to(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="checkpoints"):
        Trainer(config, ALONE)
    folder.checkpoints.unlink()
    folder.checkpoints.symlink_to(tmp_path / "disk")
    assert len(metrics(train(config))) == 3


def test_run_folder_of_another_model_is_refused(tmp_path):
    train(tiny.config(tmp_path), until=2)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError, match=r"network\.hidden_size.*16.*32"):
        Trainer(tiny.config(tmp_path, "network.hidden_size=32"), ALONE)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "change",
    [
        "train.log_every=1",
        "train.checkpoint_every=5",
        "train.keep_last=5",
        "train.keep_every=3",
        "train.accumulation=2",
        "data.feeder=plain",
        "data.prefetch=5",
        "optim.max_bad_steps=7",
        "engine.recompute=norms",
        "engine.deterministic=false",
        "engine.threads=1",
        "engine.timeout_s=99",
        "engine.grace_s=9",
    ],
)
def test_settings_that_compute_nothing_may_change(tmp_path, change):
    train(tiny.config(tmp_path), until=1)
    assert Trainer(tiny.config(tmp_path, change), ALONE).finished == 1


@pytest.mark.parametrize(
    "change",
    [
        "seed=4",
        "flow.path=trig",
        "objective.loss_eps=0.1",
        "times.s_std=0.9",
        "train.batch_size=13",
        "optim.lr=2e-3",
        "ema.decay=0.8",
        "engine.precision=bf16",
    ],
)
def test_settings_that_compute_something_may_not_change(tmp_path, change):
    train(tiny.config(tmp_path), until=1)
    name, _ = change.split("=")
    with pytest.raises(RunError, match=rf"belongs to another configuration \(there, here\): {name}: "):
        Trainer(tiny.config(tmp_path, change), ALONE)


def test_a_run_whose_grids_are_refused_by_now_is_still_read(tmp_path, monkeypatch):
    config = tiny.config(tmp_path, "flow.sampler=heun", "train.sample_every=4", "train.sample_nfe=2")
    with monkeypatch.context() as older:
        older.setattr("soflow.run_folder.dump_config", lambda c: dump_config(c).replace("nfe: 2", "nfe: 1"))
        folder = train(config, until=2).folder
    with pytest.raises(ConfigError, match=r"train\.sample_nfe: got 1"):
        load_config(folder.config)
    assert Trainer(config, ALONE).finished == 2
    assert Trainer(config, ALONE, folder.checkpoints / "step-00000002").finished == 2
    assert load_flow(folder.path)[1] == 2


def test_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match=r"without config\.yaml"):
        Trainer(tiny.config(tmp_path), ALONE)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="got a file"):
        Trainer(tiny.config(tmp_path, "name=file"), ALONE)


def test_folder_of_the_official_code_is_refused(tmp_path):
    (tmp_path / "tiny" / "checkpoints").mkdir(parents=True)
    (tmp_path / "tiny" / "config.yaml").write_text("working_dir: exps/tiny\n")
    with pytest.raises(ConfigError, match=r"tiny/config\.yaml: got a configuration of the official code, expected one"):
        Trainer(tiny.config(tmp_path), ALONE)


def test_a_disk_that_is_full_at_first_is_named_and_leaves_the_name_usable(tmp_path):
    config = tiny.config(tmp_path)
    for limit, file in ((0, "lock"), (100, "config.yaml")):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(OSError, match=rf"File too large: '.*/tiny/{file}'"):
                Trainer(config, ALONE).fit()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["lock"]
    (tmp_path / "tiny" / "config.yaml.tmp").write_text("name: ti")  # as kill -9 leaves it
    assert train(config).finished == 8


def test_resume_from_a_named_checkpoint(tmp_path):
    config = tiny.config(tmp_path, "train.checkpoint_every=2")
    train(config, until=6)
    start = tmp_path / "tiny" / "checkpoints" / "step-00000004"
    assert Trainer(config, ALONE, resume=start).finished == 4
    flipped = start / "model.safetensors"
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    with pytest.raises(checkpoint.CheckpointError, match=r"model\.safetensors"):
        Trainer(config, ALONE, resume=start)


def test_a_trainer_goes_on_from_no_state_that_another_left_behind_meanwhile(tmp_path):
    config = tiny.config(tmp_path, "train.log_every=2")
    late, whole = Trainer(config, ALONE), train(config)
    before = metrics(whole)
    with pytest.raises(RunError, match=r"got step 8 as the newest, expected 0, .* another job trained there meanwhile"):
        late.fit(until=5)
    assert metrics(whole) == before
    assert json.loads(whole.folder.status.read_text())["state"] == "complete"


def test_a_run_that_was_taken_back_goes_on_from_there(tmp_path, capsys):
    """Stopped right after, the same configuration continues it; not what the run once was. No line is missing."""
    config = tiny.config(tmp_path / "parts", "train.checkpoint_every=4", "train.log_every=1")
    checkpoints = train(config).folder.checkpoints
    back = Trainer(config, ALONE, resume=checkpoints / "step-00000004")
    back.fit(until=4)  # no step, nothing taken back
    assert checkpoint.newest(checkpoints).name == "step-00000008"
    assert len(metrics(back)) == 8
    back.fit(until=5)
    assert "dropped" in capsys.readouterr().out
    assert sorted(path.name for path in checkpoints.iterdir()) == ["LATEST", "step-00000004", "step-00000005"]
    again = Trainer(config, ALONE)
    assert again.finished == 5
    again.fit()
    assert_same_state(again, train(tiny.config(tmp_path / "whole", "train.log_every=1")))


def test_a_run_that_is_killed_when_it_was_just_taken_back_has_no_gap(tmp_path, monkeypatch):
    config = tiny.config(tmp_path, "train.checkpoint_every=4", "train.log_every=1")
    checkpoints = train(config).folder.checkpoints
    with monkeypatch.context() as killed:
        killed.setattr(Trainer, "_train_step", lambda self: os.kill(os.getpid(), signal.SIGKILL))
        child = os.fork()
        if child == 0:
            Trainer(config, ALONE, resume=checkpoints / "step-00000004").fit()
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    again = train(config)
    assert [line["step"] for line in metrics(again)] == list(range(1, 9))


def test_a_trainer_takes_no_folder_that_became_another_configuration_s(tmp_path):
    late = Trainer(tiny.config(tmp_path, "seed=4"), ALONE)
    first = train(tiny.config(tmp_path), until=0)
    with pytest.raises(RunError, match="seed: 3, 4"):
        late.fit()
    assert not first.folder.checkpoints.exists()


def test_a_trainer_that_was_not_started_leaves_nothing(tmp_path):
    Trainer(tiny.config(tmp_path), ALONE)
    assert not list(tmp_path.iterdir())


def test_resume_from_nowhere_leaves_nothing(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="nowhere"):
        Trainer(tiny.config(tmp_path), ALONE, resume=tmp_path / "nowhere")
    assert not (tmp_path / "tiny").exists()


def test_checkpoint_of_another_data_set_is_refused(tmp_path):
    config = tiny.config(tmp_path)
    train(config, until=2)
    trainer = Trainer(config, ALONE)
    trainer.source.fingerprint = "another"
    with pytest.raises(RunError, match="another"):
        trainer._restore(tmp_path / "tiny" / "checkpoints" / "step-00000002")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("network.in_channels=3", r"network\.in_channels: got 3, expected 1"),
        ("network.input_size=16", r"network\.input_size: got 16, expected 8"),
        ("network.num_classes=7", r"network\.num_classes: got 7, expected 10"),
        ("train.batch_size=5000", r"train\.batch_size: got 5000, expected at most"),
    ],
)
def test_network_that_does_not_fit_the_data_is_refused(tmp_path, override, message):
    with pytest.raises(RunError, match=message):
        Trainer(tiny.config(tmp_path, override), ALONE)
    assert not (tmp_path / "tiny").exists()


def test_every_process_needs_a_row(tmp_path):
    with pytest.raises(RunError, match=r"train\.batch_size: got 12, expected at least 13"):
        Trainer(tiny.config(tmp_path), Processes(0, 13, torch.device("cpu")))
    with pytest.raises(RunError, match=r"got 12, expected at least 14, processes times train\.accumulation"):
        Trainer(tiny.config(tmp_path, "train.accumulation=7"), Processes(0, 2, torch.device("cpu")))


def test_divergence_stops_with_a_diagnosis_and_writes_no_checkpoint(tmp_path):
    trainer = Trainer(tiny.config(tmp_path), ALONE)
    with torch.no_grad():
        trainer.flow.network.final_layer.linear.bias.fill_(float("nan"))
    with pytest.raises(DivergedError, match=r"step 3: .*loss/total"):
        trainer.fit()
    assert checkpoint.newest(trainer.folder.checkpoints) is None


@pytest.mark.parametrize("fails", [False, True])
def test_the_captured_step_is_let_go_when_a_training_ends(tmp_path, monkeypatch, fails):
    """Processes could not part otherwise."""
    trainer = Trainer(tiny.config(tmp_path, "train.total_steps=2"), ALONE)
    ends = []
    monkeypatch.setattr(trainer.step, "release", lambda: ends.append(trainer.finished))
    if fails:
        monkeypatch.setattr(trainer.feeder, "seek", lambda step: 1 / 0)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        trainer.fit()
    assert ends == [0 if fails else 2]


def test_a_save_between_two_lines_of_the_log_refuses_a_loss_that_is_not_finite(tmp_path):
    trainer = Trainer(tiny.config(tmp_path), ALONE)
    with torch.no_grad():
        trainer.flow.network.final_layer.linear.bias.fill_(float("nan"))
    with pytest.raises(
        DivergedError, match="step 2: the loss or its gradient is not finite; no checkpoint was written"
    ):
        trainer.fit(until=2)
    assert checkpoint.newest(trainer.folder.checkpoints) is None


def test_steps_without_a_finite_gradient_are_skipped_and_counted(tmp_path):
    """Weights, averages and the means of the log are those of the other steps; a run of nothing else stops."""
    trainer = Trainer(
        tiny.config(tmp_path, "optim.nonfinite=skip", "optim.max_bad_steps=3", "train.total_steps=9"), ALONE
    )
    bias = trainer.flow.network.final_layer.linear.bias
    hook = bias.register_hook(lambda grad: grad * (float("nan") if trainer.finished in (1, 6, 7, 8) else 1.0))
    with pytest.raises(DivergedError, match=r"step 9: 3 step\(s\) in a row had no finite gradient"):
        trainer.fit()
    hook.remove()
    lines = metrics(trainer)
    assert [line["skipped_steps"] for line in lines] == [1, 0]
    assert lines[0]["loss/total"] == pytest.approx(lines[1]["loss/total"], rel=0.5)
    assert trainer.optimizer.skipped == 4
    for network in (trainer.flow.network, trainer.ema.network):
        assert all(torch.isfinite(p).all() for p in network.parameters())


@pytest.mark.parametrize(("bad", "until", "checkpoint_every"), [(8, None, 100), (6, 6, 100), (4, None, 4)])
def test_a_bad_gradient_is_not_missed_by_what_is_saved(tmp_path, monkeypatch, bad, until, checkpoint_every):
    """Where a step's count is known late, as on a GPU: at the end of a run, at a stop, and at a checkpoint."""
    settings = ("optim.nonfinite=stop", "train.log_every=100", f"train.checkpoint_every={checkpoint_every}")
    trainer = Trainer(tiny.config(tmp_path, *settings), ALONE)
    count = trainer.step.most_bad_in_row
    monkeypatch.setattr(trainer.step, "most_bad_in_row", lambda wait=False: count() if wait else 0)
    bias = trainer.flow.network.final_layer.linear.bias
    bias.register_hook(lambda grad: grad * (float("nan") if trainer.finished == bad - 1 else 1.0))
    with pytest.raises(DivergedError, match=rf"step {bad}: 1 step\(s\) in a row had no finite gradient"):
        trainer.fit(until)
    assert json.loads(trainer.folder.status.read_text())["state"] == "failed"
    # or the run would go on behind that step when it is started again
    assert checkpoint.newest(trainer.folder.checkpoints) is None


@pytest.mark.parametrize("num_processes", [3, 6, 7])
def test_an_interval_that_many_processes_skipped_has_no_means(tmp_path, num_processes):
    """Each adds its part of 1 per step, and thirds of them do not sum to whole numbers."""
    trainer = Trainer(tiny.config(tmp_path, "optim.nonfinite=skip"), ALONE)
    for _ in range(3 * num_processes):
        trainer.step.sums[-1] += 1.0 / num_processes
    trainer.step.num_summed = trainer.finished = 3
    means = trainer._interval_means()
    assert means["skipped_steps"] == 3.0
    assert math.isnan(means["loss/total"])


def test_a_checkpoint_is_hashed_once_when_it_is_continued(tmp_path, monkeypatch):
    config = tiny.config(tmp_path)
    train(config, until=2)
    hashed = []
    fingerprint = checkpoint.steps.fingerprint
    monkeypatch.setattr(checkpoint.steps, "fingerprint", lambda path: hashed.append(path.name) or fingerprint(path))
    for resume in (None, tmp_path / "tiny" / "checkpoints" / "step-00000002"):
        hashed.clear()
        assert Trainer(config, ALONE, resume).finished == 2
        assert sorted(hashed) == ["ema.safetensors", "meta.json", "model.safetensors", "optimizer.pt"]


def test_a_save_that_fails_stops_the_run_at_the_next_step(tmp_path, monkeypatch):
    trainer = Trainer(tiny.config(tmp_path, "train.checkpoint_every=2", "train.total_steps=50"), ALONE)
    trainer.fit(until=2)
    done = threading.Event()

    def refuse(*args, **keywords):
        done.set()
        raise checkpoint.CheckpointError("disk full")

    monkeypatch.setattr(checkpoint.writer, "save", refuse)
    run = Trainer._train_step

    def step_of_a_large_model(self: Trainer) -> None:
        run(self)
        if self.finished > 4:
            assert done.wait(20)
            time.sleep(0.1)  # the thread has raised by then, too

    monkeypatch.setattr(Trainer, "_train_step", step_of_a_large_model)
    with pytest.raises(checkpoint.CheckpointError, match="disk full"):
        trainer.fit()
    assert trainer.finished == 5
    assert [path.name for path in trainer.folder.checkpoints.glob("step-*")] == ["step-00000002"]
    status = json.loads(trainer.folder.status.read_text())
    assert status == {"state": "failed", "step": 5, "reason": "disk full"}


def test_the_status_says_how_the_run_stands(tmp_path, monkeypatch):
    config = tiny.config(tmp_path)
    trainer = Trainer(config, ALONE)
    seen = []
    run = Trainer._train_step
    monkeypatch.setattr(Trainer, "_train_step", lambda self: (seen.append(self.folder.status.read_text()), run(self)))
    trainer.fit(until=2)
    assert {json.loads(text)["state"] for text in seen} == {"running"}
    assert json.loads(trainer.folder.status.read_text()) == {"state": "stopped", "step": 2, "reason": ""}
    trainer.fit()
    assert json.loads(trainer.folder.status.read_text()) == {"state": "complete", "step": 8, "reason": ""}


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    train(tiny.config(tmp_path), until=2)
    other = tmp_path / "tiny" / "checkpoints" / "step-00000002"
    with pytest.raises(RunError, match=r"optim\.lr: 0\.001, 0\.5"):
        Trainer(tiny.config(tmp_path, "name=other", "optim.lr=0.5"), ALONE, resume=other)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("nonfinite", ["stop", "step"])
def test_a_bad_gradient_stops_the_run_as_configured(tmp_path, nonfinite):
    config = tiny.config(tmp_path, f"optim.nonfinite={nonfinite}", "optim.max_bad_steps=2", "train.log_every=100")
    trainer = Trainer(config, ALONE)
    bias = trainer.flow.network.final_layer.linear.bias
    bias.register_hook(lambda grad: grad * (float("nan") if trainer.finished == 3 else 1.0))
    allowed = 1 if nonfinite == "stop" else 2
    with pytest.raises(DivergedError, match=rf"step {3 + allowed}: {allowed} step\(s\) in a row"):
        trainer.fit()
    finite = all(torch.isfinite(p).all() for p in trainer.flow.network.parameters())
    assert finite == (nonfinite == "stop")


def test_an_interval_without_a_finite_gradient_has_no_means(tmp_path):
    trainer = Trainer(tiny.config(tmp_path, "optim.nonfinite=skip"), ALONE)
    bias = trainer.flow.network.final_layer.linear.bias
    bias.register_hook(lambda grad: grad * (float("nan") if trainer.finished < 3 else 1.0))
    assert trainer.fit()
    assert [(line["skipped_steps"], line["loss/total"] is None) for line in metrics(trainer)] == [
        (3, True),
        (0, False),
        (0, False),
    ]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_saves_and_stops(tmp_path, signum):
    config = tiny.config(tmp_path / "parts", "train.total_steps=2000", "train.log_every=1000")
    trainer = Trainer(config, ALONE)
    handler = signal.getsignal(signum)
    threading.Timer(0.5, os.kill, (os.getpid(), signum)).start()
    assert not trainer.fit()
    assert 0 < trainer.finished < 2000
    assert signal.getsignal(signum) is handler
    assert checkpoint.load(checkpoint.newest(trainer.folder.checkpoints)).step == trainer.finished


def test_gradient_clipping_bounds_the_step(tmp_path):
    trainer = Trainer(tiny.config(tmp_path, "optim.clip_norm=1e-3"), ALONE)
    trainer._train_step()
    norm = torch.nn.utils.get_total_norm([p.grad for p in trainer.flow.network.parameters() if p.requires_grad])
    assert norm <= 1e-3 * (1 + 1e-5)


def test_sample_grids_are_drawn_from_the_average(tmp_path):
    trainer = train(tiny.config(tmp_path, "train.sample_every=4"))
    assert sorted(f.name for f in Path(trainer.folder.samples).iterdir()) == ["step-00000004.png", "step-00000008.png"]


def test_grids_are_drawn_by_the_configured_flow(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("soflow.trainer.sample", lambda flow, _, shape, *rest: drawn.append(flow) or torch.zeros(shape))
    settings = "flow={path: trig, parameterization: trig, sampler: chain}"
    trainer = train(tiny.config(tmp_path, settings, "train.total_steps=1", "train.sample_every=1"))
    (flow,) = drawn
    assert (flow.path, flow.parameterization, flow.sampler) == ("trig", "trig", "chain")
    assert flow.network is trainer.ema.network
    assert not flow.network.training


def test_either_kind_of_weights_is_read_for_inference(tmp_path, monkeypatch):
    """Of a run and of an official file."""
    trainer = train(tiny.config(tmp_path))
    states = {"ema": trainer.ema.network.state_dict(), "model": trainer.flow.network.state_dict()}
    official = tmp_path / "official.pt"
    checkpoint.save_official(official, **states, optimizer=trainer.optimizer.state_dict(), step=8, epochs=1)
    # the number of heads does not show in the weights of a size that is not official
    monkeypatch.setattr(checkpoint, "infer_dit_shape", partial(checkpoint.infer_dit_shape, num_heads=2))
    for path in (trainer.folder.path, official):
        for kind, state in states.items():
            flow, _ = load_flow(path, kind)
            assert not flow.network.training
            assert not any(p.requires_grad for p in flow.parameters())
            for name, tensor in flow.network.state_dict().items():
                assert torch.equal(tensor, state[name]), (kind, name)


@pytest.mark.parametrize(
    ("num_classes", "rows"), [(3, range(3)), (10, range(10)), (25, range(0, 20, 2)), (1000, range(0, 1000, 100))]
)
def test_the_rows_of_a_grid_are_classes_from_all_over(tmp_path, monkeypatch, num_classes, rows):
    trainer, drawn = train(tiny.config(tmp_path), until=0), []

    def draw(flow, labels, shape, *rest):
        drawn.append(labels.tolist())
        return torch.zeros(shape)

    monkeypatch.setattr("soflow.trainer.sample", draw)
    trainer.source = SimpleNamespace(image_shape=(1, 8, 8), num_classes=num_classes)
    trainer._draw_samples(NullLog())
    assert drawn == [[label for label in rows for _ in range(10)]]


def test_algorithms_are_those_that_give_the_same_bits_again_unless_told(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    for same_bits in (False, True):
        configure_torch(EngineConfig(deterministic=same_bits))
        assert torch.are_deterministic_algorithms_enabled() is same_bits
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    configure_torch(EngineConfig(deterministic=False))
    with pytest.raises(ValueError, match=r"CUBLAS_WORKSPACE_CONFIG: got ':0:0', expected :4096:8 or :16:8, or engine"):
        configure_torch(EngineConfig())


def test_products_in_tf32_are_those_of_that_precision_alone():
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    for precision in ("tf32", "fp32", "tf32", "bf16"):
        configure_torch(EngineConfig(precision=precision))
        assert [backend.allow_tf32 for backend in backends] == [precision == "tf32"] * 2


OBJECTIVES = {
    "meanflow": ("flow.sampler=chain",),
    "flow_matching": ("objective.fm_ratio=1", "flow.sampler=heun", "train.sample_nfe=2"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_other_objectives_train_resume_and_sample(tmp_path, name):
    settings = (f"objective.name={name}", *OBJECTIVES[name], "train.sample_every=4")
    whole = train(tiny.config(tmp_path / "whole", *settings))
    config = tiny.config(tmp_path / "parts", *settings)
    train(config, until=5)
    resumed = train(config)
    assert_same_state(resumed, whole)
    assert len(list(whole.folder.samples.glob("*.png"))) == 2
    flow, step = load_flow(whole.folder.path)
    assert (flow.sampler, step) == (config.flow.sampler, 8)


def test_unet_recipe_resumes_to_the_bit(tmp_path):
    """Dropout and augmentation too are drawn from seed, step and position alone."""
    whole = train(tiny.config(tmp_path / "whole", *tiny.UNET))
    torch.manual_seed(1)  # whatever was drawn before
    config = tiny.config(tmp_path / "parts", *tiny.UNET)
    train(config, until=3)
    torch.manual_seed(2)
    resumed = Trainer(config, ALONE)
    resumed.fit()
    assert_same_state(resumed, whole)


def test_dropout_does_not_depend_on_how_a_batch_is_split(tmp_path):
    trainer = Trainer(tiny.config(tmp_path, *tiny.UNET), ALONE)
    network = trainer.flow.network.train()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    rows = next(trainer.feeder)
    (batch,) = trainer.step.draw(rows.mean, rows.std, rows.labels, *trainer.step.clock(0), rows.augment_labels)
    arguments = (batch.x_0, batch.t, batch.s, None, batch.augment_labels, batch.draw_keys)
    whole = network(*arguments)
    cut = [[None if a is None else a[part] for a in arguments] for part in (slice(0, 5), slice(5, None))]
    torch.testing.assert_close(torch.cat([network(*part) for part in cut]), whole, rtol=1e-5, atol=1e-5)
    (later,) = trainer.step.draw(rows.mean, rows.std, rows.labels, *trainer.step.clock(1), rows.augment_labels)
    assert not torch.allclose(network(*arguments[:-1], later.draw_keys), whole, atol=1e-3)


def test_two_evaluations_with_dropout_share_their_masks(tmp_path):
    """Both look-aheads give a dF of the same size, because the keys of the draws are the same."""
    watched = []
    for lookahead in ("difference", "two_pass"):
        trainer = Trainer(tiny.config(tmp_path / lookahead, *tiny.UNET, f"objective.lookahead={lookahead}"), ALONE)
        rows = next(trainer.feeder)
        (batch,) = trainer.step.draw(rows.mean, rows.std, rows.labels, *trainer.step.clock(0), rows.augment_labels)
        network = trainer.flow.network.double()
        torch.manual_seed(0)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        double = {name: getattr(batch, name).double() for name in ("x_0", "x_1", "t", "l", "s", "augment_labels")}
        watched.append(trainer.step.objective(trainer.flow, dataclasses.replace(batch, **double)).watched)
    torch.testing.assert_close(watched[0], watched[1], rtol=1e-9, atol=1e-9)


def latents_config(tmp_path, root, *overrides):
    network = (
        "network={name: DiT, input_size: 4, in_channels: 4, num_classes: 3, patch_size: 2, hidden_size: 16, depth: 1"
    )
    return tiny.config(
        tmp_path,
        network + ", num_heads: 2}",
        f"data={{source: latents, root: {root}}}",
        "train.total_steps=6",
        *overrides,
    )


def test_latents_train_and_any_feeder_resumes_them_from_anywhere(tmp_path):
    latent_folders.write_latents(tmp_path / "latents")
    whole = train(latents_config(tmp_path / "whole", tmp_path / "latents"))
    train(latents_config(tmp_path / "parts", tmp_path / "latents"), until=4)
    (tmp_path / "latents").rename(tmp_path / "moved")
    resumed = Trainer(latents_config(tmp_path / "parts", tmp_path / "moved", "data.feeder=resident"), ALONE)
    assert resumed.finished == 4
    resumed.fit()
    assert_same_state(resumed, whole)


def test_the_folder_says_with_what_its_run_was_last_continued(tmp_path):
    """So that an audit finds data that were moved; a run that is refused, or was not started, changes nothing."""
    latent_folders.write_latents(tmp_path / "latents")
    first = train(latents_config(tmp_path / "runs", tmp_path / "latents"), until=2).folder
    written = first.config.stat().st_mtime_ns
    train(latents_config(tmp_path / "runs", tmp_path / "latents"), until=3)
    assert first.config.stat().st_mtime_ns == written
    (tmp_path / "latents").rename(tmp_path / "moved")
    moved = Trainer(latents_config(tmp_path / "runs", tmp_path / "moved"), ALONE)
    assert first.read_config().data.root == str(tmp_path / "latents")
    moved.fit()
    assert load_config(first.config) == moved.config
    assert len(list(audit(first.path, "newest", 4, 0))) == 1


def test_grids_of_latents_are_decoded_and_change_no_bit_of_the_training(tmp_path):
    latent_folders.write_latents(tmp_path / "latents")
    vae = tiny_vae.save(tmp_path)
    without = train(latents_config(tmp_path / "without", tmp_path / "latents"))
    grids = ("train.sample_every=4", f"train.sample_vae={vae}")
    drawing = train(latents_config(tmp_path / "drawing", tmp_path / "latents", *grids))
    assert_same_state(drawing, without)
    drawn = sorted(drawing.folder.samples.iterdir())
    assert [path.name for path in drawn] == ["step-00000004.png", "step-00000006.png"]
    with Image.open(drawn[-1]) as picture:
        assert (picture.size, picture.mode) == ((10 * 65 + 1, 3 * 65 + 1), "RGB")
        corner = np.asarray(picture)[1:65:8, 1:65:8]
    flow, _ = load_flow(drawing.folder.path)
    noise, _ = sample_noise(torch.arange(1), (4, 4, 4))
    latents = sample(flow, torch.zeros(1, dtype=torch.int64), (1, 4, 4, 4), noise=noise)
    expected = to_uint8(load_vae(str(vae), torch.device("cpu")).decode(latents))[0]
    assert np.abs(corner.astype(int) - expected.astype(int)).max() <= 1
    # it may come, move and go
    assert Trainer(latents_config(tmp_path / "drawing", tmp_path / "latents"), ALONE).finished == 6


def test_a_vae_that_cannot_draw_is_refused_before_anything_is_written(tmp_path):
    latent_folders.write_latents(tmp_path / "latents")
    for vae, message in (
        (tmp_path / "latents", "latents: expected a folder with config.json"),
        (tiny_vae.save(tmp_path, latent_channels=8), r"train\.sample_vae: got vae with latents of 8 .*, expected 4"),
    ):
        grids = ("train.sample_every=4", f"train.sample_vae={vae}")
        config = latents_config(tmp_path / "runs", tmp_path / "latents", *grids)
        with pytest.raises(VaeError, match=message):
            Trainer(config, ALONE)
    assert not (tmp_path / "runs").exists()


def test_state_of_another_data_set_is_refused(tmp_path):
    latent_folders.write_latents(tmp_path / "first")
    latent_folders.write_latents(tmp_path / "second", counts=(16,))
    train(latents_config(tmp_path / "runs", tmp_path / "first"), until=2)
    with pytest.raises(RunError, match=r"got a checkpoint of the data set [0-9a-f]{16}, expected [0-9a-f]{16}"):
        Trainer(latents_config(tmp_path / "runs", tmp_path / "second"), ALONE)


def test_latents_that_are_not_finite_stop_the_run_with_their_numbers(tmp_path):
    latents = latent_folders.write_latents(tmp_path / "latents", counts=(16,))
    latents[5, 0, 1, 1] = np.nan
    entry = latent_folders.write_npy(tmp_path / "latents" / "latents-00000.npy", latents)
    latent_folders.rewrite_manifest(tmp_path / "latents", shards=[entry])
    # at a line of the log, and at a checkpoint before it
    for until in (3, 2):
        trainer = Trainer(latents_config(tmp_path / "runs", tmp_path / "latents"), ALONE)
        with pytest.raises(DataError, match=rf"samples 5 hold NaN or infinity \(steps 0 to {until - 1}\)"):
            trainer.fit(until)
        assert not list(trainer.folder.checkpoints.glob("step-*"))


def test_a_killed_trainer_leaves_no_process(tmp_path):
    """A feeder has a thread, never a process: nothing is left of the whole group."""
    latent_folders.write_latents(tmp_path / "latents")
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        trainer = Trainer(
            latents_config(tmp_path / "runs", tmp_path / "latents", "train.total_steps=100000", "data.feeder=plain"),
            ALONE,
        )
        trainer.fit()
        os._exit(0)
    metrics_file = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    limit = time.monotonic() + 60
    try:
        while not metrics_file.exists() or not metrics_file.read_text():
            assert time.monotonic() < limit
            time.sleep(0.02)
        assert Path(f"/proc/{child}/task/{child}/children").read_text() == ""
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with pytest.raises(ProcessLookupError):
        os.killpg(child, 0)


@pytest.mark.parametrize(("engine", "expected"), [({}, []), ({"threads": 3}, [3])])
def test_the_threads_of_the_cpu_are_those_asked_for(monkeypatch, engine, expected):
    found = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    configure_torch(EngineConfig(**engine))
    assert found == expected


def test_the_meter_measures_training_alone(tmp_path, monkeypatch):
    """Each interval from its first step on, the wait for data apart, without the grids and the checkpoints."""
    events: list[str] = []

    def say(event: str, action: object = None) -> object:
        return lambda *args: events.append(event) or (action(*args) if callable(action) else {})

    def within(event: str):
        @contextlib.contextmanager
        def block() -> Iterator[None]:
            events.append(event)
            yield
            events.append("on")

        return block

    shape = ("train.total_steps=2", "train.log_every=1", "train.checkpoint_every=1", "train.sample_every=1")
    trainer = Trainer(tiny.config(tmp_path, *shape), ALONE)
    monkeypatch.setattr(trainer.feeder, "_read", say("rows", trainer.feeder._read))
    for name in ("_draw_samples", "_save"):
        monkeypatch.setattr(trainer, name, say(name, getattr(trainer, name)))
    told = {name: say(name) for name in ("restart", "count", "read")}
    trainer.meter = SimpleNamespace(**told, waiting=within("waiting"), paused=within("paused"))
    assert trainer.fit()
    interval = ["waiting", "rows", "on", "count", "read", "restart"]
    assert events == ["restart", *[*interval, "paused", "_draw_samples", "on", "paused", "_save", "on"] * 2]


def test_images_that_are_not_square_are_refused(tmp_path):
    for image_shape in ((1, 8, 6), (1, 6, 8)):
        source = SimpleNamespace(image_shape=image_shape, num_classes=10)
        with pytest.raises(RunError, match=r"network\.input_size: got 8, expected 6"):
            require_matching_data(tiny.config(tmp_path), source, world_size=1)
