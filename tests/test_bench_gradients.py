import sys

import pytest

from bench import gradients
from soflow.cli import main
from soflow.config_file import load_config

SMALL = ("network.hidden_size=32", "network.num_heads=1", "network.depth=1", "train.batch_size=16")


@pytest.mark.parametrize("parts", [1, 16])
def test_each_precision_has_its_error(parts):
    errors = gradients.measure(load_config(gradients.RECIPE, [*SMALL, f"train.accumulation={parts}"]))
    assert errors["fp32"] < 1e-5
    assert 1e-4 < errors["bf16"] < 1e-2
    assert errors["next batch"] > 0.05


def test_a_run_has_its_own_weights_and_batch(tmp_path, monkeypatch, capsys):
    small = [*SMALL, "train.total_steps=2", "train.sample_every=0", "train.checkpoint_every=2"]
    assert main(["train", str(gradients.RECIPE), *small, f"output_dir={tmp_path}"]) == 0
    monkeypatch.setattr(gradients, "load_config", lambda path, changes: load_config(path, [*SMALL, *changes]))
    tables = []
    for options in ([], ["--run", str(tmp_path / "digits")]):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["bench.gradients", "--parts", "1", "2", *options])
        gradients.main()
        tables.append([line.split() for line in capsys.readouterr().out.splitlines()])
    for table in tables:
        assert [row[0] for row in table] == ["parts", "1", "2"]
    assert tables[0][1:] != tables[1][1:]
