"""One global batch is one training, whatever the number of processes and however they share the weights (gloo)."""

import shutil
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from processes import SETTINGS, assert_same_metrics, finish, ranks, recipe, torchrun, train

from soflow import checkpoint
from soflow.distributed import Ballot, Processes, is_peer_failure, join_processes, resolve_device
from soflow.trainer import Trainer

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    torch.use_deterministic_algorithms(True)
    trainer = Trainer(tiny.config(tmp_path_factory.mktemp("alone"), *SETTINGS), ALONE)
    trainer.fit()
    return trainer.folder.path


IN_PARTS = ("train.accumulation=2", "engine.recompute=blocks")


@pytest.fixture(
    scope="module",
    params=[(2, "ddp"), (3, "ddp"), (2, "fsdp"), (3, "fsdp"), (2, "ddp", *IN_PARTS), (2, "fsdp", *IN_PARTS)],
    ids=lambda param: "-".join(map(str, param)),
)
def shared(request, tmp_path_factory) -> Path:
    num, parallel, *overrides = request.param
    return train(tmp_path_factory.mktemp(f"{parallel}-{num}"), num, f"engine.parallel={parallel}", *overrides)


@pytest.mark.slow
def test_processes_train_the_same_model(shared, alone):
    """24 rows on 3 processes, 12 of them velocity rows: even shares; all of 20 steps within 1e-5."""
    assert_same_metrics(shared, alone, 1e-5)


@pytest.mark.slow
def test_the_checkpoint_of_several_processes_is_that_of_one(shared, alone):
    found, expected = (checkpoint.load(run / "checkpoints" / "step-00000010") for run in (shared, alone))
    averages = ((found.ema, expected.ema), (found.profiles[0.1], expected.profiles[0.1]))
    for ours, theirs in ((found.model, expected.model), *averages):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)
    assert found.optimizer["param_groups"] == expected.optimizer["param_groups"]
    assert found.optimizer["state"].keys() == expected.optimizer["state"].keys()
    for index, entry in expected.optimizer["state"].items():
        for key, tensor in entry.items():
            torch.testing.assert_close(found.optimizer["state"][index][key], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [((2, "ddp"), (3, "fsdp")), ((3, "fsdp"), (2, "ddp")), ((2, "fsdp"), (1, "ddp"))]
)
def test_a_run_continues_with_other_processes(tmp_path, alone, before, after):
    run = train(tmp_path, before[0], f"engine.parallel={before[1]}")
    shutil.rmtree(run / "checkpoints" / "step-00000020")
    train(tmp_path, after[0], f"engine.parallel={after[1]}")
    assert_same_metrics(run, alone, 1e-5)


@pytest.mark.slow
def test_an_interval_of_the_log_that_a_checkpoint_cuts_is_summed_once(tmp_path):
    """Steps 8 to 14 with the checkpoint of step 10; then once more, from there."""
    alone, shared = (train(tmp_path / str(num), num, "train.log_every=7") for num in (1, 2))
    assert_same_metrics(shared, alone, 1e-5, steps=(7, 14, 20))
    shutil.rmtree(shared / "checkpoints" / "step-00000020")
    train(tmp_path / "2", 2, "train.log_every=7")
    assert_same_metrics(shared, alone, 1e-5, steps=(7, 14, 20))


@pytest.mark.slow
@pytest.mark.parametrize("augment_p", [0, 0.5])
def test_processes_train_the_same_unet(tmp_path, augment_p):
    """Also where nothing reaches the weights for augmentation labels."""
    settings = (*tiny.UNET, f"data.augment_p={augment_p}")
    alone, shared = (train(tmp_path / str(num), num, *settings) for num in (1, 2))
    assert_same_metrics(shared, alone, 1e-5)


@pytest.mark.slow
def test_three_processes_continue_to_the_bit(tmp_path):
    """Where the order of a sum counts, which two have not."""
    wide = "network.hidden_size=64"
    whole, broken = (train(tmp_path / name, 3, wide) for name in ("whole", "broken"))
    shutil.rmtree(broken / "checkpoints" / "step-00000020")
    train(tmp_path / "broken", 3, wide)
    for name in ("model.safetensors", "ema.safetensors"):
        ours, theirs = (run / "checkpoints" / "step-00000020" / name for run in (broken, whole))
        assert ours.read_bytes() == theirs.read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("objective.lookahead=two_pass",),
        ("objective.name=meanflow",),
        (*tiny.UNET, "objective.fm_ratio=0.5", "objective.lookahead=two_pass"),
    ],
    ids=["DiT-two_pass", "DiT-meanflow", "UNet-two_pass"],
)
def test_shards_meet_where_a_process_has_no_consistency_rows(tmp_path, settings):
    settings = ("engine.parallel=fsdp", "train.batch_size=2", *settings)
    alone, shared = (train(tmp_path / str(num), num, *settings) for num in (1, 2))
    assert_same_metrics(shared, alone, 1e-4)


