"""The fused update: its tables in Python, and its kernels and arithmetic compiled for the host."""

import ctypes

import multi_tensor_cases as cases
import multi_tensor_host
import pytest
import test_golden
import test_trainer
import tiny
import torch
from multi_tensor_host import extension

from soflow.kernels import multi_tensor
from soflow.kernels.multi_tensor import GroupRow
from soflow.optim import Optimizer, optimizer
from soflow.trainer import Trainer

pytestmark = pytest.mark.skipif(multi_tensor_host.COMPILER is None, reason="needs g++")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return multi_tensor_host.build(tmp_path_factory.mktemp("host"))


@pytest.fixture
def host(library, monkeypatch):
    """The extension replaced by its host build, which takes tensors of the CPU."""
    host = extension(library)
    monkeypatch.setattr(multi_tensor, "load_extension", lambda: host)
    monkeypatch.setattr(multi_tensor, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(optimizer, "is_built", lambda: True)
    return host


@pytest.mark.parametrize("settings", cases.SETTINGS, ids=str)
def test_equals_the_reference(host, settings):
    cases.check_equals_reference("cpu", 8, **settings)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_misaligned(host, kind):
    cases.check_misaligned("cpu", 3, kind)


def test_averages_are_those_of_an_ema(host):
    cases.check_averages_are_those_of_an_ema("cpu", 6)


def test_bitwise_repeatable(host):
    cases.check_bitwise_repeatable("cpu", 2)


def test_norm_is_exact(host):
    cases.check_norm_is_exact("cpu")


def test_golden_trajectory(host):
    """The official run's final weights, losses and norms of every step."""
    test_golden.test_trajectory("difference")
    assert host.calls.count("update") == 5


def test_training_resumes_to_the_bit(host, tmp_path):
    settings = ("optim.backend=fused", "optim.clip_norm=1", "ema.every=3", "ema.dtype=float64", "train.total_steps=6")
    settings += ("optim.warmup_steps=3", "optim.schedule=cosine", "ema.profiles=[0.05,0.1]")
    whole = test_trainer.train(tiny.config(tmp_path / "whole", *settings))
    config = tiny.config(tmp_path / "parts", *settings)
    test_trainer.train(config, until=4)
    resumed = Trainer(config, test_trainer.ALONE)
    assert resumed.optimizer.finished == 4
    assert resumed.fit()
    assert resumed.optimizer.backend == "fused"
    test_trainer.assert_same_state(resumed, whole)


def test_nonfinite_step_is_skipped(host):
    cases.check_nonfinite_step_is_skipped("cpu")


def test_guard_can_be_lifted(host):
    cases.check_guard_can_be_lifted("cpu")


def test_nonfinite_step_is_made_without_a_guard(host):
    cases.check_nonfinite_step_is_made("cpu")


def test_state_moves_between_backends(host):
    cases.check_state_moves_between_backends("cpu", 2)


def test_follows_moved_tensors_and_new_rates(host):
    cases.check_follows_moved_tensors_and_new_rates("cpu")


def test_follows_what_is_replaced(host):
    cases.check_follows_what_is_replaced("cpu")


def test_many_tensors(host):
    cases.check_many_tensors("cpu")


def test_launches(host):
    """One per step; the norm before it only where clipping or the guard needs it; addresses and rates only when new."""
    setup = cases.Setup("fused", "cpu", shapes=((3,), (5,)))
    gradients = [torch.ones(3), torch.ones(5)]
    for _ in range(3):
        for param, gradient in zip(setup.params, gradients, strict=False):
            param.grad = gradient
        setup.optimizer.step()
    # rates, averages and limits when made, again with the tables that have the moments; then where the gradients lie
    assert host.calls == ["write"] * 7 + ["update"] * 3
    setup.optimizer.skip_nonfinite = True
    del host.calls[:]
    setup.optimizer.step()
    assert host.calls == ["write", "norm", "update"]


def test_no_tensors_with_elements(host):
    setup = cases.Setup("fused", "cpu", shapes=((0,),))
    setup.set_gradients(0)
    setup.optimizer.step()
    assert setup.optimizer.grad_norm == 0
    assert setup.optimizer.state_dict()["state"][0]["step"] == 1


@pytest.mark.parametrize("radam", [0.0, 1.0])
@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.9])
def test_arithmetic_of_an_element_is_torchs(library, radam, beta1):
    """Up to 1e-6 of the weight over 100 steps, in float32 against torch.optim in float64."""
    kind = torch.optim.RAdam if radam else torch.optim.AdamW
    weight = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    theirs = kind([weight], lr=1e-2, betas=(beta1, 0.99), eps=1e-6, weight_decay=0.1)
    row = (ctypes.c_double * 6)(*GroupRow(1e-2, beta1, 0.99, 1e-6, 0.1, radam))
    w, m, v = ctypes.c_float(0.7), ctypes.c_float(0), ctypes.c_float(0)
    for step in range(1, 101):
        gradient = torch.sin(torch.tensor(0.3 * step)).item()
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        theirs.step()
        pointers = [ctypes.byref(x) for x in (w, m, v)]
        library.update_element(row, ctypes.c_double(step), ctypes.c_float(gradient), *pointers)
    state = theirs.state[weight]
    for ours, exact in ((w, weight), (m, state["exp_avg"]), (v, state["exp_avg_sq"])):
        assert ours.value == pytest.approx(exact.item(), rel=2e-6, abs=1e-7)


