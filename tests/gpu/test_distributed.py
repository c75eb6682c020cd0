"""Two GPUs train the model that one trains: NCCL, captured or not, with whole weights or parts of them."""

import pytest

pytest.importorskip("msgspec")
pytest.importorskip("ruamel.yaml")
pytest.importorskip("safetensors")
pytest.importorskip("PIL")

import torch
from processes import assert_same_metrics, train

from soflow.kernels.multi_tensor import is_built

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
ON_GPUS = "engine.device=cuda"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(tmp_path_factory.mktemp("alone"), 1, ON_GPUS)


CAPTURED = pytest.param("engine.cuda_graph=on", marks=pytest.mark.skipif(not is_built(), reason="needs the extension"))


@pytest.mark.parametrize("setting", ["engine.cuda_graph=off", CAPTURED, "engine.parallel=fsdp", "train.accumulation=2"])
def test_two_gpus_train_the_same_model(tmp_path, alone, setting):
    """20 steps, of which 9 are captured; products of other shapes are rounded otherwise."""
    assert_same_metrics(train(tmp_path, 2, ON_GPUS, setting), alone, 1e-4)
