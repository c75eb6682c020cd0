"""`soflow train` with a fault: faulty.py FAULT RANK STEP CONFIG [overrides]; in process RANK, at the 0-based STEP.

At the end each process prints the digest of its weights and averages, and whether they are finite.
"""

import dataclasses
import hashlib
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from soflow import step as step_module
from soflow import trainer as trainer_module
from soflow.checkpoint import writer
from soflow.cli import main
from soflow.data import DataError
from soflow.data.feeder import Feeder
from soflow.trainer import Trainer

FAULT, RANK, STEP = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
HERE = int(os.environ["RANK"]) == RANK
FIRST_LIFE = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "term": signal.SIGTERM,
    "usr1": signal.SIGUSR1,
}
trainers: list[Trainer] = []


def at_step(action: Callable[[], Any]) -> None:
    """Do `action` before the step in question, once."""
    train_step = Trainer._train_step

    def faulty(self: Trainer) -> None:
        if HERE and FIRST_LIFE and self.finished == STEP:
            action()
        train_step(self)

    Trainer._train_step = faulty


def break_loss(last_step: float) -> None:
    """Make the loss of this process NaN from STEP to `last_step`."""
    forward = step_module._Losses.forward

    def faulty(self: Any, batch: Any) -> Any:
        out = forward(self, batch)
        bad = HERE and STEP <= trainers[0].finished <= last_step
        return dataclasses.replace(out, loss=out.loss * torch.nan) if bad else out

    step_module._Losses.forward = faulty


def break_loader(action: Callable[[], Any]) -> None:
    """Do `action` instead of giving the batch of the step in question."""
    give = Feeder.__next__

    def faulty(self: Any) -> Any:
        if HERE and self.step == STEP:
            action()
        return give(self)

    Feeder.__next__ = faulty


def fail() -> None:
    raise DataError("shard 7: got nonsense, expected latents")


def signals_in_save() -> None:
    """Send SIGTERM twice while a checkpoint is written."""
    save = writer.save

    def faulty(*args: Any, **keywords: Any) -> Any:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
        return save(*args, **keywords)

    writer.save = faulty


def slow_save() -> None:
    """Take seconds to write a checkpoint."""
    save = writer.save

    def slow(*args: Any, **keywords: Any) -> Any:
        time.sleep(4)
        return save(*args, **keywords)

    writer.save = slow


def fill_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


if FAULT in SIGNALS:
    at_step(lambda: os.kill(os.getpid(), SIGNALS[FAULT]))
elif FAULT == "disk":
    at_step(fill_disk)
elif FAULT == "term-in-save":
    signals_in_save()
elif FAULT == "slow-save":
    slow_save()
elif FAULT in ("nan", "nan-forever"):
    break_loss(STEP if FAULT == "nan" else float("inf"))
elif FAULT.startswith("loader"):
    break_loader(
        {"loader-raises": fail, "loader-hangs": lambda: time.sleep(1000), "loader-dies": lambda: os._exit(7)}[FAULT]
    )
else:
    assert FAULT == "none"


class Recorded(Trainer):
    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        trainers.append(self)


trainer_module.Trainer = Recorded
code = main(["train", *sys.argv[4:]])
for trainer in trainers:
    tensors = [*trainer.flow.network.state_dict().values(), *trainer.ema.network.state_dict().values()]
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
    print(f"weights {digest} {'finite' if finite else 'not finite'} after {trainer.finished}", flush=True)
sys.exit(code)
