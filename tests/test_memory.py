"""Predicted against measured: the same step on tensors that have memory, counted op by op."""

import re

import pytest
import tiny
import torch

from soflow import memory
from soflow.assembly import assemble
from soflow.distributed import Processes
from soflow.kernels import reference
from soflow.memory import GIB, CountMemory, predict_peak, require_memory, sample_like
from soflow.run_folder import RunError

CPU, SHAPE = torch.device("cpu"), (1, 8, 8)
UNET = (tiny.UNET[0].replace("model_channels: 8", "model_channels: 32"), *tiny.UNET[1:])
WIDE = ("network.hidden_size=64", "network.depth=3", "network.patch_size=1", "train.batch_size=48")


def measured_peak(config, world_size: int = 1) -> int:
    with CountMemory() as count:
        step = assemble(config, Processes(0, world_size, CPU), reference).step
        mean, _, labels = (None if x is None else x[: len(step.positions)] for x in sample_like(config, SHAPE))
        for index in range(2):
            step(mean, None, labels, index)
    return count.peak


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("engine.recompute=norms",),
        ("engine.recompute=blocks", "engine.precision=bf16"),
        ("train.accumulation=3",),
        ("objective.name=meanflow",),
        ("objective.name=flow_matching", "objective.fm_ratio=1", "flow.sampler=euler"),
        UNET,
        (*UNET, "engine.recompute=norms"),
        (*UNET, "engine.recompute=blocks"),
    ],
)
def test_prediction_is_what_a_training_needs(tmp_path, settings):
    config = tiny.config(tmp_path, *WIDE, *settings)
    assert predict_peak(config, SHAPE, CPU) == pytest.approx(measured_peak(config), rel=0.01)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def group_of_one(tmp_path):
    """The group of this process alone, in which it is the first of two to DDP."""
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("engine.precision=bf16",),
        ("engine.recompute=blocks", "train.accumulation=4", "network.hidden_size=128"),
        (*UNET, "data.augment_p=0"),
    ],
)
def test_the_gradients_of_several_processes_are_in_memory_all_the_time(tmp_path, group_of_one, settings):
    config = tiny.config(tmp_path, *WIDE, *settings)
    assert predict_peak(config, SHAPE, CPU, world_size=2) == pytest.approx(measured_peak(config, 2), rel=0.01)


def test_recomputation_and_accumulation_save_what_they_say(tmp_path):
    def predict(*settings):
        return predict_peak(tiny.config(tmp_path, *WIDE, *settings), SHAPE, CPU)

    plain = predict()
    norms, blocks = predict("engine.recompute=norms"), predict("engine.recompute=blocks")
    assert blocks < norms < plain
    assert predict("train.accumulation=2") < 0.7 * plain
    assert predict_peak(tiny.config(tmp_path, *WIDE), SHAPE, CPU, world_size=2) < 0.7 * plain


def test_counts_storages_from_birth_to_end():
    with CountMemory() as count:
        a = torch.zeros(1000)
        view = a[:10].view(2, 5)
        assert (count.now, count.peak) == (4000, 4000)
        b = torch.ones(500, dtype=torch.float64)
        del a
        assert count.now == 8000
        del view
        assert count.now == 4000
        b.add_(1)
        # of a derivative that is zero: a shape, to which no memory belongs
        assert torch._efficientzerotensor((1000,)).untyped_storage().nbytes() == 4000
        assert (count.now, count.peak) == (4000, 8000)


@pytest.mark.parametrize(
    ("settings", "available", "advice"),
    [
        ((), 79, "use engine.recompute=norms or train.accumulation=2"),
        ((), 40, "use engine.recompute=blocks or train.accumulation=4"),
        (("engine.recompute=norms",), 40, "use engine.recompute=blocks or train.accumulation=2"),
        (("engine.recompute=blocks",), 15, "use train.accumulation=2"),
        ((), 1, "use a smaller network or more memory"),
    ],
)
def test_a_training_that_does_not_fit_is_refused_with_what_helps(tmp_path, monkeypatch, settings, available, advice):
    def predict(config, shape, device, world_size, network=None):
        needed = {"none": 84, "norms": 60, "blocks": 20}[config.engine.recompute] / config.train.accumulation
        return int(needed * GIB) + GIB

    monkeypatch.setattr(memory, "predict_peak", predict)
    config = tiny.config(tmp_path, "train.batch_size=256", *settings)
    needed = predict(config, SHAPE, CPU, 1)
    assert require_memory(config, SHAPE, CPU, 1, available=needed) == needed
    message = f"DiT at batch 256 needs {needed / GIB:.1f} GiB, this GPU has {available}.0: {advice}"
    with pytest.raises(RunError, match=f"^{re.escape(message)}$"):
        require_memory(config, SHAPE, CPU, 1, available=available * GIB)


