"""The parts of a training: the weights they begin with."""

import pytest
import tiny
import torch

from soflow import assembly, kernels
from soflow.assembly import initial_flow
from soflow.kernels import reference


def test_initial_weights_are_those_of_the_seed(tmp_path):
    def weights(seed):
        torch.rand(1)  # whatever was drawn before
        return initial_flow(tiny.config(tmp_path, f"seed={seed}"), reference).network.state_dict()

    first, again, other = weights(3), weights(3), weights(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.mlp.fc1.weight"], other["blocks.0.mlp.fc1.weight"])


def test_initial_weights_leave_the_gpus_of_the_machine_alone(tmp_path, monkeypatch):
    """A process that asked each for the state of its generator would take memory of every one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: pytest.fail(f"initialized GPU {device}"))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded the GPUs"))
    initial_flow(tiny.config(tmp_path), reference)


def test_both_calls_of_a_network_are_compiled(monkeypatch):
    graphs = []
    monkeypatch.setattr(assembly, "COMPILER", lambda graph, inputs: graphs.append(graph) or graph.forward)
    torch._dynamo.reset()
    network, x, t = tiny.network("DiT"), torch.randn(2, 3, 8, 8), torch.full((2,), 0.5)
    assembly.compile_calls(network)
    network(x, t, t)
    of_forward = len(graphs)
    assert of_forward > 0
    network.forward_difference(x, 0.1 * x, t, -0.1 * t, t)
    assert len(graphs) > of_forward


def test_meanflow_trains_with_the_ops_that_have_a_derivative(tmp_path):
    gpu = torch.device("cuda")
    assert assembly.training_ops(tiny.config(tmp_path), gpu) is kernels
    assert assembly.training_ops(tiny.config(tmp_path, "objective.name=meanflow"), gpu) is reference
