import math

import golden_vectors
import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from soflow import checkpoint
from soflow.models import DIT_PRESETS, DiT, build_network

SHAPE = {"input_size": 8, "in_channels": 3, "num_classes": 5, "patch_size": 2, "hidden_size": 24, "depth": 2}


def perturbed(seed: int = 0, dtype: torch.dtype = torch.float64) -> DiT:
    """A network whose zero-initialised layers are not zero."""
    network = build_network("DiT", num_heads=3, **SHAPE)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.to(dtype)


def inputs(num: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x, dx = torch.randn(2, num, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    t, s = torch.rand(2, num, generator=generator, dtype=torch.float64).sort(0, descending=True).values.to(dtype)
    return x, dx, t, s, torch.arange(num) % 6


@pytest.mark.parametrize("gap", [1.0, 1e-2])
def test_difference_is_that_of_two_evaluations(gap):
    network = perturbed()
    x, dx, t, s, labels = inputs(4)
    dx, dt = gap * dx, gap * (s - t)
    F_t, dF = network.forward_difference(x, dx, t, dt, s, labels)
    torch.testing.assert_close(F_t, network(x, t, s, labels))
    expected = network(x + dx, t + dt, s, labels) - network(x, t, s, labels)
    torch.testing.assert_close(dF, expected, rtol=1e-10, atol=1e-10)


def test_zero_difference_stays_zero():
    x, dx, t, s, labels = inputs(2)
    _, dF = perturbed().forward_difference(x, 0 * dx, t, 0 * t, s, labels)
    assert (dF == 0).all()


@pytest.mark.parametrize("num_differences", [0, 1, 3, 4])
def test_difference_of_the_last_rows_rides_along(num_differences):
    """Gradient and values of all rows are those of the plain call; the difference carries no gradient."""
    network = perturbed()
    x, dx, t, s, labels = inputs(4)
    rows = slice(4 - num_differences, None)
    F_t, dF = network.forward_difference(x, dx[rows], t, (s - t)[rows], s, labels)
    assert dF.shape == (num_differences, 3, 8, 8)
    assert not dF.requires_grad
    assert torch.equal(F_t, network(x, t, s, labels))
    gradients = [
        torch.autograd.grad(out.square().sum(), [p for p in network.parameters() if p.requires_grad])
        for out in (F_t, network(x, t, s, labels))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    if num_differences:
        _, alone = network.forward_difference(x[rows], dx[rows], t[rows], (s - t)[rows], s[rows], labels[rows])
        torch.testing.assert_close(dF, alone)


def test_no_label_is_the_null_label():
    network = perturbed()
    x, _, t, s, _ = inputs(3)
    assert torch.equal(network(x, t, s), network(x, t, s, torch.full((3,), 5)))
    assert not torch.equal(network(x, t, s), network(x, t, s, torch.full((3,), 4)))


def test_time_and_end_are_told_apart():
    network = perturbed()
    x, _, t, s, labels = inputs(3)
    assert not torch.allclose(network(x, t, s, labels), network(x, t, 0 * s, labels))
    assert not torch.allclose(network(x, t, s, labels), network(x, t * 0.9, s, labels))


def test_initialisation_is_the_official_one():
    torch.manual_seed(0)
    network = build_network("DiT", num_heads=3, **{**SHAPE, "hidden_size": 96})
    x, _, t, s, labels = (v.float() if v.is_floating_point() else v for v in inputs(2))
    assert (network(x, t, s, labels) == 0).all(), "adaLN-zero: the output starts at zero"
    for block in network.blocks:
        assert (block.adaLN_modulation.layer.weight == 0).all()
    assert network.t_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert network.t_embedder.mlp[2].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert network.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.15)
    for weight in (network.s_embedder.mlp[0].weight, network.blocks[0].mlp.fc1.weight):
        bound = math.sqrt(6 / sum(weight.shape))
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    patch_weight = network.x_embedder.proj.weight.flatten(1)
    assert patch_weight.abs().max().item() == pytest.approx(math.sqrt(6 / sum(patch_weight.shape)), rel=0.02)
    assert all((p == 0).all() for name, p in network.named_parameters() if name.endswith("bias"))


def test_position_features_are_the_official_ones():
    official = checkpoint.load_official(golden_vectors.FOLDER / "official_checkpoint_tiny.pt").model
    network = DiT(8, 2, 4, 32, 1, 2, 10)
    torch.testing.assert_close(network.pos_embed.data, official["pos_embed"], rtol=1e-6, atol=1e-6)
    network.load_state_dict(official)


def test_ops_are_an_argument():
    """A network calls the namespace it was given, and nothing else."""

    ops = tiny.Recording()
    network = DiT(8, 4, 3, 16, 1, 2, 5, ops=ops)
    x, dx, t, s, labels = (v.float() if v.is_floating_point() else v for v in inputs(2))
    network.forward_difference(x, dx, t, s - t, s, labels)
    used = {"attention", "gate_residual_norm", "gelu", "linear", "modulated_norm", "silu", "time_features"}
    assert set(ops.calls) == used | {f"{name}_difference" for name in used}


def test_official_spelling_builds_the_same():
    with torch.device("meta"):
        for name, shape in DIT_PRESETS.items():
            network = build_network(name.replace("/", "-"), input_size=8, num_classes=3)
            assert network.patch_size == shape["patch_size"]
            assert len(network.blocks) == shape["depth"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "DiT-G/2"}, "name: got 'DiT-G/2', expected one of DiT-B/4"),
        ({"name": "DiT-B/4"}, "patch_size: got .*expected nothing"),
        ({"num_heads": None}, "num_heads: got nothing"),
        ({"num_heads": 5}, "num_heads: got 5, expected a divisor of hidden_size 24"),
        ({"patch_size": 3}, "patch_size: got 3, expected a divisor of input_size 8"),
        ({"hidden_size": 26}, "hidden_size: got 26, expected a multiple of 4"),
        ({"depth": 0}, "depth: got 0"),
        ({"mlp_ratio": 0.01}, "mlp_ratio: got 0.01"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        build_network(**{"name": "DiT", "num_heads": 3, **SHAPE, **change})


def test_augmentation_labels_are_refused():
    x, _, t, s, labels = inputs(2)
    with pytest.raises(ValueError, match="augment_labels"):
        perturbed()(x, t, s, labels, torch.zeros(2, 6))


@pytest.mark.parametrize("name", ["DiT-B/4", "DiT-B/2", "DiT-M/2", "DiT-L/2", "DiT-XL/2"])
def test_operations_are_those_that_torch_counts(name):
    with torch.device("meta"):
        network = build_network(name)
        x, t, labels = torch.empty(2, 4, 32, 32), torch.empty(2), torch.empty(2, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            network(x, t, t, labels)
    assert counter.get_total_flops() == 2 * network.forward_flops()


def test_operations_of_another_shape():
    with torch.device("meta"):
        network = DiT(12, 3, 2, 24, 2, 3, 7, mlp_ratio=2.5)
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 2, 12, 12), torch.empty(1), torch.empty(1))
    assert counter.get_total_flops() == network.forward_flops()
