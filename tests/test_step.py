"""One step: its rows, its calls, its parts, and that it never waits for the device."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from soflow import assembly, capture
from soflow import step as step_module
from soflow.assembly import Training, assemble, training_ops
from soflow.data import batch_indices, open_source
from soflow.distributed import Processes
from soflow.kernels import reference
from soflow.step import SUMMED
from soflow.times import gap_ratio

CPU = torch.device("cpu")
OBJECTIVES = {
    "soflow": (),
    "meanflow": ("objective.name=meanflow",),
    "flow_matching": ("objective.name=flow_matching", "objective.fm_ratio=1", "flow.sampler=euler"),
}
# what makes a host wait for a device: a value read, a size that depends on values, a copy to the host
SYNCHRONISING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


def training(tmp_path, *settings) -> tuple[Training, object]:
    config = tiny.config(tmp_path, *settings)
    return assemble(config, Processes(0, 1, CPU), training_ops(config, CPU)), open_source(config.data)


def samples(parts: Training, source, step: int):
    config = parts.step.config
    indices = batch_indices(len(source), config.train.batch_size, config.seed, step)
    return source.read(indices[list(parts.step.positions)])


class Watch(TorchDispatchMode):
    """Notes the ops that wait for a device, and those that copy between two."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.copies: list[str] = []
        self.ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops += 1
        name = func.overloadpacket.__name__
        boolean_index = name.startswith("index") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8)
            for t in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else [])
            if isinstance(t, torch.Tensor)
        )
        if name in SYNCHRONISING or boolean_index:
            self.waits.append(name)
        if "copy" in name and len({x.device for x in args if isinstance(x, torch.Tensor)}) > 1:
            self.copies.append(name)
        return func(*args, **(kwargs or {}))


SETTINGS = [(), ("engine.recompute=norms",), ("engine.precision=bf16",), ("train.accumulation=2",)]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_step_waits_for_the_device(tmp_path, monkeypatch, name, settings):
    parts, source = training(tmp_path, *OBJECTIVES[name], *settings, "optim.nonfinite=skip")
    # the update by PyTorch asks for its numbers of steps and decisions; that of the extension has them on the device
    monkeypatch.setattr(parts.optimizer, "step", lambda: None)
    for step in range(2):
        rows = samples(parts, source, step)
        with Watch() as watch:
            parts.step(*rows, step)
        assert watch.ops > 100
        assert watch.waits == []


def test_the_statistics_of_a_gpu_are_not_made_on_the_host(tmp_path, monkeypatch):
    """On a GPU that is pretended: a number that is copied there from the host would be waited for."""
    step = training(tmp_path, "optim.nonfinite=skip")[0].step
    with FakeTensorMode():
        for name in ("sums", "_bad_in_row", "_most_bad", "_skipped_row"):
            tensor = getattr(step, name)
            setattr(step, name, torch.zeros(tensor.shape, dtype=tensor.dtype, device="cuda"))
        monkeypatch.setattr(type(step.optimizer), "grad_norm", torch.ones((), device="cuda"))
        means = torch.zeros(len(step.sums) - 2, dtype=torch.float64, device="cuda")
        with Watch() as watch:
            step._accumulate(means)
    assert watch.ops > 10
    assert watch.copies == []


def test_the_watch_sees_what_it_should():
    x = torch.arange(3.0)
    with Watch() as watch:
        x.sum().item()
        bool(x.sum() > 1)
        x[x > 1]
        x.nonzero()
    assert len(watch.waits) == 4


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_objective_is_the_configured_one(tmp_path, name):
    config = tiny.config(tmp_path, *OBJECTIVES[name], "objective.loss_p=0.7", "objective.loss_eps=0.003")
    made = step_module.build_objective(config, reference)
    for field in ("cfg_scale", "cfg_decay_time", "mix_ratio", "loss_p", "loss_eps"):
        assert getattr(made, field) == getattr(config.objective, field), field


def test_a_step_trains_the_configured_flow(tmp_path):
    parts, _ = training(tmp_path, "flow={path: trig, parameterization: trig}")
    assert (parts.step.flow.path, parts.step.flow.parameterization) == ("trig", "trig")


def test_a_step_has_its_own_number_and_gap_ratio(tmp_path):
    parts, _ = training(tmp_path)
    times = parts.step.config.times
    for step in (0, 3, 7):
        number, r = parts.step.clock(step)
        assert number.item() == step
        assert r.item() == pytest.approx(gap_ratio(step, 8, times.gap_init, times.gap_end, times.gap_method), rel=1e-6)


def test_two_network_calls_with_the_rows_as_designed(tmp_path, monkeypatch):
    """Guidance without gradient: all rows without label, the consistency rows with; then all, with the differences."""
    parts, source = training(tmp_path, "train.batch_size=16", "objective.fm_ratio=0.75")
    network, calls = parts.step.flow.network, []
    run = network._run

    def noted(x, *rest):
        calls.append((len(x.x), 0 if x.d is None else len(x.d), torch.is_grad_enabled()))
        return run(x, *rest)

    monkeypatch.setattr(network, "_run", noted)
    parts.step(*samples(parts, source, 0), 0)
    assert calls == [(16 + 4, 0, False), (16, 4, True)]


@pytest.mark.parametrize("count", [1, 2])
def test_the_operations_of_a_step_are_those_of_all_its_calls(tmp_path, count):
    parts, _ = training(tmp_path, f"train.accumulation={count}")
    # of 12 rows forward and backward 36; guided without a label 12, and with one 6; the look-ahead 6
    assert parts.step.flops() == (36 + 12 + 6 + 6) * parts.flow.network.forward_flops()


