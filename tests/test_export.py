"""What soflow export writes: the same weights under the same names, a shape that builds the network, a true card."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import tiny
import tiny_vae
import torch
from PIL import Image
from safetensors.torch import load_file

from soflow import checkpoint, export
from soflow.checkpoint import CheckpointError, files
from soflow.cli import main
from soflow.config import FlowConfig, NetworkConfig
from soflow.distributed import Processes
from soflow.ema import Snapshot, reconstruct
from soflow.export import Trained, read_export, write_export
from soflow.flow import build_flow
from soflow.kernels import reference
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


def test_an_export_is_on_the_disk_before_it_is_there_and_touches_nothing_else(tmp_path, run, monkeypatch):
    beside = tmp_path / "out.tmp"
    beside.mkdir()
    (beside / "thesis.txt").write_text("precious")
    seen: list[str] = []
    sync, rename = export.sync, Path.rename
    for module in (export, files):
        monkeypatch.setattr(module, "sync", lambda path: seen.append(path.name) or sync(path))
    monkeypatch.setattr(Path, "rename", lambda path, to: seen.append("rename") or rename(path, to))
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert sorted(seen[:3]) == ["README.md", "config.json", "model.safetensors"]
    assert seen[3:] == ["out", "rename", tmp_path.name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.tmp"]
    assert (tmp_path / "out").stat().st_mode == beside.stat().st_mode
    assert (beside / "thesis.txt").read_text() == "precious"


@pytest.fixture(scope="module")
def run_of_profiles(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("profiles")
    config = tiny.config(folder, "ema.profiles=[0.05,0.1]", "train.checkpoint_every=2")
    trainer = Trainer(config, Processes(0, 1, torch.device("cpu")))
    trainer.fit()
    return trainer.folder.path


@pytest.mark.parametrize(("of", "last"), [("", 8), ("checkpoints/step-00000006", 6)])
def test_an_average_that_was_not_kept_is_rebuilt(tmp_path, run_of_profiles, capsys, of, last):
    """From the profiles of that checkpoint and the earlier ones, as `reconstruct` does."""
    path, out = run_of_profiles / of, tmp_path / "out"
    assert main(["export", str(path), str(out), "--sigma-rel", "0.07"]) == 0
    snapshots = []
    for step in range(2, last + 1, 2):
        profiles = checkpoint.load(run_of_profiles / f"checkpoints/step-{step:08d}").profiles
        snapshots += [Snapshot(width, step, weights) for width, weights in profiles.items()]
    assert len(snapshots) == last
    expected, off = reconstruct(snapshots, 0.07, last)
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name
    assert f"step {last}, averaged as by sigma_rel 0.07 (profile off by {off:.1e}" in capsys.readouterr().out
    assert f"averaged (power-function profile, sigma_rel 0.07) after {last} training" in (out / "README.md").read_text()
    assert (read_export(out).sigma_rel, read_export(out).kind) == (0.07, "ema")
    assert main(["export", str(out), str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "README.md").read_text() == (out / "README.md").read_text()


def test_an_average_that_was_kept_is_itself(tmp_path, run_of_profiles):
    assert main(["export", str(run_of_profiles), str(tmp_path / "out"), "--sigma-rel", "0.1"]) == 0
    kept = checkpoint.load(run_of_profiles / "checkpoints/step-00000008").profiles[0.1]
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, kept[name], rtol=1e-5, atol=1e-6)


def test_an_average_that_cannot_be_rebuilt_is_refused(tmp_path, run, run_of_profiles, capsys):
    def refusal(path: Path, *arguments: str) -> str:
        assert main(["export", str(path), str(tmp_path / "out"), *arguments]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "got a run whose ema.profiles is empty, expected" in refusal(run, "--sigma-rel", "0.07")
    assert "no such folder, expected a checkpoint" in refusal(OFFICIAL / "x", "--sigma-rel", "0.07")
    for width in ("0.3", "x", "nan"):
        with pytest.raises(SystemExit, match="2"):
            main(["export", str(run), str(tmp_path / "out"), "--sigma-rel", width])
        assert f"got '{width}', expected a number from 0.0001 to 0.2887" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(run), str(tmp_path / "out"), "--sigma-rel", "0.1", "--weights", "model"])
    assert "not allowed with argument" in capsys.readouterr().err

    copy = tmp_path / "run"
    shutil.copytree(run_of_profiles, copy)
    (copy / "checkpoints/step-00000004/model.safetensors").write_bytes(b"of no use here")
    assert main(["export", str(copy), str(tmp_path / "sound"), "--sigma-rel", "0.07"]) == 0
    (copy / "checkpoints/step-00000004/ema-0.1.safetensors").write_bytes(b"damaged")
    assert "step-00000004/ema-0.1.safetensors: size 7, expected" in refusal(copy, "--sigma-rel", "0.07")
    shutil.rmtree(copy / "checkpoints/step-00000004")
    shutil.copytree(run / "checkpoints/step-00000003", copy / "checkpoints/step-00000003")
    assert "step-00000003 belongs to another configuration" in refusal(copy, "--sigma-rel", "0.07")


DIT = {"name": "DiT", "input_size": 8, "patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2}
UNET = {"name": "UNet", "input_size": 8, "model_channels": 8, "channel_mult": (1, 1), "num_blocks": 1}


@pytest.mark.parametrize(
    ("shape", "channels", "of_latents", "num_classes", "objective", "sampler"),
    [
        (DIT, 1, False, 0, "soflow", "renoise"),
        (DIT, 3, False, 2, "soflow", "chain"),
        (DIT, 1, False, 10, "soflow", "heun"),
        (DIT, 1, False, 10, "meanflow", "chain"),
        (DIT, 1, False, 10, "flow_matching", "euler"),
        (DIT, 4, True, 2, "flow_matching", "heun"),
        (DIT, 3, True, 2, "soflow", "renoise"),
        (DIT, 4, True, 1000, "soflow", "renoise"),
        ({**UNET, "attn_resolutions": (4,)}, 3, False, 0, "soflow", "renoise"),
    ],
)
def test_what_the_model_card_says_is_true(
    tmp_path, monkeypatch, shape, channels, of_latents, num_classes, objective, sampler
):
    network = NetworkConfig(**shape, in_channels=channels, num_classes=num_classes)
    flow = FlowConfig(sampler=sampler)
    weights = build_flow(network, flow, reference).network.state_dict()
    vae = None
    if of_latents:
        tiny_vae.save(tmp_path, latent_channels=channels)
        vae = "../vae"
    trained = Trained(network=network, flow=flow, objective=objective, vae=vae, weights=weights, kind="ema", step=3)
    write_export(tmp_path / "out", trained)
    assert read_export(tmp_path / "out").vae == vae
    card = (tmp_path / "out" / "README.md").read_text()

    one_call = sampler in ("renoise", "chain")
    assert ("in one network call" in card, "one-step-generation" in card) == (one_call, one_call)
    assert ("2512.15657" in card, "2505.13447" in card) == (objective == "soflow", objective == "meanflow")
    assert "averaged after 3 training steps" in card
    assert ("latent" in card) == of_latents
    assert max(map(len, card.splitlines())) <= 120

    monkeypatch.chdir(tmp_path / "out")
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], names)
    assert names["images"].shape == ((4, 3, 16, 16) if of_latents else (4, channels, 8, 8))
    program, *argv = shlex.split(re.search(r"`(soflow sample .*?)`", card)[1])
    assert (program, main(argv)) == ("soflow", 0)
    with Image.open("samples.png") as picture:
        assert picture.size == (10 * 65 + 1, min(num_classes or 10, 10) * 65 + 1)


def test_weights_that_share_their_memory_are_exported(tmp_path):
    network = NetworkConfig(**DIT, in_channels=1, num_classes=0)
    base = torch.arange(6.0).view(2, 3)
    weights = {"whole": base, "part": base[0], "turned": base.T}
    trained = Trained(
        network=network, flow=FlowConfig(), objective="soflow", vae=None, weights=weights, kind="ema", step=3
    )
    write_export(tmp_path / "out", trained)
    stored = read_export(tmp_path / "out").weights
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in weights.items())


def test_an_export_that_does_not_name_its_objective_promises_no_more_than_its_sampler(tmp_path, run):
    out = tmp_path / "out"
    assert main(["export", str(run), str(out)]) == 0
    described = json.loads((out / "config.json").read_text())
    assert described.pop("objective") == "soflow"
    assert described.pop("vae") is None
    for sampler, objective in (("chain", "soflow"), ("euler", "flow_matching")):
        described["flow"]["sampler"] = sampler
        (out / "config.json").write_text(json.dumps(described))
        assert read_export(out).objective == objective
        assert read_export(out).vae is None


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
        ({"network": {"name": "DiT"}}, r"config\.json: \n  network\.input_size: missing, expected an integer"),
        ({"network": 3}, r"network: got 3, expected a section"),
        ({"flow": {"path": "foo"}}, r"config\.json: flow\.path: got 'foo', expected one of linear, trig"),
        ({"step": None}, "expected what soflow export writes"),
        ({"objective": "gan"}, "expected what soflow export writes"),
        ({"step": "x"}, "expected what soflow export writes"),
        ({"step": float("inf")}, "expected what soflow export writes"),
        ({"objective": "flow_matching"}, "flow.sampler: got 'renoise', expected euler or heun"),
    ],
)
def test_other_contents_are_refused(tmp_path, run, change, message):
    out = tmp_path / "out"
    assert main(["export", str(run), str(out)]) == 0
    described = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**described, **change}))
    with pytest.raises(CheckpointError, match=message):
        load_flow(out)
    (out / "config.json").write_text(json.dumps(described))
    (out / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        read_export(out)


def test_samples_say_which_weights_an_export_holds(tmp_path, run, capsys):
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--weights", "model"]) == 0
    assert main(["sample", str(out), "--grid", str(tmp_path / "a.png")]) == 0
    assert "model weights of step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "16"}, r"config\.json: network\.hidden_size: got '16', expected an integer or null"),
        ({"num_heads": 2.5}, r"config\.json: network\.num_heads: got 2\.5, expected an integer or null"),
        ({"heads": 2}, r"config\.json: network\.heads: unknown field"),
        ({"num_heads": 3}, r"out: network\.num_heads: got 3, expected a divisor of hidden_size 16"),
        ({"hidden_size": 32}, r"out: pos_embed: got \[1, 4, 16\], expected \[1, 4, 32\], as the network has it"),
        ({"name": "DiT-B/4"}, r"out: network\.patch_size: got 4, expected nothing"),
    ],
)
def test_another_shape_is_refused(tmp_path, run, change, message):
    out = tmp_path / "out"
    assert main(["export", str(run), str(out)]) == 0
    described = json.loads((out / "config.json").read_text())
    described["network"] |= change
    (out / "config.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=message):
        load_flow(out)