@pytest.mark.slow
def test_sharded_averages_draw_with_weights_of_their_own_step(tmp_path):
    grids = []
    for parallel in ("ddp", "fsdp"):
        run = train(tmp_path / parallel, 2, f"engine.parallel={parallel}", "train.sample_every=5", "ema.decay=0.5")
        with ExitStack() as files:
            images = [files.enter_context(Image.open(path)) for path in sorted((run / "samples").iterdir())]
            grids.append(np.stack([np.asarray(image, dtype=np.int64) for image in images]))
    assert len(grids[0]) == 4
    assert np.abs(grids[0] - grids[1]).max() <= 1


@pytest.mark.slow
def test_bf16_is_the_same_policy_sharded_or_not(tmp_path):
    """The order of a sum decides how bfloat16 is rounded: equal to 1e-3, not to the bit."""
    runs = [
        train(tmp_path / parallel, 2, f"engine.parallel={parallel}", "engine.precision=bf16", "train.sample_every=20")
        for parallel in ("ddp", "fsdp")
    ]
    assert_same_metrics(runs[1], runs[0], 1e-3)
    assert all((run / "samples" / "step-00000020.png").stat().st_size > 0 for run in runs)


def test_a_process_alone_learns_its_votes_at_once():
    ballot = Ballot(ALONE, 2)
    assert ballot.cast(False, True) == [False, True]
    assert ballot.cast(False, False) == [False, False]
    assert ballot.result() == [False, False]


def test_errors_of_peers_are_told_from_others():
    assert is_peer_failure(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    assert is_peer_failure(torch.distributed.DistBackendError("NCCL error"))
    assert not is_peer_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.slow
def test_error_of_the_first_process_ends_all(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "other.txt").write_text("kept")
    code, output = finish(torchrun(2, "train.py", str(recipe(tmp_path / "recipe")), f"output_dir={tmp_path}"))
    assert code != 0
    assert output.count("without config.yaml") == 2


# An exchange ends while the first process, on its way out, keeps the interpreter to itself; what torch registers to be
# called at the end would give it away.
LATE_EXCHANGE = """
import atexit, ctypes, time
import torch
from soflow.distributed import join_processes

atexit._clear()
with join_processes("cpu", 60) as processes:
    time.sleep(0.5 * processes.rank)
    torch.distributed.all_reduce(torch.ones(3), async_op=True, group=processes.hosts)
    time.sleep(0.5 * processes.rank)
if processes.is_first:
    atexit.register(ctypes.PyDLL(None).sleep, 2)
"""


@pytest.mark.slow
def test_an_exchange_that_ends_last_does_not_abort_the_process():
    ends = [finish(process) for process in ranks(2, "-c", LATE_EXCHANGE)]
    assert [code for code, _ in ends] == [0, 0], ends


def test_alone_needs_no_process_group():
    with join_processes("cpu", 60) as processes:
        assert (processes.rank, processes.world_size, processes.is_first) == (0, 1, True)
        assert processes.agree("x") == "x"
        assert processes.sum(torch.ones(2)).tolist() == [1, 1]
        assert processes.collect(np.arange(3), [3])[0].tolist() == [0, 1, 2]
        with pytest.raises(KeyError), processes.failing_together():
            raise KeyError
    assert not torch.distributed.is_initialized()


def test_a_sum_over_processes_leaves_its_summands(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))
    values = torch.ones(3)
    assert Processes(0, 2, torch.device("cpu")).sum(values).tolist() == [2, 2, 2]
    assert values.tolist() == [1, 1, 1]


@pytest.fixture
def fourth_of_the_second_host(monkeypatch):
    """Rank 11 of two hosts with eight GPUs each."""
    for name, value in (("RANK", "11"), ("WORLD_SIZE", "16"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("fourth_of_the_second_host")
def test_a_process_computes_on_the_gpu_of_its_place_on_its_host():
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 3)
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.usefixtures("fourth_of_the_second_host")
def test_nccl_is_not_the_first_to_lose_patience(monkeypatch):
    """It ends the process without a word; gloo says what is wrong."""
    waits: dict[str, timedelta] = {}
    for name in ("init_process_group", "new_group"):
        monkeypatch.setattr(
            torch.distributed, name, lambda backend, timeout, device_id=None: waits.update({backend: timeout})
        )
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr("atexit.register", lambda *arguments: None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 11)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 16)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with join_processes("auto", 600.0) as processes:
        assert (processes.rank, processes.world_size, processes.device) == (11, 16, torch.device("cuda", 3))
    assert waits == {"gloo": timedelta(seconds=600), "nccl": timedelta(seconds=1200)}


@pytest.mark.parametrize(("rank", "world_size"), [("0", "0"), ("2", "2"), ("-1", "2"), ("0", "two"), ("", "1")])
def test_ranks_that_are_none_are_refused(rank, world_size, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    message = f"RANK, WORLD_SIZE: got '{rank}', '{world_size}', expected a rank from 0"
    with pytest.raises(ValueError, match=message), join_processes("cpu", 60):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu_is_said():
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(ValueError, match=r"engine\.device: got 'cuda'"):
        resolve_device("cuda")
