import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from bench import digits
from bench.judge import DigitsJudge, JudgeError
from soflow.data import DigitsSource
from soflow.distributed import Processes
from soflow.trainer import Trainer


@pytest.fixture(scope="module")
def judge() -> DigitsJudge:
    return DigitsJudge()


@pytest.fixture(scope="module")
def held_out() -> DigitsSource:
    return DigitsSource("held_out")


def test_real_images_agree_with_their_labels(judge: DigitsJudge) -> None:
    assert 0.98 <= judge.real.agreement < 1
    assert judge.real.frechet > 0


def test_training_images_score_as_the_real_ones_they_are_and_as_copies(judge: DigitsJudge) -> None:
    train = DigitsSource("train")
    scores = judge.score(train.images, train.labels)
    assert scores.agreement > 0.99
    assert scores.frechet == judge.real.frechet
    assert scores.neighbour == 0


def test_held_out_images_are_new_and_at_no_distance_from_themselves(judge: DigitsJudge, held_out: DigitsSource) -> None:
    scores = judge.score(held_out.images, held_out.labels)
    assert scores.agreement == judge.real.agreement
    assert abs(scores.frechet) < 1e-9
    assert scores.neighbour == pytest.approx(1, abs=1e-12)


def test_noise_is_no_digit(judge: DigitsJudge) -> None:
    labels = digits.balanced_labels(720)
    noise = torch.rand(720, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scores = judge.score(noise, labels)
    assert scores.agreement < 0.2
    assert scores.frechet > 50 * judge.real.frechet
    assert scores.neighbour > 1.5


def test_shuffled_labels_agree_by_chance(judge: DigitsJudge, held_out: DigitsSource) -> None:
    shuffled = held_out.labels[torch.randperm(360, generator=torch.Generator().manual_seed(0))]
    # Chance is 0.1 with a standard deviation of 0.016.
    assert judge.score(held_out.images, shuffled).agreement < 0.18


@pytest.mark.parametrize("fault", ["noisy", "a Gaussian per class", "four images per class", "no eights", "shifted"])
def test_images_that_are_not_like_real_ones_are_farther_away(judge: DigitsJudge, fault: str) -> None:
    train = DigitsSource("train")
    generator = torch.Generator().manual_seed(1)
    rows = torch.cat([torch.nonzero(train.labels == label)[:108, 0] for label in range(10)])
    images, labels = train.images[rows].clone(), train.labels[rows]
    if fault == "noisy":
        images += 0.3 * torch.randn(images.shape, generator=generator)
    elif fault == "a Gaussian per class":
        for label in range(10):
            real = train.images[train.labels == label].flatten(1)
            factor = (real - real.mean(0)) / math.sqrt(len(real))
            draws = torch.randn(108, len(real), generator=generator) @ factor + real.mean(0)
            images[labels == label] = draws.unflatten(1, (1, 8, 8))
    elif fault == "four images per class":
        for label in range(10):
            images[labels == label] = train.images[train.labels == label][:4].repeat(27, 1, 1, 1)
    elif fault == "no eights":
        images[labels == 8] = images[labels == 1]
    else:
        images = images.roll(1, dims=-1)
    assert judge.score(images, labels).frechet > 1.5 * judge.real.frechet


def test_values_outside_the_range_of_pixels_are_clamped(judge: DigitsJudge, held_out: DigitsSource) -> None:
    extremes = held_out.images.sign()
    beyond = extremes * torch.where(extremes == 1, 7.0, 3.0)
    assert judge.score(beyond, held_out.labels) == judge.score(extremes, held_out.labels)


def test_a_second_judge_says_the_same(judge: DigitsJudge, held_out: DigitsSource) -> None:
    images = (held_out.images + 0.1).clamp(max=1)
    second = DigitsJudge()
    assert second.real == judge.real
    assert second.score(images, held_out.labels) == judge.score(images, held_out.labels)


def test_judge_refuses_what_it_cannot_judge(judge: DigitsJudge, held_out: DigitsSource) -> None:
    images, labels = held_out.images, held_out.labels
    with pytest.raises(JudgeError, match=r"images: got shape \(360, 1, 8, 8\), expected \(359, 1, 8, 8\)"):
        judge.score(images, labels[1:])
    keep = torch.arange(360) != int(torch.nonzero(labels == 4)[0])
    with pytest.raises(JudgeError, match="images: got 35 of one class, expected at least 36 of every class"):
        judge.score(images[keep], labels[keep])
    broken = images.clone()
    broken[[3, 5], 0, 1, 1] = math.nan
    with pytest.raises(JudgeError, match="images: 2 of 360 hold NaN or Inf"):
        judge.score(broken, labels)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny.config(tmp_path_factory.mktemp("runs"))
    Trainer(config, Processes(0, 1, torch.device("cpu"))).fit()
    return config.folder


def test_command_writes_report_pictures_and_table(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert digits.main([str(trained), "--count", "360"]) == 0
    report = json.loads((trained / "report.json").read_text())
    assert (report["step"], report["count"], report["seed"]) == (8, 360, 0)
    assert report["training_seconds"] > 0
    assert [row["nfe"] for row in report["samples"]] == [1, 2, 4]
    for row in report["samples"]:
        # Eight steps train nothing: the images are noise, and the report must say so.
        assert row["agreement"] < 0.3
        assert row["frechet_over_real"] == row["frechet"] / report["real"]["frechet"] > 10
        assert row["images_per_s"] == pytest.approx(360 / row["seconds"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["NFE", "agreement", "Frechet", "x", "real", "neighbour", "seconds", "images/s"]
    assert [line.split()[0] for line in lines[2:]] == ["1", "2", "4", "real"]
    assert float(lines[2].split()[1]) == pytest.approx(report["samples"][0]["agreement"], abs=1e-4)
    with Image.open(trained / "samples.png") as picture:
        assert picture.width == picture.height >= 10 * 64
    with Image.open(trained / "losses.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 10


def test_command_repeats_itself_and_another_seed_differs(trained: Path) -> None:
    reports, pictures = [], []
    for seed in ("0", "0", "1"):
        assert digits.main([str(trained), "--count", "360", "--seed", seed]) == 0
        report = json.loads((trained / "report.json").read_text())
        timeless = [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in report["samples"]]
        reports.append((report["real"], timeless))
        pictures.append((trained / "samples.png").read_bytes())
    assert reports[0] == reports[1]
    assert pictures[0] == pictures[1]
    assert reports[0] != reports[2]
    assert pictures[0] != pictures[2]


def test_grid_has_a_row_per_class(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = DigitsSource("held_out")

    def real_images(flow: object, nfe: int, count: int, seed: int) -> torch.Tensor:
        return torch.cat([real.images[real.labels == label][: count // 10] for label in range(10)])

    monkeypatch.setattr(digits, "generate", real_images)
    assert digits.main([str(trained), "--count", "360"]) == 0
    with Image.open(trained / "samples.png") as picture:
        pixels = np.asarray(picture)
    cells = np.stack([pixels[1 + 65 * row :, 1 + 65 * column :][:64, :64] for row in range(10) for column in range(10)])
    images = torch.from_numpy(cells[:, 4::8, 4::8]).float()[:, None] / 127.5 - 1
    expected = torch.cat([real.images[real.labels == label][:10] for label in range(10)])
    assert float((images - expected).abs().max()) < 0.01


def test_training_seconds_weigh_intervals_by_their_steps() -> None:
    metrics = [{"step": 3, "time/step_s": 2.0}, {"step": 6, "time/step_s": 1.0}, {"step": 8, "time/step_s": 0.5}]
    assert digits.training_seconds(metrics) == 3 * 2 + 3 * 1 + 2 * 0.5


LINE = {"step": 1, "loss/velocity_mse": 1.0, "loss/consistency_mse": None, "gap_ratio": 0.1, "time/step_s": 0.5}


def test_metrics_that_are_no_number_are_nan(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(LINE) + "\n")
    (record,) = digits.read_metrics(path)
    assert math.isnan(record["loss/consistency_mse"])
    assert record["loss/velocity_mse"] == 1
    digits.plot_losses(tmp_path / "losses.png", digits.read_metrics(path) * 2, 0.5)
    with Image.open(tmp_path / "losses.png") as picture:
        picture.verify()


@pytest.mark.parametrize("text", ["", "{", "[]\n", json.dumps({"step": 1}) + "\n"])
def test_metrics_that_cannot_be_used_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(JudgeError, match=r"metrics.jsonl.*: .*expected"):
        digits.read_metrics(path)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_run_that_cannot_be_judged_is_refused_and_left_alone(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert digits.main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere/config.yaml: cannot be read" in capsys.readouterr().err

    config = (trained / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config.replace("input_size: 8", "input_size: 16"))
    before = files(tmp_path)
    assert digits.main([str(tmp_path)]) == 2
    assert "a network for images (1, 16, 16) of 10 classes, expected one for digits" in capsys.readouterr().err

    (tmp_path / "config.yaml").write_text(config)
    assert digits.main([str(tmp_path)]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err

    (tmp_path / "metrics.jsonl").write_text(json.dumps(LINE) + "\n")
    assert digits.main([str(tmp_path)]) == 2
    assert "without a sound checkpoint" in capsys.readouterr().err
    assert files(tmp_path).keys() == before.keys() | {"metrics.jsonl"}


def test_run_whose_sampler_cannot_draw_in_one_call_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **keywords: object) -> None:
        raise ValueError("nfe: got 1, expected an even number for heun")

    monkeypatch.setattr(digits, "sample", refuse)
    assert digits.main([str(trained), "--count", "360"]) == 2
    assert "error: nfe: got 1" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--count", "350"], ["--count", "365"], ["--seed", "-1"], ["--count", "many"]])
def test_impossible_options_are_refused(trained: Path, options: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        digits.main([str(trained), *options])
    assert stopped.value.code == 2


def test_images_of_two_seeds_have_no_noise_in_common(monkeypatch):
    drawn = []
    monkeypatch.setattr(digits, "sample_noise", lambda seeds, *args: drawn.extend(seeds.tolist()) or (None, None))
    monkeypatch.setattr(digits, "sample", lambda *args, **more: None)
    for seed in (0, 1, 2):
        digits.generate(None, 1, 360, seed)
    assert len(set(drawn)) == 3 * 360


def test_the_averages_are_judged_at_every_number_of_calls(tmp_path, monkeypatch):
    run = Trainer(tiny.config(tmp_path), Processes(0, 1, torch.device("cpu")))
    run.fit()
    judged, generate = [], digits.generate
    monkeypatch.setattr(digits, "generate", lambda *args: judged.append(args) or generate(*args))
    assert digits.main([str(run.folder.path), "--count", "360"]) == 0
    assert [nfe for _, nfe, _, _ in judged] == [1, *digits.NFE]
    for flow, _, _, _ in judged:
        for ours, average in zip(flow.network.parameters(), run.ema.network.parameters(), strict=True):
            assert torch.equal(ours, average)