@pytest.mark.parametrize("in_double", [False, True])
@pytest.mark.parametrize("decay", [0.3, 0.999, 0.9999])
def test_an_average_has_the_size_of_what_it_averages(library, decay, in_double):
    """Over as many steps as it remembers: factors that do not sum to 1 would show as 1.7e-4 at 0.9999."""
    weights = 1 + 0.1 * torch.randn(round(5 / (1 - decay)), generator=torch.Generator().manual_seed(0))
    ours, theirs, exact = torch.zeros(1), torch.zeros(()), 0.0
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (ours, weights))
    library.average(ctypes.c_double(decay), ctypes.c_bool(in_double), *pointers, ctypes.c_int64(len(weights)))
    for weight in weights:
        theirs.lerp_(weight, 1 - decay)
        exact = decay * exact + (1 - decay) * weight.item()
    assert abs(ours.item() - exact) <= 2 * abs(theirs.item() - exact) + 5e-6


def test_bf16_rounds_as_torch(library):
    words = torch.arange(0, 2**32, 65521, dtype=torch.int64).to(torch.int32)
    values = torch.cat((words.view(torch.float32), torch.tensor([0.0, -0.0, 1.00390625, 1.01171875, 3.4e38])))
    rounded, wide = torch.empty(len(values), dtype=torch.bfloat16), torch.empty(len(values))
    count = ctypes.c_int64(len(values))
    library.to_bf16(*(ctypes.c_void_p(t.data_ptr()) for t in (values, rounded)), count)
    finite = ~values.isnan()
    assert torch.equal(rounded[finite].view(torch.int16), values.bfloat16()[finite].view(torch.int16))
    assert rounded[~finite].isnan().all()
    library.from_bf16(*(ctypes.c_void_p(t.data_ptr()) for t in (rounded, wide)), count)
    assert torch.equal(wide[finite], rounded[finite].float())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([torch.zeros(2, dtype=torch.float64)], "float64"),
        ([torch.zeros(2, 3).t()], r"strides \(1, 3\)"),
        ([torch.zeros(2), torch.zeros(2, device="meta")], "on meta"),
    ],
)
def test_parameters_it_cannot_take_are_refused(host, params, message):
    params = [torch.nn.Parameter(p) for p in params]
    with pytest.raises(ValueError, match=rf"optim\.backend: got 'fused'.*{message}"):
        Optimizer(params, backend="fused")
    assert Optimizer(params, backend="auto").backend == "reference"


def test_tensors_it_cannot_take_are_refused(host):
    param = torch.nn.Parameter(torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"shadow: got torch.float32 .*expected contiguous torch.bfloat16"):
        Optimizer([param], shadows={param: torch.zeros(4, 2)}, backend="fused")
    optimizer = Optimizer([param], shadows={}, backend="fused")
    optimizer.gradient_of = lambda _: torch.zeros(4, 2, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"gradient: got torch.float16 of shape \(4, 2\)"):
        optimizer.step()
    with pytest.raises(ValueError, match="averages: got 9, expected at most 8"):
        cases.Setup("fused", "cpu", averages=cases.AVERAGES[:1] * 9)


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(multi_tensor, "find_spec", lambda name: None)
    monkeypatch.setattr(multi_tensor, "DEVICE_TYPE", "cpu")
    with pytest.raises(RuntimeError, match=r"_soflow_C.*SOFLOW_BUILD_CUDA=1"):
        Optimizer([torch.nn.Parameter(torch.zeros(1))], backend="fused")


def test_fused_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match="on cpu, expected all on one GPU"):
        Optimizer([torch.nn.Parameter(torch.zeros(1))], backend="fused")
