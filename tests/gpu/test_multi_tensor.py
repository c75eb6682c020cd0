"""The fused update on a GPU: everything its host build shows, at full length, and graphs, devices and sizes."""

import multi_tensor_cases as cases
import pytest
import torch

from soflow.kernels import multi_tensor
from soflow.optim import Optimizer

pytestmark = pytest.mark.skipif(not multi_tensor.is_built(), reason="the CUDA extension is not built")


@pytest.mark.parametrize("settings", cases.SETTINGS, ids=str)
def test_equals_the_reference(settings):
    cases.check_equals_reference("cuda", 100, **settings)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_misaligned(kind):
    cases.check_misaligned("cuda", 20, kind)


def test_averages_are_those_of_an_ema():
    cases.check_averages_are_those_of_an_ema("cuda", 20)


def test_bitwise_repeatable():
    cases.check_bitwise_repeatable("cuda", 50)


def test_norm_is_exact():
    cases.check_norm_is_exact("cuda")


def test_nonfinite_step_is_skipped():
    cases.check_nonfinite_step_is_skipped("cuda")


def test_guard_can_be_lifted():
    cases.check_guard_can_be_lifted("cuda")


def test_nonfinite_step_is_made_without_a_guard():
    cases.check_nonfinite_step_is_made("cuda")


def test_state_moves_between_backends():
    cases.check_state_moves_between_backends("cuda", 10)


def test_follows_moved_tensors_and_new_rates():
    cases.check_follows_moved_tensors_and_new_rates("cuda")


def test_follows_what_is_replaced():
    cases.check_follows_what_is_replaced("cuda")


def test_many_tensors():
    cases.check_many_tensors("cuda")


def test_auto_takes_it():
    assert Optimizer([torch.nn.Parameter(torch.zeros(3, device="cuda"))]).backend == "fused"


def record(setup: cases.Setup) -> None:
    """Give every trained parameter a gradient, 0.1 of itself plus one, made anew as a backward would."""
    for param in setup.params:
        if param.requires_grad:
            param.grad = 0.1 * param.detach() + 1.0


@pytest.mark.parametrize("settings", [{}, {"clip_norm": 0.5, "skip_nonfinite": True}], ids=str)
def test_graph_capture_with_a_changing_rate(settings):
    """Replays follow the rate, steps and averages as eager steps do, to the bit; and eager steps may come between."""
    captured, eager = (cases.Setup("fused", "cuda", **settings) for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            record(captured)
            captured.optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        record(captured)
        captured.optimizer.step()
    for _ in range(2):
        record(eager)
        eager.optimizer.step()
    for step in range(12):
        for setup in (captured, eager):
            setup.optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
        if step % 4 == 3:
            record(captured)
            captured.optimizer.step()
        else:
            captured.optimizer.prepare()
            graph.replay()
        record(eager)
        eager.optimizer.step()
        assert captured.optimizer.grad_norm.item() == eager.optimizer.grad_norm.item()
    assert captured.optimizer.finished == 14
    cases.assert_same(captured.tensors(), eager.tensors())


def test_what_a_graph_cannot_hold_is_refused():
    setup = cases.Setup("fused", "cuda")
    record(setup)
    setup.optimizer.step()
    setup.optimizer.param_groups[0]["lr"] = 1e-5
    refused = pytest.raises(RuntimeError, match="hyper-parameters: got new values while a graph is captured")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        setup.optimizer.step()


def test_no_host_synchronisation():
    setup = cases.Setup("fused", "cuda", clip_norm=1.0, skip_nonfinite=True)
    record(setup)
    setup.optimizer.step()
    record(setup)
    torch.cuda.set_sync_debug_mode("error")
    try:
        setup.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.xdist_group("memory")
def test_more_elements_than_int32():
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 50 * 2**30:
        pytest.skip("needs 50 GiB of free GPU memory")
    param = torch.nn.Parameter(torch.ones(2**31 + 5, device="cuda"))
    param.grad = torch.ones_like(param)
    optimizer = Optimizer([param], lr=0.25)
    optimizer.step()
    ends = torch.cat((param.detach()[:4], param.detach()[-9:]))
    torch.testing.assert_close(ends, torch.full_like(ends, 0.75))
    assert optimizer.grad_norm.item() == pytest.approx((2**31 + 5) ** 0.5, rel=1e-6)