def trained(tmp_path, *settings):
    parts, source = training(tmp_path, *settings)
    for step in range(3):
        parts.step(*samples(parts, source, step), step)
    return parts


@pytest.mark.parametrize("name", OBJECTIVES)
def test_accumulated_parts_are_the_batch(tmp_path, name):
    whole = trained(tmp_path, *OBJECTIVES[name], "optim.name=radam")
    for count in (2, 3, 12):
        parts = trained(tmp_path, *OBJECTIVES[name], "optim.name=radam", f"train.accumulation={count}")
        assert sorted(parts.step.positions) == list(range(12))
        torch.testing.assert_close(parts.step.sums, whole.step.sums, rtol=2e-5, atol=1e-6)
        for a, b in zip(parts.flow.parameters(), whole.flow.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("count", [3, 5])
def test_parts_of_unequal_size_weigh_by_their_rows(tmp_path, count):
    settings = ("train.batch_size=13", "objective.fm_ratio=0.4")
    whole, parts = trained(tmp_path, *settings), trained(tmp_path, *settings, f"train.accumulation={count}")
    assert len({len(part.share) for part in parts.step.parts}) > 1
    torch.testing.assert_close(parts.step.sums, whole.step.sums, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("recompute", ["norms", "blocks"])
@pytest.mark.parametrize("settings", [(), tiny.UNET], ids=["DiT", "UNet"])
def test_recomputed_training_has_the_same_bits(tmp_path, settings, recompute):
    for precision in ("fp32", "bf16"):
        plain = trained(tmp_path, *settings, f"engine.precision={precision}")
        ours = trained(tmp_path, *settings, f"engine.precision={precision}", f"engine.recompute={recompute}")
        assert torch.equal(ours.step.sums, plain.step.sums)
        for a, b in zip(ours.flow.parameters(), plain.flow.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("settings", "labels"), [((), None), (tiny.UNET, torch.rand(12, 6)), ((*tiny.UNET, "data.augment_p=0"), None)]
)
def test_every_weight_that_asks_for_a_gradient_gets_one(tmp_path, settings, labels):
    """Several processes would wait for the others."""
    parts, source = training(tmp_path, *settings)
    parts.step(*samples(parts, source, 0), 0, labels)
    assert all((p.grad is None) is not p.requires_grad for p in parts.flow.parameters())


@pytest.mark.parametrize("settings", [(), ("train.accumulation=2", "engine.precision=bf16")])
def test_a_captured_step_trains_the_same_to_the_bit(tmp_path, monkeypatch, settings):
    """With graphs that call again what they recorded: everything that changes reaches them through their buffers."""
    eager, source = training(tmp_path / "eager", *settings)
    monkeypatch.setattr(step_module, "choose_capture", lambda *arguments: True)
    monkeypatch.setattr(capture, "on_side_stream", nullcontext)
    monkeypatch.setattr(capture, "capture", lambda call, inputs: lambda: call(*inputs))
    captured, _ = training(tmp_path / "captured", *settings)
    for number in range(capture.NUM_WARMUP + 4):
        for parts in (eager, captured):
            parts.step(*samples(parts, source, number), number)
    assert captured.step.num_summed == eager.step.num_summed == capture.NUM_WARMUP + 4
    assert torch.equal(captured.step.sums, eager.step.sums)
    for ours, theirs in zip(captured.flow.parameters(), eager.flow.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("device", "world_size", "backend", "obstacle"),
    [
        ("cpu", 1, "reference", "the run is not on a GPU"),
        ("cuda", 1, "reference", "the optimizer's backend reference counts its steps on the host"),
        ("cuda", 1, "fused", None),
        ("cuda", 2, "reference", "the optimizer's backend reference counts its steps on the host"),
        ("cuda", 2, "fused", None),
    ],
)
def test_capture_is_chosen_where_it_can_be(device, world_size, backend, obstacle):
    class OfBackend:
        def __init__(self) -> None:
            self.backend = backend

    arguments = torch.device(device), world_size, OfBackend()
    assert step_module.choose_capture("auto", *arguments) is (obstacle is None and world_size == 1)
    assert step_module.choose_capture("off", *arguments) is False
    if obstacle is None:
        assert step_module.choose_capture("on", *arguments)
    else:
        with pytest.raises(
            ValueError, match=f"engine.cuda_graph: got 'on', expected 'auto' or 'off', because {obstacle}"
        ):
            step_module.choose_capture("on", *arguments)


@pytest.mark.parametrize("settings", [(), ("engine.precision=bf16",), ("objective.lookahead=two_pass",)])
def test_a_compiled_network_trains_the_same(tmp_path, monkeypatch, settings):
    """Traced whole, and run as traced: what a compiler makes of it is its own."""
    monkeypatch.setattr(assembly, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    plain, source = training(tmp_path / "plain", *settings)
    compiled, _ = training(tmp_path / "compiled", "engine.compile=true", *settings)
    for number in range(3):
        for parts in (plain, compiled):
            parts.step(*samples(parts, source, number), number)
    torch.testing.assert_close(compiled.step.sums, plain.step.sums, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_the_most_bad_steps_in_a_row_are_not_forgotten(tmp_path):
    """A GPU tells of them some steps later, when the row may have ended."""
    step = training(tmp_path)[0].step
    means = torch.zeros(len(SUMMED) - 2, dtype=torch.float64)
    for norm, most in ((1.0, 0), (math.nan, 1), (math.inf, 2), (1.0, 2), (math.nan, 2), (1.0, 2)):
        step.optimizer = SimpleNamespace(grad_norm=torch.tensor(norm))
        step._accumulate(means)
        assert step.most_bad_in_row() == most
