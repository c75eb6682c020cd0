"""The whole step on a GPU: captured as one graph it is the eager one, and it never waits for the device."""

import pytest

pytest.importorskip("msgspec")
pytest.importorskip("ruamel.yaml")
pytest.importorskip("safetensors")
pytest.importorskip("PIL")

import tiny
import torch
from torch.nn.parallel import DistributedDataParallel

from soflow.assembly import Training, assemble, training_ops
from soflow.capture import NUM_WARMUP, CapturedCall
from soflow.data import batch_indices, open_source
from soflow.distributed import Processes
from soflow.kernels.multi_tensor import is_built
from soflow.step import DDP_WARMUP
from soflow.trainer import configure_torch

pytestmark = pytest.mark.skipif(not is_built(), reason="needs the CUDA extension")
GPU = torch.device("cuda", 0)


def training(folder, *settings, num_processes: int = 1) -> tuple[Training, object]:
    config = tiny.config(folder, "engine.device=cuda", *settings)
    return assemble(config, Processes(0, num_processes, GPU), training_ops(config, GPU)), open_source(config.data)


def samples(parts: Training, source, step: int):
    config = parts.step.config
    indices = batch_indices(len(source), config.train.batch_size, config.seed, step)
    mean, std, labels = source.read(indices[list(parts.step.positions)])
    return mean.to(GPU), std, labels.to(GPU)


SETTINGS = [
    (),
    ("engine.precision=bf16",),
    ("train.accumulation=2", "engine.recompute=norms"),
    ("optim.clip_norm=0.1",),
    ("optim.warmup_steps=5", "optim.schedule=cosine", "ema.profiles=[0.05,0.1]"),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_captured_step_trains_the_same_to_the_bit(tmp_path, settings):
    eager, source = training(tmp_path / "eager", "engine.cuda_graph=off", *settings)
    captured, _ = training(tmp_path / "captured", "engine.cuda_graph=on", *settings)
    assert_same_training(captured, eager, source, NUM_WARMUP + 5)


DIT_OF_256_TOKENS = (
    "network={name: DiT, input_size: 32, in_channels: 1, num_classes: 10, patch_size: 2, hidden_size: 128, depth: 2, "
    "num_heads: 2}"
)
UNET = (
    "network={name: UNet, input_size: 32, in_channels: 1, num_classes: 0, model_channels: 32, channel_mult: [1, 2], "
    "num_blocks: 1, attn_resolutions: [16]}"
)


@pytest.mark.parametrize(
    "settings",
    [
        (DIT_OF_256_TOKENS, "engine.precision=tf32"),
        (DIT_OF_256_TOKENS, "engine.precision=bf16"),
        (UNET, "engine.precision=tf32", "objective={cfg_scale: 1.0, mix_ratio: 1.0}"),
    ],
    ids=("DiT-tf32", "DiT-bf16", "UNet-tf32"),
)
def test_networks_with_operators_of_pytorch_train_the_same_to_the_bit(tmp_path, settings):
    """Backward of its attention and convolutions adds with atomics, unless the training tells it not to."""
    torch.use_deterministic_algorithms(False)
    both = [training(tmp_path / str(number), "train.batch_size=64", *settings)[0] for number in range(2)]
    configure_torch(both[0].step.config.engine)
    images, labels = torch.randn(64, 1, 32, 32, device=GPU), torch.arange(64, device=GPU) % 10
    for number in range(NUM_WARMUP + 5):
        for parts in both:
            parts.step(images, None, labels, number)
    for ours, theirs in zip(*(parts.flow.parameters() for parts in both), strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture
def group_of_one(tmp_path):
    """NCCL's group of this process alone, whose exchanges are those of the first of two."""
    torch.cuda.set_device(GPU)
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("nccl", init_method=store, rank=0, world_size=1, device_id=GPU)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_captured_step_with_ddp_trains_the_same_to_the_bit(tmp_path, settings, group_of_one):
    eager, source = training(tmp_path / "eager", "engine.cuda_graph=off", *settings, num_processes=2)
    captured, _ = training(tmp_path / "captured", "engine.cuda_graph=on", *settings, num_processes=2)
    assert isinstance(captured.step.module, DistributedDataParallel)
    try:
        assert_same_training(captured, eager, source, DDP_WARMUP + 5)
    finally:
        captured.step.release()  # or the group would wait for it for ever


def assert_same_training(captured: Training, eager: Training, source, num_steps: int) -> None:
    assert isinstance(captured.step._train, CapturedCall)
    for number in range(num_steps):
        for parts in (eager, captured):
            parts.step(*samples(parts, source, number), number)
    torch.cuda.synchronize()
    assert torch.equal(captured.step.sums, eager.step.sums)
    for ours, theirs in zip(captured.flow.parameters(), eager.flow.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(captured.averages, eager.averages, strict=True):
        for tensor, other in zip(ours.averages, theirs.averages, strict=True):
            assert torch.equal(tensor, other)


@pytest.mark.parametrize("cuda_graph", ["on", "off"])
def test_no_step_waits_for_the_device(tmp_path, cuda_graph):
    parts, source = training(tmp_path, f"engine.cuda_graph={cuda_graph}", "optim.nonfinite=skip")
    rows = [samples(parts, source, number) for number in range(NUM_WARMUP + 4)]
    for number in range(NUM_WARMUP + 1):
        parts.step(*rows[number], number)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(NUM_WARMUP + 1, NUM_WARMUP + 4):
            parts.step(*rows[number], number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
