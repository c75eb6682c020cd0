import copy
import inspect
import math

import golden_vectors
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from soflow.kernels import reference
from soflow.models import UNET_CIFAR10, Pair, UNet, build_network
from soflow.models.dropout import Dropout, fresh_draw_keys
from soflow.models.unet import Conv, GroupNorm
from soflow.streams import DROPOUT_STREAM

SHAPE = {
    "img_resolution": 8,
    "in_channels": 3,
    "out_channels": 3,
    "augment_dim": 6,
    "model_channels": 16,
    "channel_mult": [1, 2],
    "channel_mult_emb": 4,
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.3,
    "embedding_type": "positional",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
GAPS = (0.1, 0.01, 0.002, 0.0003125, 1e-6)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perturbed(dtype: torch.dtype = torch.float64, **change: object) -> UNet:
    """A network in evaluation mode whose layers that start near zero are not near zero."""
    network = UNet(**{**SHAPE, **change})
    golden_vectors.set_parameters(network, param_seed=7, std=0.06)
    return network.eval().to(dtype)


def inputs(num: int, size: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """x, dx, t, s and augmentation labels; every number is a float32."""
    x, dx = rand(2, num, 3, size, size)
    generator = torch.Generator().manual_seed(1)
    t, s = torch.rand(2, num, generator=generator).sort(0, descending=True).values
    return tuple(v.float().to(dtype) for v in (x, dx, t, s, rand(num, 6, seed=2)))


def relative(ours: Tensor, exact: Tensor) -> float:
    ours, exact = ours.detach().double(), exact.detach().double()
    return ((ours - exact).norm() / exact.norm()).item()


# --------------------------------------------------------------------------------------------------
# The official numbers


def test_golden_vectors():
    arrays, meta = golden_vectors.load("unet_small")
    network = UNet(**meta["args"])
    assert sorted(name for name, _ in network.named_parameters()) == meta["param_names"]
    golden_vectors.set_parameters(network, meta["param_seed"], meta["param_std"])
    x, t, s, augment_labels = (arrays[key] for key in ("x", "t", "s", "augment_labels"))

    out = network(x, t, s, augment_labels=augment_labels)
    assert relative(out, arrays["out"]) <= 1e-5
    assert relative(network(x, t, s), arrays["out_no_augment"]) <= 1e-5
    loss = out.square().mean()
    assert loss.item() == pytest.approx(arrays["loss"].item(), rel=1e-5)
    loss.backward()
    errors = {}
    for name, parameter in network.named_parameters():
        golden = arrays[f"grad.{name}"]
        errors[name] = ((golden_vectors.summary(parameter.grad) - golden).abs().max() / golden[0]).item()
    assert max(errors.values()) <= 2e-5


def test_official_shape_has_the_official_state_dict():
    """Names, shapes and order: the official optimizer state knows parameters by their position only."""
    official = golden_vectors.official_models()["UNet"]
    with torch.device("meta"):
        network = build_network("UNet")
    assert sum(parameter.numel() for parameter in network.parameters()) == official["parameters"] == 55_932_419
    ours = {name: list(value.shape) for name, value in network.state_dict().items()}
    assert list(ours.items()) == list(official["state_dict"].items())
    assert (network.input_size, network.in_channels, network.num_classes) == (32, 3, 0)


# --------------------------------------------------------------------------------------------------
# The ops


def test_group_norm_is_the_textbook_formula():
    x, weight, bias = 3.0 + rand(2, 12, 4, 3), rand(12, seed=1), rand(12, seed=2)
    groups = x.reshape(2, 3, -1)
    mean, var = groups.mean(-1, keepdim=True), groups.var(-1, keepdim=True, unbiased=False)
    expected = ((groups - mean) / (var + 1e-6).sqrt()).reshape(x.shape) * weight.view(12, 1, 1) + bias.view(12, 1, 1)
    torch.testing.assert_close(reference.group_norm(x, weight, bias, 3), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strided", [False, True])
def test_group_norm_difference(strided):
    x, dx, weight, bias = rand(2, 12, 4, 3), rand(2, 12, 4, 3, seed=3), rand(12, seed=1), rand(12, seed=2)
    if strided:
        x, dx = (v.to(memory_format=torch.channels_last) for v in (x, dx))
    expected = reference.group_norm(x + dx, weight, bias, 3) - reference.group_norm(x, weight, bias, 3)
    difference = reference.group_norm_difference(x, dx, weight, 3)
    torch.testing.assert_close(difference, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("gap", GAPS)
def test_group_norm_difference_is_exact_relative_to_itself(gap):
    x, dx, weight = rand(2, 12, 8, 8).float(), (gap * rand(2, 12, 8, 8, seed=3)).float(), rand(12, seed=1).float()
    exact = reference.group_norm_difference(x.double(), dx.double(), weight.double(), 3)
    assert relative(reference.group_norm_difference(x, dx, weight, 3), exact) <= 5e-7


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_conv_is_the_zero_padded_sum(kernel_size):
    x, weight, bias = rand(2, 3, 5, 4), rand(6, 3, kernel_size, kernel_size, seed=1), rand(6, seed=2)
    reach = kernel_size // 2
    padded = nn.functional.pad(x, (reach,) * 4)
    expected = bias.view(6, 1, 1).expand(2, 6, 5, 4).clone()
    for row in range(kernel_size):
        for column in range(kernel_size):
            window = padded[:, :, row : row + 5, column : column + 4]
            expected += torch.einsum("bchw,dc->bdhw", window, weight[:, :, row, column])
    torch.testing.assert_close(reference.conv(x, weight, bias), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        reference.conv_difference(x, weight), expected - bias.view(6, 1, 1), rtol=1e-12, atol=1e-12
    )


def test_conv_computes_in_the_dtype_of_its_weight():
    x, weight, bias = rand(2, 3, 5, 4).float(), rand(6, 3, 3, 3, seed=1).bfloat16(), rand(6, seed=2).float()
    y = reference.conv(x, weight, bias)
    expected = reference.conv(x.bfloat16(), weight).float() + bias.view(6, 1, 1)
    assert y.dtype == torch.float32
    assert torch.equal(y, expected)


@pytest.mark.parametrize("line", [[1, 1], [1, 3, 3, 1]])
def test_resampling_is_the_matrix_of_its_taps(line):
    """Halving is M x M^T with the taps in the rows of M, zero beyond the border; doubling is 4 M^T x M."""
    taps = torch.tensor(line, dtype=torch.float64) / sum(line)
    size, offset = 8, len(line) // 2 - 1
    matrix = torch.zeros(size // 2, size, dtype=torch.float64)
    for row in range(size // 2):
        for k, tap in enumerate(taps):
            if 0 <= 2 * row + k - offset < size:
                matrix[row, 2 * row + k - offset] = tap
    square = torch.outer(taps, taps)[None, None]
    x = rand(2, 3, size, size)
    torch.testing.assert_close(reference.downsample(x, square), matrix @ x @ matrix.T, rtol=1e-12, atol=1e-12)
    small = rand(2, 3, size // 2, size // 2)
    expected = 4 * matrix.T @ small @ matrix
    torch.testing.assert_close(reference.upsample(small, square), expected, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------
# The network and its difference


@pytest.mark.parametrize("gap", [1.0, 0.1, 1e-2])
@pytest.mark.parametrize(
    "change", [{}, {"attn_resolutions": [], "channel_mult": [1, 1, 2]}, {"augment_dim": 0, "resample_filter": [1, 1]}]
)
def test_difference_is_that_of_two_evaluations(change, gap):
    network = perturbed(**change)
    x, dx, t, s, augment_labels = inputs(3)
    conditions = (None, augment_labels if network.augment_dim else None)
    dx, dt = gap * dx, gap * (s - t)
    F_t, dF = network.forward_difference(x, dx, t, dt, s, *conditions)
    torch.testing.assert_close(F_t, network(x, t, s, *conditions))
    expected = network(x + dx, t + dt, s, *conditions) - network(x, t, s, *conditions)
    assert relative(dF, expected) <= 1e-9


@pytest.mark.parametrize("gap", GAPS)
def test_difference_in_float32_is_exact_relative_to_itself(gap):
    _, meta = golden_vectors.load("unet_small")
    network = UNet(**meta["args"])
    golden_vectors.set_parameters(network, meta["param_seed"], meta["param_std"])
    x, dx, t, s, augment_labels = inputs(2, size=16, dtype=torch.float32)
    pair = x, gap * dx, t, gap * (s - t), s
    with torch.no_grad():
        _, dF = network.forward_difference(*pair, augment_labels=augment_labels)
        _, exact = (
            copy.deepcopy(network)
            .double()
            .forward_difference(*(v.double() for v in pair), augment_labels=augment_labels.double())
        )
    assert relative(dF, exact) <= 5e-6


@pytest.mark.parametrize("gap", GAPS)
def test_difference_with_bf16_products_loses_no_more_as_the_gap_closes(gap):
    """At every gap, bf16 products cost at most twice what rounding the weights to bf16 costs in exact arithmetic."""
    network, rounded, exact = perturbed(torch.float32), perturbed(), perturbed()
    for module, exact_module in zip(network.modules(), rounded.modules(), strict=True):
        if isinstance(module, nn.Linear | Conv):
            module.weight.data = module.weight.data.bfloat16()
            exact_module.weight.data = module.weight.data.double()
    x, dx, t, s, _ = inputs(4, dtype=torch.float32)
    pair = x, gap * dx, t, gap * (s - t), s
    wide_pair = [v.double() for v in pair]
    with torch.no_grad():
        F_t, dF = network.forward_difference(*pair)
        _, rounded_dF = rounded.forward_difference(*wide_pair)
        _, exact_dF = exact.forward_difference(*wide_pair)
    assert F_t.dtype == dF.dtype == torch.float32
    assert relative(dF, exact_dF) <= 2 * relative(rounded_dF, exact_dF) < 0.05


def test_zero_difference_stays_zero():
    x, dx, t, s, _ = inputs(2)
    _, dF = perturbed().forward_difference(x, 0 * dx, t, 0 * t, s)
    assert (dF == 0).all()


@pytest.mark.parametrize("num_differences", [0, 1, 3])
def test_difference_of_the_last_rows_rides_along(num_differences):
    """Gradient and values of all rows are those of the plain call; the difference carries no gradient."""
    network = perturbed()
    x, dx, t, s, augment_labels = inputs(3)
    rows = slice(3 - num_differences, None)
    F_t, dF = network.forward_difference(x, dx[rows], t, (s - t)[rows], s, None, augment_labels)
    plain = network(x, t, s, None, augment_labels)
    assert dF.shape == (num_differences, 3, 8, 8)
    assert not dF.requires_grad
    assert torch.equal(F_t, plain)
    gradients = [torch.autograd.grad(out.square().sum(), list(network.parameters())) for out in (F_t, plain)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    if num_differences:
        _, alone = network.forward_difference(
            x[rows], dx[rows], t[rows], (s - t)[rows], s[rows], None, augment_labels[rows]
        )
        torch.testing.assert_close(dF, alone)


def test_every_input_and_every_parameter_matters():
    network = perturbed()
    x, dx, t, s, augment_labels = inputs(2)
    out = network(x, t, s, augment_labels=augment_labels)
    for other in (
        network(x + dx, t, s, augment_labels=augment_labels),
        network(x, 0.9 * t, s, augment_labels=augment_labels),
        network(x, t, 0.9 * s, augment_labels=augment_labels),
        network(x, t, s),
    ):
        assert not torch.allclose(out, other)
    out.square().sum().backward()
    assert all(parameter.grad.norm() > 0 for parameter in network.parameters())


def test_a_factor_meets_the_difference_of_its_own_rows():
    factor = torch.arange(4.0)[:, None]
    product = Pair(torch.ones(4, 3), torch.ones(2, 3)).times(factor)
    assert torch.equal(product.x, factor.expand(4, 3))
    assert torch.equal(product.d, factor[2:].expand(2, 3))


def test_a_dropout_mask_is_that_of_its_seed_step_position_and_layer():
    keys = torch.tensor([[3, 7, 0], [3, 7, 5], [4, 7, 0]])
    dropout, x, masks = Dropout(reference, 0.25, keys), torch.ones(3, 2, 8, 8), set()
    for layer in (0, 6):
        u = reference.uniform(keys[:, 0], keys[:, 1], DROPOUT_STREAM + layer, keys[:, 2], 128)
        mask = dropout.mask(layer, x)
        assert torch.equal(mask, (u >= 0.25).float().view(x.shape) / 0.75)
        masks |= {row.numpy().tobytes() for row in mask}
    assert len(masks) == 6


def test_every_row_and_every_block_has_a_dropout_mask_of_its_own(monkeypatch):
    network, layers = perturbed().train(), []
    mask = Dropout.mask
    monkeypatch.setattr(Dropout, "mask", lambda self, layer, x: layers.append(layer) or mask(self, layer, x))
    x, _, t, s, _ = inputs(2)
    network(x, t, s)
    assert sorted(layers) == list(range(sum(hasattr(module, "conv1") for module in network.modules())))
    first, second = mask(Dropout(reference, 0.5, fresh_draw_keys(2, torch.device("cpu"))), 0, torch.ones(2, 3, 8, 8))
    assert not torch.equal(first, second)


def test_dropout_masks_both_members_of_the_pair_alike():
    network = perturbed().train()
    x, dx, t, s, _ = inputs(3)
    dx, dt = 0.1 * dx, 0.1 * (s - t)
    results = []
    for call in (
        lambda: network.forward_difference(x, dx, t, dt, s),
        lambda: network(x, t, s),
        lambda: network(x + dx, t + dt, s),
    ):
        torch.manual_seed(3)
        results.append(call())
    (F_t, dF), here, there = results
    assert torch.equal(F_t, here)
    assert relative(dF, there - here) <= 1e-9
    assert relative(here, network.eval()(x, t, s)) > 0.01, "dropout drops nothing"


def test_dropout_keeps_the_mean_and_can_be_off():
    x, _, t, s, _ = inputs(2)
    without = perturbed(dropout=0.0)
    assert torch.equal(without.train()(x, t, s), without.eval()(x, t, s))
    network = perturbed(dropout=0.3).train()
    torch.manual_seed(0)
    seen = []
    for block in (network.enc["8x8_block0"], network.dec["4x4_in0"]):
        block.conv1.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1].x))
    network(x, t, s)
    for h in seen:
        kept = (h != 0).double().mean().item()
        assert kept == pytest.approx(0.7, abs=4 * math.sqrt(0.7 * 0.3 / h.numel()))
    torch.manual_seed(0)
    dropped = seen[0]
    network.eval()(x, t, s)
    full = seen[2]
    torch.testing.assert_close(dropped, torch.where(dropped != 0, full / 0.7, 0.0), rtol=1e-12, atol=0)


def test_initialisation_is_that_of_the_facts():
    torch.manual_seed(0)
    network = UNet(**{**SHAPE, "model_channels": 64, "attn_resolutions": [8, 4]})
    blocks = [module for name, module in network.named_modules() if name.count(".") == 1 and hasattr(module, "conv0")]
    attending = [block for block in blocks if block.norm2 is not None]
    assert len(blocks) == 10
    assert len(attending) == 5
    gains = [(block.conv0.weight, 1.0) for block in blocks]
    gains += [(block.affine.weight, 1.0) for block in blocks]
    gains += [(block.conv1.weight, 1e-5) for block in blocks]
    gains += [(block.skip.weight, 1.0) for block in blocks if block.skip is not None]
    gains += [(block.qkv.weight, math.sqrt(0.2)) for block in attending]
    gains += [(block.proj.weight, 1e-5) for block in attending]
    gains += [(network.enc["8x8_conv"].weight, 1.0), (network.dec["8x8_aux_conv"].weight, 1e-5)]
    gains += [(layer.weight, 1.0) for layer in (network.map_augment, network.map_layer0, network.map_layer1)]
    norms = [module for module in network.modules() if isinstance(module, GroupNorm)]
    assert len(gains) + len(norms) == sum(name.endswith("weight") for name, _ in network.named_parameters())
    for weight, gain in gains:
        bound = gain * math.sqrt(6 / (sum(weight.shape[:2]) * weight[0, 0].numel()))
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.06)
    assert all((norm.weight == 1).all() for norm in norms)
    assert all((p == 0).all() for name, p in network.named_parameters() if name.endswith("bias"))
    down = network.enc["4x4_down"].conv0.resample_filter
    line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    assert torch.equal(down, torch.outer(line, line)[None, None])


def test_ops_are_an_argument():
    """A network calls the namespace it was given, and nothing else."""

    ops = tiny.Recording()
    x, dx, t, s, augment_labels = inputs(2, dtype=torch.float32)
    UNet(**SHAPE, ops=ops).forward_difference(x, dx, t, s - t, s, None, augment_labels)
    used = {"attention", "conv", "group_norm", "linear", "silu", "time_features"}
    assert set(ops.calls) == used | {f"{name}_difference" for name in used} | {"downsample", "upsample", "uniform"}


# --------------------------------------------------------------------------------------------------
# Building by name, and bad input


def test_overrides_replace_a_part_of_the_official_shape():
    change = {
        "model_channels": 32,
        "channel_mult": [1, 2],
        "num_blocks": 2,
        "attn_resolutions": [4],
        "dropout": 0.1,
        "augment_dim": 0,
    }
    network = build_network("UNet", input_size=8, in_channels=1, num_classes=0, **change)
    expected = UNet(img_resolution=8, in_channels=1, out_channels=1, **{**UNET_CIFAR10, **change})
    assert {n: p.shape for n, p in network.state_dict().items()} == {
        n: p.shape for n, p in expected.state_dict().items()
    }
    assert network.map_augment is None
    assert {m.dropout for m in network.modules() if hasattr(m, "dropout")} == {0.1}
    assert UNET_CIFAR10.keys() | {"img_resolution", "in_channels", "out_channels", "ops", "self"} == set(
        inspect.signature(UNet.__init__).parameters
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 0}, "in_channels: got 0, expected at least 1"),
        ({"out_channels": 0}, "out_channels: got 0, expected at least 1"),
        ({"model_channels": 0}, "model_channels: got 0, expected at least 1"),
        ({"model_channels": 72}, "model_channels: got 72, expected one that makes the 144 channels .* 32 groups"),
        ({"channel_mult_emb": 0}, "channel_mult_emb: got 0, expected at least 1"),
        ({"num_blocks": 0}, "num_blocks: got 0, expected at least 1"),
        ({"channel_mult_noise": 0}, "channel_mult_noise: got 0, expected at least 1"),
        ({"model_channels": 3, "channel_mult_noise": 3}, "channel_mult_noise: got 3, expected .* even number"),
        ({"augment_dim": -1}, "augment_dim: got -1, expected at least 0"),
        ({"channel_mult": []}, r"channel_mult: got \[\], expected at least one factor"),
        ({"channel_mult": [1, 0]}, r"channel_mult: got \[1, 0\], expected at least one factor"),
        ({"img_resolution": 9}, r"channel_mult: got \[1, 2\], expected fewer factors, because 9 pixels are no"),
        ({"img_resolution": 0}, "img_resolution: got 0, expected at least 1"),
        ({"attn_resolutions": [16]}, r"attn_resolutions: got \[16\], expected some of \[8, 4\]"),
        ({"dropout": 1.0}, "dropout: got 1.0, expected from 0 to below 1"),
        ({"dropout": -0.1}, "dropout: got -0.1, expected from 0 to below 1"),
        ({"embedding_type": "fourier"}, "embedding_type: got 'fourier', expected 'positional'"),
        ({"resample_filter": [1, 2, 1]}, r"resample_filter: got \[1, 2, 1\], expected an even number of taps"),
        ({"resample_filter": []}, r"resample_filter: got \[\], expected an even number of taps"),
        ({"resample_filter": [1, -1]}, r"resample_filter: got \[1, -1\], expected .* a sum above 0"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{**SHAPE, **change})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "UNet", "patch_size": 2}, "patch_size: got 2, expected nothing, because name UNet"),
        ({"name": "UNet", "mlp_ratio": 4.0}, "mlp_ratio: got 4.0, expected nothing, because name UNet"),
        ({"name": "UNet", "num_classes": 10}, "num_classes: got 10, expected 0, because name UNet is unconditional"),
        ({"name": "UNet", "input_size": 8}, r"attn_resolutions: got \(16,\), expected some of \[8, 4, 2\]"),
        ({"name": "DiT-B/4", "dropout": 0.1}, "dropout: got 0.1, expected nothing, because only name UNet"),
        ({"name": "unet"}, "name: got 'unet', expected one of .*UNet"),
    ],
)
def test_fields_of_the_other_network_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_network(**arguments)


