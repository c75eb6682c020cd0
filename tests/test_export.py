"""What soflow export writes: the same weights under the same names, a shape that builds the network, a true card."""

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from soflow.checkpoint import CheckpointError
from soflow.cli import main
from soflow.distributed import Processes
from soflow.export import read_export
from soflow.run_folder import load_flow
from soflow.trainer import Trainer

OFFICIAL = Path(__file__).parent / "golden" / "official_checkpoint_tiny.pt"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    torch.use_deterministic_algorithms(True)
    trainer = Trainer(
        tiny.config(tmp_path_factory.mktemp("run"), "flow.path=trig"), Processes(0, 1, torch.device("cpu"))
    )
    trainer.fit(until=3)
    return trainer.folder.path


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_an_export_is_the_same_generator(tmp_path, run, weights):
    out = tmp_path / "new" / "export"
    assert main(["export", str(run), str(out), "--weights", weights]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1
    (ours, step), (theirs, expected_step) = load_flow(out), load_flow(run, weights)
    assert step == expected_step == 3
    assert ours.path == theirs.path == "trig"
    for name, tensor in theirs.network.state_dict().items():
        assert torch.equal(ours.network.state_dict()[name], tensor)
    assert load_file(out / "model.safetensors").keys() == theirs.network.state_dict().keys()
    assert main(["sample", str(out), "--seeds", "0-9", "--grid", str(tmp_path / "grid.png")]) == 0


def test_the_code_of_the_model_card_runs(tmp_path, run, monkeypatch):
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "averaged after 3 training steps" in card
    monkeypatch.chdir(tmp_path / "out")
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], names)
    assert names["images"].shape == (4, 1, 8, 8)


def test_an_export_that_does_not_name_its_objective_promises_no_more_than_its_sampler(tmp_path, run):
    out = tmp_path / "out"
    assert main(["export", str(run), str(out)]) == 0
    described = json.loads((out / "config.json").read_text())
    assert described.pop("objective") == "soflow"
    for sampler, objective in (("chain", "soflow"), ("euler", "flow_matching")):
        described["flow"]["sampler"] = sampler
        (out / "config.json").write_text(json.dumps(described))
        assert read_export(out).objective == objective


def test_nothing_is_replaced(tmp_path, run, capsys):
    (tmp_path / "out").mkdir()
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert "out: got a folder, expected nothing there yet" in capsys.readouterr().err
    (tmp_path / "file").write_text("kept")
    assert main(["export", str(run), str(tmp_path / "file" / "out")]) == 2
    assert "cannot export" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format 2, expected at most 1"),
        ({"network": {"name": "DiT"}}, "expected what soflow export writes"),
        ({"network": 3}, "expected what soflow export writes"),
        ({"step": None}, "expected what soflow export writes"),
        ({"objective": "gan"}, "expected what soflow export writes"),
        ({"objective": "flow_matching"}, "flow.sampler: got 'renoise', expected euler or heun"),
    ],
)
def test_other_contents_are_refused(tmp_path, run, change, message):
    out = tmp_path / "out"
    assert main(["export", str(run), str(out)]) == 0
    described = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**described, **change}))
    with pytest.raises(CheckpointError, match=message):
        read_export(out)
    (out / "config.json").write_text(json.dumps(described))
    (out / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        read_export(out)
