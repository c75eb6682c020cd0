"""Trainings compared: of two steps, with the judge as it is."""

import json

import pytest

from bench import objectives, precision, trainings
from bench.trainings import Variant, compare
from soflow.config_file import load_config

VARIANTS = {
    "one": Variant((), (("renoise", (1, 2)),)),
    "two": Variant(("engine.precision=bf16",), (("renoise", (1,)),)),
}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(trainings, "TIMED_ROUNDS", 1)
    monkeypatch.setattr(trainings, "TIMED_STEPS", 1)


@pytest.mark.slow
def test_trains_judges_prints_and_does_nothing_twice(tmp_path, capsys, monkeypatch, quick):
    arguments = [
        "--steps",
        "2",
        "--seeds",
        "1",
        "--runs",
        str(tmp_path / "runs"),
        "--results",
        str(tmp_path / "x.json"),
    ]
    assert compare("doc", VARIANTS, "question", 3, arguments) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert result["runs"].keys() == result["costs"].keys() == VARIANTS.keys()
    assert [(s["sampler"], s["nfe"]) for s in result["runs"]["one"][0]["samples"]] == [("renoise", 1), ("renoise", 2)]
    assert all(cost["step_s"] > 0 and cost["memory_mib"] > 1 for cost in result["costs"].values())
    assert load_config(tmp_path / "runs" / "two-0" / "config.yaml").engine.precision == "bf16"
    assert "| one | renoise | 2 |" in printed

    monkeypatch.setattr(trainings, "train", lambda settings, run: pytest.fail(f"{run} is trained again"))
    assert compare("doc", VARIANTS, "question", 3, arguments) == 0
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["runs"] == result["runs"]


def test_a_training_that_fails_is_named(tmp_path, capsys, quick):
    broken = {"broken": Variant(("train.batch_size=100000",), (("renoise", (1,)),))}
    assert compare("doc", broken, "question", 1, ["--steps", "2", "--runs", str(tmp_path)]) == 1
    assert "broken-0: training ended with exit code 2, expected 0" in capsys.readouterr().err


def test_mean_and_spread():
    assert trainings.spread([1.0, 2.0, 3.0], 2) == "2.00 +- 1.00"
    assert trainings.spread([1.5], 1) == "1.5"


@pytest.mark.parametrize("bench", [objectives, precision], ids=lambda bench: bench.__name__)
def test_every_variant_is_a_configuration(bench, tmp_path):
    for name, variant in bench.VARIANTS.items():
        config = load_config(trainings.CONFIG, trainings.overrides(variant, name, 4, 10, tmp_path))
        assert (config.name, config.seed, config.train.total_steps) == (f"{name}-4", 4, 10)