@pytest.mark.parametrize(
    ("change", "conditions", "message"),
    [
        ({}, {"labels": torch.zeros(2, dtype=torch.int64)}, r"labels: got a tensor of \(2,\), expected None"),
        ({}, {"augment_labels": torch.zeros(2, 5)}, r"augment_labels: got a tensor of \(2, 5\), expected \(B, 6\)"),
        ({"augment_dim": 0}, {"augment_labels": torch.zeros(2, 6)}, "augment_labels: .* expected None, because"),
        ({"in_channels": 1}, {}, r"x: got a tensor of \(2, 3, 8, 8\), expected \(B, 1, 8, 8\)"),
        ({"img_resolution": 16, "attn_resolutions": []}, {}, r"x: got .*, expected \(B, 3, 16, 16\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, conditions, message):
    network = perturbed(**change)
    x, dx, t, s, _ = inputs(2)
    with pytest.raises(ValueError, match=message):
        network(x, t, s, **conditions)
    with pytest.raises(ValueError, match=message):
        network.forward_difference(x, dx, t, s - t, s, **conditions)


@pytest.mark.parametrize("shape", [{}, {"channel_mult": [1, 2, 2], "attn_resolutions": [2, 8], "num_blocks": 2}])
def test_operations_are_those_that_torch_counts(shape):
    with torch.device("meta"):
        network = UNet(**{**SHAPE, **shape})
        x, t = torch.empty(2, 3, 8, 8), torch.empty(2)
        with FlopCounterMode(display=False) as counter:
            network(x, t, t)
    assert counter.get_total_flops() == 2 * network.forward_flops()


def test_the_official_dropout():
    with torch.device("meta"):
        assert build_network("UNet").dropout == 0.3
