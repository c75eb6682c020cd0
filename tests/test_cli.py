"""The commands as a user types them: what they print and write, and how they refuse bad input."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import tiny_vae
import torch
from PIL import Image

import soflow
from soflow import arguments, checkpoint, distributed, doctor, trainer, watchdog
from soflow.cli import main
from soflow.config_file import describe_fields, parse_config
from soflow.data import DigitsSource, open_source
from soflow.distributed import Processes
from soflow.flow import build_flow
from soflow.images import to_uint8
from soflow.kernels import reference
from soflow.models import Network, build_network
from soflow.run_folder import checkpoint_meta, load_flow
from soflow.sampling import sample, sample_noise

ROOT = Path(__file__).parents[1]
LIKE_TRAIN = ("train.total_steps=4", "train.checkpoint_every=2", "train.log_every=2")


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(f"{tiny.TEXT}output_dir: {tmp_path / 'runs'}\n")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run folder with checkpoints of steps 2 and 4. Tests that write there copy it first."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(f"{tiny.TEXT}output_dir: {folder}\n")
    assert main(["train", str(folder / "tiny.yaml"), *LIKE_TRAIN]) == 0
    return folder / "tiny"


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def refusal(capsys, *argv: object) -> str:
    """Run a command that must refuse its input with exit code 2; return the message."""
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in argv])
    except SystemExit as stop:  # argparse refuses by leaving
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert "error: " in captured.err
    assert "Traceback" not in captured.err
    return captured.err


# ------------------------------------------------------------------------------------------------
# Help and usage.


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main(["--help"])
    commands = re.findall(r"^  (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert commands == ["train", "sample", "encode", "convert", "inspect", "audit", "export", "doctor"]


def test_help_of_train_lists_every_field_with_type_default_and_help(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for field in describe_fields():
        default = field.default if field.default == "required" else f"default {field.default}"
        assert f"  {field.name}: {field.type}; {default}\n      {field.help}\n" in f"{text}\n"


def test_help_says_how_classes_and_seeds_belong_together(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main(["sample", "--help"])
    assert "image i has the i-th seed and class i modulo the" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"soflow {soflow.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["trian"], ["train"], ["sample"], ["doctor", "extra"], ["train", "--dry"]])
def test_wrong_usage(capsys, argv):
    assert refusal(capsys, *argv).startswith("usage: soflow")


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["sample", "--help"],
        ["encode", "--help"],
        ["audit", "--help"],
        ["train", "{}", "--print-config"],
        ["train", "{}", "--print-folder"],
    ],
)
def test_torch_is_not_imported_where_it_is_not_needed(recipe, argv):
    code = "import sys; sys.modules['torch'] = None; from soflow.cli import main; sys.exit(main(sys.argv[1:]))"
    argv = [str(recipe) if word == "{}" else word for word in argv]
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------
# soflow train


def test_train_py_is_soflow_train(recipe, tmp_path):
    command = [sys.executable, ROOT / "train.py", recipe, "train.total_steps=2", "--traceback", "name=other"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/other/checkpoints/step-00000002").is_dir()
    assert "step 2/2" in done.stdout


def test_trained_run_folder(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert checkpoint.newest(trained / "checkpoints") == trained / "checkpoints/step-00000004"


def test_the_docs_name_every_metric(trained):
    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8").partition("## Metrics")[2]
    first_columns = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = {name for column in first_columns for name in re.findall(r"`([^`]+)`", column)}
    written = set(json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1]))
    assert named - written == {"throughput/mfu", "skipped_steps"}
    assert written <= named


def test_print_config_is_complete_and_reads_back(recipe, capsys, tmp_path):
    before = snapshot(tmp_path)
    assert main(["train", str(recipe), "optim.lr=2e-4", "--print-config"]) == 0
    printed = parse_config(capsys.readouterr().out, "printed")
    assert printed == tiny.config(tmp_path / "runs", "optim.lr=2e-4")
    assert snapshot(tmp_path) == before


def test_print_folder_is_where_it_trains(recipe, capsys, tmp_path):
    folder = tmp_path / "my runs"
    assert main(["train", str(recipe), f"output_dir={folder}", "name='007'", "--print-folder"]) == 0
    assert capsys.readouterr().out == f"{folder / '007'}\n"


def test_dry_run_says_what_would_be_trained_and_writes_nothing(recipe, capsys, tmp_path):
    before = snapshot(tmp_path)
    assert main(["train", str(recipe), "train.batch_size=16", "--dry-run"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    config = tiny.config(tmp_path)
    parameters = sum(p.numel() for p in build_flow(config.network, config.flow, reference).parameters())
    assert f"DiT, {parameters / 1e6:.1f} M parameters, 1 x 8 x 8, 10 classes" in text
    assert "digits, 1437 samples, 10 classes" in text
    assert "8 steps of 16 samples: 0.1 epochs" in text
    assert "cpu, fp32" in text
    assert f"{tmp_path / 'runs' / 'tiny'} (from the start)" in text
    assert snapshot(tmp_path) == before


def test_dry_run_refuses_other_data_than_those_of_the_run(trained, capsys, monkeypatch):
    other = open_source(tiny.config(trained.parent).data)
    monkeypatch.setattr(other, "fingerprint", "other")
    monkeypatch.setattr("soflow.data.open_source", lambda config: other)
    message = refusal(capsys, "train", trained.parent / "tiny.yaml", *LIKE_TRAIN, "--dry-run")
    assert re.search(r"step-00000004: got a checkpoint of the data set \w+, expected other", message)


@pytest.mark.parametrize("name", ["b4", "xl2"])
def test_dry_run_counts_the_official_parameters(capsys, monkeypatch, name):
    class Latents:
        image_shape, num_classes, fingerprint = (4, 32, 32), 1000, "none"

        def __len__(self) -> int:
            return 1_281_167

    monkeypatch.setattr("soflow.data.open_source", lambda config: Latents())
    assert main(["train", str(ROOT / f"configs/imagenet-{name}.yaml"), "--dry-run", "engine.device=cpu"]) == 0
    assert {"b4": "131.2 M", "xl2": "676.7 M"}[name] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.totalsteps=3"], "train.totalsteps: unknown field; did you mean 'train.total_steps'?"),
        (["train.batch_size=x"], "train.batch_size: got 'x', expected an integer"),
        (["train.batch_size=5000"], "train.batch_size: got 5000, expected at most 1437"),
        (["train.batch_size=16", "train.accumulation=17"], "train.batch_size: got 16, expected at least 17"),
        ([f"train.accumulation={10**18}"], f"train.batch_size: got 12, expected at least {10**18}"),
        (["engine.cuda_graph=on"], "engine.cuda_graph: got 'on', expected 'auto' or 'off', because the run is not on"),
        (["optim.backend=fused"], "optim.backend: got 'fused', expected 'auto' or 'reference', because a parameter is"),
        (["optim.backend=apex"], "optim.backend: got 'apex', which is "),
        (["optim.backend=apex", "engine.precision=bf16"], "optim.backend: got 'apex', expected another for RAdam or"),
        (["network.input_size=16"], "network.input_size: got 16, expected 8"),
        (["network.num_classes=7"], "network.num_classes: got 7, expected 10"),
        (["network.patch_size=3"], "error: network.patch_size: got 3, expected a divisor of"),
        (["network.name=DiT-B-9"], "network.name: got 'DiT-B-9', expected"),
        (["data={source: latents, root: nowhere}"], "nowhere"),
        (["data={source: own}"], "data.source: got 'own' and no source, expected Trainer(config"),
        (["name=a/b"], "name: got 'a/b', expected letters"),
    ],
)
@pytest.mark.parametrize("mode", [[], ["--dry-run"]], ids=["train", "dry-run"])
def test_train_refuses_bad_configurations_and_writes_nothing(recipe, capsys, tmp_path, overrides, message, mode):
    before = snapshot(tmp_path)
    assert message in refusal(capsys, "train", recipe, *overrides, *mode)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("text", ["name: [", "name: a\nname: b\n", "", "\x00"])
def test_train_refuses_malformed_yaml(capsys, tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert str(path) in refusal(capsys, "train", path)


def test_train_refuses_a_missing_file(capsys, tmp_path):
    assert f"{tmp_path / 'no.yaml'}: cannot be read" in refusal(capsys, "train", tmp_path / "no.yaml")


def test_train_refuses_the_folder_of_another_model(trained, capsys):
    before = snapshot(trained)
    message = refusal(capsys, "train", trained.parent / "tiny.yaml", *LIKE_TRAIN, "network.depth=2", "seed=4")
    assert "network.depth: 1, 2" in message
    assert "seed: 3, 4" in message
    assert snapshot(trained) == before


def test_train_refuses_an_output_dir_that_is_a_file(recipe, capsys, tmp_path):
    (tmp_path / "runs").write_text("mine")
    refusal(capsys, "train", recipe)
    assert (tmp_path / "runs").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that not even root can write")
def test_train_refuses_an_unwritable_folder(recipe, capsys):
    assert "/proc" in refusal(capsys, "train", recipe, "output_dir=/proc")


def test_train_refuses_a_corrupt_checkpoint_that_it_is_told_to_resume(trained, capsys, tmp_path):
    run = shutil.copytree(trained, tmp_path / "tiny")
    broken = run / "checkpoints/step-00000002"
    with (broken / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xaa" if file.read(1) != b"\xaa" else b"\x55")
    before = snapshot(run)
    argv = ("train", trained.parent / "tiny.yaml", *LIKE_TRAIN, f"output_dir={tmp_path}", "--resume", broken)
    assert "model.safetensors" in refusal(capsys, *argv)
    assert snapshot(run) == before


def test_train_continues_a_run(trained, capsys, tmp_path):
    run = shutil.copytree(trained, tmp_path / "tiny")
    step_2 = run / "checkpoints/step-00000002"
    argv = ["train", str(trained.parent / "tiny.yaml"), *LIKE_TRAIN, f"output_dir={tmp_path}"]
    assert main([*argv, "--resume", str(step_2)]) == 0
    again, first = (checkpoint.load(folder / "checkpoints/step-00000004") for folder in (run, trained))
    assert all(torch.equal(again.model[name], first.model[name]) for name in first.model)


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restart_does_not_go_back_to_the_step_that_was_asked_for_once(trained, capsys, monkeypatch, name):
    """It would drop what was trained before the restart."""
    before = sorted((trained / "checkpoints").iterdir())
    argv = ["train", str(trained.parent / "tiny.yaml"), *LIKE_TRAIN, "--resume", str(before[0])]
    monkeypatch.setenv(name, "1")
    assert main(argv) == 2
    assert f"--resume: got {before[0]} in a restart ({name}=1), expected none" in capsys.readouterr().err
    assert sorted((trained / "checkpoints").iterdir()) == before


def test_divergence_is_exit_code_1(recipe, capsys, monkeypatch):
    def diverge(self: trainer.Trainer) -> bool:
        raise trainer.DivergedError("step 3: loss/total not finite")

    monkeypatch.setattr(trainer.Trainer, "fit", diverge)
    assert main(["train", str(recipe)]) == 1
    assert capsys.readouterr().err == "error: step 3: loss/total not finite\n"


def test_a_stop_by_a_signal_is_exit_code_3(recipe, capsys, monkeypatch):
    monkeypatch.setattr(trainer.Trainer, "_heed", lambda self, votes, writer: self.finished == 5)
    assert main(["train", str(recipe)]) == 3
    assert "step 5, stopped, the same command continues it" in capsys.readouterr().out
    monkeypatch.undo()
    assert main(["train", str(recipe)]) == 0


def test_a_stop_is_no_failure_to_torchrun(recipe, capsys, monkeypatch):
    """Or it would start even a single process again, which would train on."""
    monkeypatch.setattr(trainer.Trainer, "_heed", lambda self, votes, writer: self.finished == 5)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert main(["train", str(recipe)]) == 0
    assert "step 5, stopped, the same command continues it" in capsys.readouterr().out


def test_an_interrupt_is_exit_code_130(recipe, capsys, monkeypatch):
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("soflow.config_file.load_config", interrupt)
    assert main(["train", str(recipe)]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    with pytest.raises(KeyboardInterrupt):
        main(["train", str(recipe), "--traceback"])


def test_errors_of_the_program_are_not_disguised(recipe, monkeypatch):
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("soflow.config_file.load_config", fail)
    with pytest.raises(ZeroDivisionError):
        main(["train", str(recipe)])


def test_traceback_on_demand(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        main(["train", str(tmp_path / "no.yaml"), "--traceback"])


# ------------------------------------------------------------------------------------------------
# soflow sample


def drawn(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as archive:
        return archive["arr_0"]


@pytest.mark.parametrize("nfe", [1, 2])
@pytest.mark.parametrize("weights", ["ema", "model"])
def test_sample_draws_what_the_library_draws(trained, tmp_path, capsys, nfe, weights):
    npz = tmp_path / "a.npz"
    argv = [
        "sample",
        trained,
        "--nfe",
        nfe,
        "--weights",
        weights,
        "--classes",
        "3,7-8",
        "--seeds",
        "5-9,2",
        "--npz",
        npz,
    ]
    assert main(list(map(str, argv))) == 0
    assert f"6 images, {nfe} NFE by renoise, {weights} weights of step 4" in capsys.readouterr().out
    flow, _ = load_flow(trained, weights)
    noise, renoise = sample_noise(torch.tensor([5, 6, 7, 8, 9, 2]), (1, 8, 8), nfe)
    x = sample(flow, torch.tensor([3, 7, 8, 3, 7, 8]), (6, 1, 8, 8), nfe, noise, renoise)
    expected = (127.5 * x + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    assert np.array_equal(drawn(npz), expected.numpy())


@pytest.mark.parametrize("sampler", ["chain", "euler", "heun"])
def test_sample_draws_by_the_sampler_that_is_asked_for(trained, tmp_path, capsys, sampler):
    npz = tmp_path / "a.npz"
    argv = ["sample", str(trained), "--nfe", "2", "--sampler", sampler, "--seeds", "0-9", "--npz", str(npz)]
    assert main(argv) == 0
    assert f"2 NFE by {sampler}, ema" in capsys.readouterr().out
    flow, _ = load_flow(trained, sampler=sampler)
    noise, _ = sample_noise(torch.arange(10), (1, 8, 8))
    expected = to_uint8(sample(flow, torch.arange(10), (10, 1, 8, 8), 2, noise))
    assert np.array_equal(drawn(npz), expected.repeat(3, axis=-1))
    assert load_flow(trained)[0].sampler == "renoise"


def test_sample_refuses_a_sampler_that_the_network_was_not_trained_for(recipe, tmp_path, capsys):
    velocity = ("objective.name=flow_matching", "objective.fm_ratio=1", "flow.sampler=euler", "train.total_steps=1")
    assert main(["train", str(recipe), *velocity]) == 0
    run, export, npz = tmp_path / "runs/tiny", tmp_path / "export", tmp_path / "a.npz"
    assert main(["export", str(run), str(export)]) == 0
    for path in (run, export):
        for sampler in ("renoise", "chain"):
            message = refusal(capsys, "sample", path, "--sampler", sampler, "--npz", npz)
            assert f"sampler: got '{sampler}', expected euler or heun, which is what the objective flow_mat" in message
        assert not npz.exists()
        assert main(["sample", str(path), "--nfe", "2", "--sampler", "heun", "--npz", str(npz)]) == 0
        npz.unlink()


def test_images_do_not_depend_on_the_batch_size(trained, tmp_path):
    for size in (1, 7, 100):
        argv = ["sample", str(trained), "--seeds", "0-19", "--npz", str(tmp_path / f"{size}.npz"), "--batch-size"]
        assert main([*argv, str(size)]) == 0
    one, seven, all_at_once = (drawn(tmp_path / f"{size}.npz").astype(int) for size in (1, 7, 100))
    # Matrix products of other shapes may round differently, by one step of a pixel at most.
    assert np.abs(one - all_at_once).max() <= 1
    assert np.abs(seven - all_at_once).max() <= 1
    assert len(np.unique(all_at_once.reshape(20, -1), axis=0)) == 20


def test_grid_has_one_row_per_class_and_one_column_per_turn(trained, tmp_path):
    grid, npz = tmp_path / "a.png", tmp_path / "a.npz"
    argv = ["sample", trained, "--classes", "4,1", "--seeds", "0-5", "--grid", grid, "--npz", npz]
    assert main(list(map(str, argv))) == 0
    with Image.open(grid) as picture:
        pixels = np.asarray(picture)
    images = drawn(npz)[..., 0]
    assert pixels.shape == (2 * 65 + 1, 3 * 65 + 1)
    for index in range(6):
        turn, row = divmod(index, 2)
        cell = pixels[row * 65 + 1 : (row + 1) * 65 : 8, turn * 65 + 1 : (turn + 1) * 65 : 8]
        assert np.array_equal(cell, images[index])


def test_sample_takes_step_folders_and_official_files(trained, tmp_path):
    step_4 = trained / "checkpoints/step-00000004"
    for source in (trained, step_4):
        assert main(["sample", str(source), "--seeds", "0-9", "--npz", str(tmp_path / f"{source.name}.npz")]) == 0
    assert np.array_equal(drawn(tmp_path / "tiny.npz"), drawn(tmp_path / "step-00000004.npz"))


def official_file(path: Path, network: Network) -> Path:
    weights, optimizer = network.state_dict(), {"state": {}, "param_groups": []}
    checkpoint.save_official(path, model=weights, ema=weights, optimizer=optimizer, step=5, epochs=0)
    return path


def test_an_official_unet_is_sampled_and_exported(tmp_path):
    shape = {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}
    network = build_network("UNet", input_size=8, **shape).eval()
    path = official_file(tmp_path / "cifar.pt", network)
    flow, step = load_flow(path)
    assert step == 5
    x, (t, s) = torch.randn(2, 3, 8, 8), torch.rand(2, 2)
    assert torch.equal(flow.network(x, t, s), network(x, t, s))
    assert main(["sample", str(path), "--seeds", "0-3", "--grid", str(tmp_path / "a.png")]) == 0
    assert main(["export", str(path), str(tmp_path / "out")]) == 0
    assert main(["sample", str(tmp_path / "out"), "--seeds", "0-3", "--grid", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_an_official_file_of_no_known_network_is_refused_by_its_path(tmp_path, capsys):
    shape = {"input_size": 8, "model_channels": 8, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": ()}
    path = official_file(tmp_path / "other.pt", build_network("UNet", **shape, augment_dim=9))
    message = f"error: {path}: map_augment.weight: got [32, 9], expected [32, 6], as the network has it"
    for command in (["sample", path, "--grid", tmp_path / "a.png"], ["export", path, tmp_path / "out"]):
        assert message in refusal(capsys, *command)
    path = official_file(tmp_path / "linear.pt", torch.nn.Linear(2, 2))
    assert f"error: {path}: x_embedder.proj.weight: got nothing, expected the parameter of a DiT" in refusal(
        capsys, "sample", path, "--grid", tmp_path / "a.png"
    )
    assert not (tmp_path / "out").exists()


def test_an_official_network_without_a_null_label_is_not_taken_for_one_of_fewer_classes(monkeypatch, capsys, tmp_path):
    with torch.device("meta"):
        weights = build_network("DiT-B/4", num_classes=999).state_dict()
    official = SimpleNamespace(ema=weights, model=weights, step=5)
    monkeypatch.setattr(checkpoint, "load_official", lambda path: official)
    message = refusal(capsys, "sample", "b4.pt", "--grid", tmp_path / "a.png")
    assert "error: b4.pt: y_embedder: got 1000 rows, expected one more, of the null label" in message


def untrained(
    folder: Path,
    channels: int = 1,
    poison: bool = False,
    num_classes: int = 0,
    of_latents: bool = False,
    vae: Path | None = None,
) -> Path:
    """A step folder of a network that was not trained."""
    data = "{source: latents, root: x}" if of_latents else "{source: digits}"
    config = parse_config(
        "{name: x, network: {name: DiT, input_size: 4, patch_size: 2, hidden_size: 8, depth: 1, num_heads: 1, "
        f"num_classes: {num_classes}, in_channels: {channels}}}, data: {data}, "
        f"train: {{total_steps: 1, batch_size: 1, sample_every: 0, sample_vae: {json.dumps(vae and str(vae))}}}}}",
        "test",
    )
    flow = build_flow(config.network, config.flow, reference)
    weights = flow.network.state_dict()
    for name in ("final_layer.linear.weight", "final_layer.adaLN_modulation.1.weight"):
        torch.nn.init.normal_(weights[name], std=0.5)  # both start as 0, which would draw every class alike
    if poison:
        weights["final_layer.linear.bias"] = torch.full_like(weights["final_layer.linear.bias"], torch.nan)
    meta = checkpoint_meta(config, "none", {"steps": 0, "sums": []})
    return checkpoint.save(folder, 1, model=weights, ema=weights, optimizer={}, meta=meta)


def test_a_checkpoint_of_no_run_is_refused(tmp_path, capsys):
    """As `checkpoint.save` writes it for another program."""
    for step, meta in enumerate(({}, {"config": 3})):
        folder = checkpoint.save(tmp_path, step, model={}, ema={}, optimizer={}, meta=meta)
        for command in (("sample", folder, "--grid", tmp_path / "a.png"), ("export", folder, tmp_path / "out")):
            error = refusal(capsys, *command)
            assert f"{folder}/meta.json: config: got {meta.get('config')}, expected the configuration of a run" in error


def test_unconditional_networks_have_no_classes(tmp_path, capsys):
    folder = untrained(tmp_path)
    assert "unconditional" in refusal(capsys, "sample", folder, "--classes", "0", "--grid", tmp_path / "a.png")
    assert main(["sample", str(folder), "--seeds", "0-4", "--grid", str(tmp_path / "a.png")]) == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (3 * 65 + 1, 2 * 65 + 1)


@pytest.mark.parametrize(
    ("num_classes", "argv", "classes", "num_seeds"),
    [
        (0, [], None, 100),
        (0, ["--seeds", "0-6"], None, 7),
        (2, [], range(2), 20),
        (10, [], range(10), 100),
        (30, [], range(10), 100),
        (30, ["--classes", "4,29"], [4, 29], 20),
        (30, ["--seeds", "0-6"], range(7), 7),
        (30, ["--seeds", "0-59"], range(30), 60),
    ],
)
def test_classes_and_seeds_that_are_not_given_fit_each_other(tmp_path, num_classes, argv, classes, num_seeds):
    folder = untrained(tmp_path, num_classes=num_classes)
    assert main(["sample", str(folder), "--npz", str(tmp_path / "a.npz"), *argv]) == 0
    flow, _ = load_flow(folder)
    noise, _ = sample_noise(torch.arange(num_seeds), (1, 4, 4))
    labels = None if classes is None else torch.tensor(classes).repeat(num_seeds // len(classes))
    expected = to_uint8(sample(flow, labels, (num_seeds, 1, 4, 4), noise=noise))
    assert np.array_equal(drawn(tmp_path / "a.npz"), expected.repeat(3, axis=-1))


def test_colour_images(tmp_path):
    folder = untrained(tmp_path, channels=3)
    assert main(["sample", str(folder), "--seeds", "0-3", "--npz", str(tmp_path / "a.npz")]) == 0
    images = drawn(tmp_path / "a.npz")
    assert images.shape == (4, 4, 4, 3)
    assert not np.array_equal(images[..., 0], images[..., 1])


@pytest.mark.parametrize(("channels", "is_known"), [(3, False), (4, False), (4, True)])
def test_latents_become_images_by_the_vae(tmp_path, channels, is_known):
    """One seed at a time or all at once: the images are the decoded samples, to the last bit of rounding."""
    vae = tiny_vae.save(tmp_path, latent_channels=channels)
    folder = untrained(tmp_path, channels=channels, of_latents=True, vae=vae if is_known else None)
    argv = ["sample", str(folder), "--seeds", "0-9", "--npz", str(tmp_path / "a.npz")]
    assert main(argv if is_known else [*argv, "--vae", str(vae)]) == 0
    images = drawn(tmp_path / "a.npz")
    assert images.shape == (10, 8, 8, 3)
    flow, _ = load_flow(folder)
    noise, _ = sample_noise(torch.arange(10), (channels, 4, 4))
    with torch.no_grad():
        latents = sample(flow, None, (10, channels, 4, 4), noise=noise)
        expected = to_uint8(tiny_vae.network(latent_channels=channels).eval().decode(latents / 0.18215).sample)
    assert np.abs(images.astype(int) - expected.astype(int)).max() <= 1


def test_latents_without_their_vae_are_refused(tmp_path, capsys):
    folder = untrained(tmp_path, channels=4, of_latents=True)
    message = refusal(capsys, "sample", folder, "--npz", tmp_path / "a.npz", "--vae", tmp_path)
    assert "expected a folder with config.json" in message
    vae = tiny_vae.save(tmp_path / "other", latent_channels=8)
    message = refusal(capsys, "sample", folder, "--npz", tmp_path / "a.npz", "--vae", vae)
    assert "--vae: got vae with latents of 8 channels, expected 4" in message
    assert not (tmp_path / "a.npz").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--classes", "3"], "--classes: got 3, expected classes from 0 to 2"),
        (["--seeds", "0-3"], "--seeds: got 4 seeds, expected a multiple of 3, the number of classes"),
        (["--sampler", "heun"], "--nfe: got 1, expected an even number"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_vae_is_waited_for(tmp_path, capsys, monkeypatch, argv, message):
    monkeypatch.setattr("soflow.vae.load_vae", lambda *arguments: pytest.fail("it was asked for"))
    folder = untrained(tmp_path, channels=4, num_classes=3, of_latents=True)
    assert message in refusal(capsys, "sample", folder, "--npz", tmp_path / "a.npz", *argv)


def test_a_diverged_network_is_refused_and_the_old_file_stays(tmp_path, capsys):
    folder = untrained(tmp_path, poison=True)
    (tmp_path / "a.png").write_bytes(b"old")
    assert "NaN or infinity" in refusal(capsys, "sample", folder, "--grid", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nfe", "0"], "--nfe: got '0', expected an integer of at least 1"),
        (["--nfe", "-1"], "--nfe: "),
        (["--nfe", "1.5"], "--nfe: got '1.5', expected an integer of at least 1"),
        (["--sampler", "ddim"], "--sampler: invalid choice: 'ddim'"),
        (["--sampler", "heun", "--nfe", "3"], "nfe: got 3, expected an even number"),
        (["--batch-size", "0"], "--batch-size: got '0', expected an integer of at least 1"),
        (["--classes", "10"], "--classes: got 10, expected classes from 0 to 9"),
        (["--classes", "0-10"], "--classes: got 10, expected classes from 0 to 9"),
        (["--classes", "1,1"], "--classes: got '1,1', expected no number twice"),
        (["--classes", "x"], "--classes: got 'x', expected numbers and ranges such as 0,2,5-9"),
        (["--seeds", ""], "--seeds: got '', expected numbers and ranges"),
        (["--seeds", "1,"], "--seeds: got '1,', expected numbers and ranges"),
        (["--seeds", "5-1"], "--seeds: got '5-1', expected a range that ends at 5 or later"),
        (["--seeds", "-3"], "--seeds: "),
        (["--seeds", "1.5"], "--seeds: got '1.5', expected numbers and ranges"),
        (["--seeds", "0-99999999999"], "--seeds: got '0-99999999999', expected at most 10000000 numbers"),
        (["--seeds", "9" * 30], "--seeds: "),
        (["--seeds", "0-10"], "--seeds: got 11 seeds, expected a multiple of 10"),
        (["--weights", "best"], "--weights: "),
        (["--npz", "{tmp}/nowhere/a.npz"], "/nowhere/a.npz: cannot write: No such file or directory"),
        (["--npz", "{tmp}/a.txt"], "a.txt', expected a file name that ends in .npz"),
        (["--npz", "{tmp}/folder.npz"], "folder.npz: cannot write, it is a folder"),
    ],
)
def test_sample_refuses(trained, tmp_path, capsys, argv, message):
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "a.png").write_bytes(b"old")
    before = snapshot(tmp_path)
    argv = [word.replace("{tmp}", str(tmp_path)) for word in argv]
    assert message in refusal(capsys, "sample", trained, "--grid", tmp_path / "a.png", *argv)
    assert snapshot(tmp_path) == before


def test_sample_refuses_to_draw_for_nothing(trained, capsys):
    assert "expected --grid FILE.png, --npz FILE.npz or both" in refusal(capsys, "sample", trained)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_sample_refuses_a_gpu_that_is_not_there(trained, tmp_path, capsys):
    message = refusal(capsys, "sample", trained, "--grid", tmp_path / "a.png", "--device", "cuda")
    assert "--device: got 'cuda'" in message


def test_sample_checks_that_it_can_write_before_it_loads(tmp_path, capsys):
    message = refusal(capsys, "sample", tmp_path / "no-run", "--grid", tmp_path / "nowhere/a.png")
    assert "nowhere" in message
    assert "no-run" not in message
    argv = ("--grid", tmp_path / "a.png", "--classes", "0,1", "--seeds", "0-4")
    message = refusal(capsys, "sample", tmp_path / "no-run", *argv)
    assert "--seeds: got 5 seeds, expected a multiple of 2" in message


def test_sample_refuses_what_is_no_checkpoint(tmp_path, capsys):
    grid = tmp_path / "a.png"
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("hello")
    for name in ("nowhere", "nowhere.pt", "empty", "text.pt"):
        assert name in refusal(capsys, "sample", tmp_path / name, "--grid", grid)
    assert not grid.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.pt", "meta.json", "MANIFEST.json"])
def test_sample_refuses_a_corrupt_checkpoint(trained, tmp_path, capsys, name):
    step = shutil.copytree(trained / "checkpoints/step-00000004", tmp_path / "step-00000004")
    data = bytearray((step / name).read_bytes())
    data[len(data) // 2] ^= 0xFF
    (step / name).write_bytes(bytes(data))
    assert name in refusal(capsys, "sample", step, "--grid", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


# ------------------------------------------------------------------------------------------------
# soflow audit


def test_audit_writes_tables_json_and_plot(trained, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / "tiny")
    assert main(["audit", str(run), "--steps", "all", "--samples", "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| two_pass bf16 ") == 3
    assert printed.endswith(f"{run / 'audit/audit.json'}, {run / 'audit/audit.png'}\n")
    with Image.open(run / "audit/audit.png") as image:
        assert image.format == "PNG"
    content = json.loads((run / "audit/audit.json").read_text())
    assert [step["step"] for step in content["steps"]] == [2, 4]
    assert (content["run"], content["samples"], content["seed"]) == ("tiny", 3, 0)

    # the same numbers again, elsewhere, and for one of the steps
    assert main(["audit", str(run), "--steps", "2", "--samples", "3", "--out", str(tmp_path / "a/b")]) == 0
    again = json.loads((tmp_path / "a/b/audit.json").read_text())
    assert again["steps"] == content["steps"][:1]
    assert checkpoint.newest(run / "checkpoints").name == "step-00000004"


@pytest.mark.parametrize(("method", "ends"), [("const", (0.05, 0.05)), ("linear", (0.1, 0.075))])
def test_the_plot_of_an_audit_shades_the_gaps_of_the_run(tmp_path, monkeypatch, method, ends):
    config = tiny.config(tmp_path, "train.total_steps=2", f"times={{gap_method: {method}, gap_end: 0.05}}")
    run = trainer.Trainer(config, Processes(0, 1, torch.device("cpu")))
    run.fit()
    seen = []
    monkeypatch.setattr("soflow.audit_report.save_plot", lambda path, audits, *gaps: seen.append(gaps))
    assert main(["audit", str(run.folder.path), "--samples", "1"]) == 0
    assert seen == [pytest.approx(ends)]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "3"], "checkpoint of step 3, expected one of 2, 4"),
        (["--steps", "last"], "argument --steps: got 'last'"),
        (["--samples", "0"], "argument --samples: got '0', expected an integer of at least 1"),
        (["--seed", "-1"], "argument --seed: got '-1', expected an integer from 0"),
        (["--out", "{}/config.yaml"], "config.yaml"),
        (["{}/nothing"], "unrecognized arguments"),
    ],
)
def test_audit_refuses(trained, capsys, argv, message):
    before = snapshot(trained)
    argv = [word.format(trained) for word in argv]
    assert message in refusal(capsys, "audit", trained, *argv)
    assert snapshot(trained) == before


def test_a_run_on_an_own_source_is_sampled_and_exported_but_not_audited(tmp_path, capsys):
    config = tiny.config(tmp_path, "data.source=own", "train.total_steps=1")
    run = trainer.Trainer(config, Processes(0, 1, torch.device("cpu")), source=DigitsSource("train"))
    assert run.fit()
    assert main(["sample", str(run.folder.path), "--seeds", "0-9", "--grid", str(tmp_path / "grid.png")]) == 0
    assert main(["export", str(run.folder.path), str(tmp_path / "export")]) == 0
    assert "data.source: got 'own' and no source" in refusal(capsys, "audit", run.folder.path)
    assert not (run.folder.path / "audit").exists()


def test_audit_refuses_what_is_no_run(trained, tmp_path, capsys):
    assert f"{tmp_path / 'config.yaml'}" in refusal(capsys, "audit", tmp_path)
    shutil.copy(trained / "config.yaml", tmp_path)
    assert "got no checkpoint" in refusal(capsys, "audit", tmp_path)
    run = shutil.copytree(trained, tmp_path / "damaged")
    weights = run / "checkpoints/step-00000004/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert str(weights) in refusal(capsys, "audit", run)


# ------------------------------------------------------------------------------------------------
# soflow doctor


def test_doctor_prints_every_finding(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"works +torch +{re.escape(torch.__version__)}", text)
    assert text.endswith("everything required works: yes\n")
    for name in ("triton", "nvidia-dali", "NVIDIA apex", "CUDA extension", "GPU", "NVIDIA driver"):
        assert re.search(rf"(works|missing|broken) +{name}", text)


def test_doctor_as_json_without_the_interpreter():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "soflow.cli", "doctor", "--json"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is True
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert findings["torch"]["version"] == torch.__version__
    assert findings["triton"]["status"] == "missing" or "compiled" in findings["triton"]["detail"]


def test_doctor_works_without_torch_and_says_so():
    code = "import sys; sys.modules['torch'] = None; from soflow.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert re.search(r"missing +torch", done.stdout)
    assert "everything required works: no" in done.stdout


def test_lists_are_of_so_many_numbers_at_most(monkeypatch):
    monkeypatch.setattr(arguments, "MAX_NUMBERS", 15)
    assert len(arguments.numbers("0-9,10-14")) == 15
    with pytest.raises(Exception, match="expected at most 15 numbers"):
        arguments.numbers("0-9,10-15")


def test_processes_wait_for_each_other_as_long_as_is_configured(recipe, monkeypatch):
    @contextlib.contextmanager
    def join(*args: object) -> Iterator[Processes]:
        assert args == ("cpu", 4321.0)
        yield Processes(0, 1, torch.device("cpu"))

    monkeypatch.setattr(distributed, "join_processes", join)
    assert main(["train", str(recipe), "engine.timeout_s=4321", "train.total_steps=1"]) == 0


def test_dry_run_refuses_a_feeder_that_is_not_installed(recipe, capsys, monkeypatch):
    monkeypatch.setattr("soflow.data.feeder.has_dali", lambda: False)
    assert main(["train", str(recipe), "data.feeder=dali", "--dry-run"]) == 2
    assert "data.feeder: got 'dali', expected " in capsys.readouterr().err


def test_a_lost_process_is_exit_code_1(recipe, capsys, monkeypatch):
    def lose(self: trainer.Trainer) -> bool:
        raise watchdog.PeerError("step 3: process 1 has given no sign of life")

    monkeypatch.setattr(trainer.Trainer, "fit", lose)
    assert main(["train", str(recipe)]) == 1
    assert capsys.readouterr().err.endswith("error: step 3: process 1 has given no sign of life\n")


def test_doctor_says_what_is_broken_by_its_exit_code_and_as_json(capsys, monkeypatch):
    broken = doctor.Finding("torch", True, "broken", None, "")
    monkeypatch.setattr(doctor, "examine", lambda: doctor.Report("3", "x", None, [], [broken]))
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False
