"""What backward computes again: the same bits, less memory, and differences that nothing holds."""

import weakref

import pytest
import test_dit
import test_unet
import torch

from soflow import kernels
from soflow.kernels import reference
from soflow.models.pair import Pair, PairOps
from soflow.models.recompute import recomputed

KEYS = torch.tensor([[3, 7, row] for row in range(6)])


def dit(dtype):
    x, dx, t, s, labels = test_dit.inputs(6, dtype)
    return test_dit.perturbed(dtype=dtype), (x, dx[3:], t, -0.01 * t[3:], s, labels)


def unet(dtype):
    """In training mode: with dropout."""
    x, dx, t, s, augment_labels = test_unet.inputs(6, dtype=dtype)
    network = test_unet.perturbed(dtype, resample_filter=[1, 1]).train()
    return network, (x, dx[3:], t, -0.01 * t[3:], s, None, augment_labels, KEYS)


def outcome(network, arguments, recompute):
    """F, dF, the gradients, and the bytes that backward keeps."""
    network.recompute = recompute
    network.zero_grad()
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        F_t, dF = network.forward_difference(*arguments)
    size = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    saved.clear()
    F_t.square().mean().backward()
    return [F_t, dF, *(p.grad for p in network.parameters() if p.requires_grad)], size


@pytest.mark.parametrize("ops", [reference, kernels])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("make", [dit, unet])
def test_same_bits_and_less_memory(ops, dtype, make):
    network, arguments = make(dtype)
    network.ops = PairOps(ops)
    plain, size = outcome(network, arguments, "none")
    for recompute in ("norms", "blocks"):
        ours, smaller = outcome(network, arguments, recompute)
        for a, b in zip(ours, plain, strict=True):
            assert torch.equal(a, b), recompute
        assert smaller < 0.8 * size, recompute
        size = smaller


def test_differences_are_computed_once_and_not_held():
    calls, held = [], []

    def stage(x):
        calls.append(x.d is not None)
        out = Pair(x.x.sin(), None if x.d is None else x.d * 2)
        if x.d is not None:
            held.append(weakref.ref(x.d))
        return (out,)

    x = torch.randn(3, requires_grad=True)
    (out,) = recomputed(stage, Pair(x, torch.ones(2)))
    assert out.d.tolist() == [2, 2]
    assert held[0]() is None
    out.x.sum().backward()
    assert calls == [True, False]
    assert torch.equal(x.grad, x.detach().cos())


def test_nothing_is_set_up_without_gradient():
    calls = []
    with torch.no_grad():
        (out,) = recomputed(lambda x: calls.append(x) or (x,), Pair(torch.ones(2, requires_grad=True)))
    assert len(calls) == 1
    assert out.x.tolist() == [1, 1]
