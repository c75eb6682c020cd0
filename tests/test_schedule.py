import math

import pytest
import test_trainer
import tiny

from soflow.config import OptimConfig
from soflow.optim.schedule import learning_rate
from soflow.trainer import Trainer

BOTH = ("optim.warmup_steps=3", "optim.schedule=cosine", "train.log_every=1")


def rates(config: OptimConfig, total_steps: int) -> list[float]:
    return [learning_rate(config, total_steps, step) for step in range(total_steps)]


def test_constant_is_the_rate_itself():
    config = OptimConfig(lr=0.1 + 0.2)
    assert rates(config, 7) == [config.lr] * 7


def test_warm_up_rises_linearly_to_the_rate():
    assert rates(OptimConfig(lr=4.0, warmup_steps=4), 7) == [1.0, 2.0, 3.0, 4.0, 4.0, 4.0, 4.0]


def test_cosine_falls_to_0_at_the_end():
    found = [*rates(OptimConfig(lr=2.0, schedule="cosine"), 4), learning_rate(OptimConfig(schedule="cosine"), 4, 4)]
    half = 2**-0.5
    assert found == pytest.approx([2.0, 1.0 + half, 1.0, 1.0 - half, 0.0])


def test_cosine_begins_after_warm_up():
    found = rates(OptimConfig(lr=2.0, warmup_steps=2, schedule="cosine"), 4)
    assert found == pytest.approx([1.0, 2.0, 2.0, 1.0])


@pytest.mark.parametrize("warmup", [-1, 8])
def test_a_warm_up_beyond_the_run_is_refused(warmup, tmp_path):
    with pytest.raises(ValueError, match=rf"optim\.warmup_steps: got {warmup}, expected from 0 to below .*, 8"):
        tiny.config(tmp_path, f"optim.warmup_steps={warmup}")


@pytest.mark.parametrize("stop", [2, 5])
def test_resumes_to_the_bit(stop, tmp_path):
    whole = test_trainer.train(tiny.config(tmp_path / "whole", *BOTH))
    config = tiny.config(tmp_path / "parts", *BOTH)
    test_trainer.train(config, until=stop)
    resumed = Trainer(config, test_trainer.ALONE)
    assert resumed.fit()
    test_trainer.assert_same_state(resumed, whole)
    written = [line["learning_rate"] for line in test_trainer.metrics(whole)]
    assert written == rates(config.optim, 8)
    assert max(written) == written[2] == config.optim.lr


def test_every_step_moves_by_its_rate(tmp_path):
    """AdamW's first step is the rate itself, wherever there is a gradient."""
    moved = []
    for name, settings in (("constant", ()), ("warm-up", ("optim.warmup_steps=4",))):
        trainer = Trainer(tiny.config(tmp_path / name, *settings), test_trainer.ALONE)
        before = [param.detach().clone() for param in trainer.flow.parameters()]
        trainer.fit(until=1)
        after = trainer.flow.parameters()
        moved.append(math.sqrt(sum((a - b).double().square().sum().item() for a, b in zip(after, before, strict=True))))
    assert moved[0] > 0
    assert moved[1] == pytest.approx(moved[0] / 4, rel=1e-3)