@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 1), (13, 2)])
def test_advice_gives_every_part_of_every_process_a_row(tmp_path, monkeypatch, batch_size, world_size):
    tried = []

    def predict(config, *others):
        tried.append(config.train.accumulation)
        return predict_peak(config, *others)

    monkeypatch.setattr(memory, "predict_peak", predict)
    with pytest.raises(RunError, match="use a smaller network or more memory$"):
        require_memory(tiny.config(tmp_path, f"train.batch_size={batch_size}"), SHAPE, CPU, world_size, available=1000)
    assert tried == [1, 1, 1, 2, 4]


def test_each_process_of_a_prediction_has_the_larger_share(tmp_path):
    """Of 9 rows two processes have 4 and 5; without the buckets of DDP that is all that differs."""

    def predict(batch_size, world_size):
        config = tiny.config(tmp_path, f"train.batch_size={batch_size}", "engine.parallel=fsdp")
        return predict_peak(config, SHAPE, CPU, world_size)

    assert predict(9, 2) == predict(5, 1) > predict(4, 1)


def test_a_unet_that_does_not_fit_is_told_what_helps(tmp_path, monkeypatch):
    def config(recompute):
        return tiny.config(tmp_path, *UNET, "train.batch_size=48", f"engine.recompute={recompute}")

    monkeypatch.setattr(memory, "ACCUMULATIONS", ())
    norms = predict_peak(config("norms"), SHAPE, CPU)
    with pytest.raises(RunError, match=r"UNet at batch 48 needs .*: use engine\.recompute=norms$"):
        require_memory(config("none"), SHAPE, CPU, 1, available=norms)
    assert require_memory(config("norms"), SHAPE, CPU, 1, available=norms) == norms


def test_the_largest_model_in_gib(tmp_path):
    """XL/2 at batch 256 in bf16 by fused ops, without a GPU: more than 80 GB hold, and recomputation fits."""
    official = ("network={name: DiT-XL/2, input_size: 32, in_channels: 4, num_classes: 1000}", "train.batch_size=256")
    config = tiny.config(tmp_path, *official, "engine.precision=bf16")
    gpu = torch.device("cuda")
    assert 80 < predict_peak(config, (4, 32, 32), gpu) / GIB < 110


@pytest.mark.parametrize(("source", "has_std"), [("digits", False), ("latents, root: x", True), ("own", True)])
def test_a_batch_is_like_those_of_its_source(tmp_path, source, has_std):
    mean, std, labels = sample_like(tiny.config(tmp_path, f"data={{source: {source}}}"), (1, 8, 8))
    assert mean.shape == (12, 1, 8, 8)
    assert (std is not None) == has_std
    assert labels.shape == (12,)


def test_an_update_by_the_reference_takes_memory_of_its_own(tmp_path):
    """As much as copies of the weights: more than a step keeps, where a batch is small."""

    def predict(backend: str) -> int:
        shape = ("network.hidden_size=256", "train.batch_size=2", f"optim.backend={backend}")
        return predict_peak(tiny.config(tmp_path, *shape), (1, 8, 8), torch.device("cuda"))

    assert predict("auto") == predict("fused") < predict("reference")


def test_the_memory_of_an_own_network_is_what_is_required(tmp_path, monkeypatch):
    build = object()

    def predict(*args: object) -> int:
        assert args[-1] is build
        return 7

    monkeypatch.setattr(memory, "predict_peak", predict)
    shape = {"image_shape": (1, 8, 8), "device": torch.device("cuda"), "world_size": 1}
    assert require_memory(tiny.config(tmp_path), **shape, available=7, network=build) == 7
