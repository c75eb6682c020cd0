import math

import golden_vectors
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from soflow.augment import AugmentDraw, augment, sample_augmentation


def golden_draw() -> AugmentDraw:
    """The draws of the golden run: a change applies where its uniform number is below its multiplier times p."""
    z, meta = golden_vectors.load("augment")
    p, settings = meta["p"], meta["settings"]
    none = torch.zeros(())
    angle = (2 * z["aniso_angle_u"] - 1) * math.pi
    return AugmentDraw(
        flip=torch.where(z["xflip_u"] < settings["xflip"] * p, z["xflip_bit"], 0).flatten().float(),
        scale=torch.where(z["scale_u"] < settings["scale"] * p, z["scale_n"], none),
        aniso=torch.where(z["aniso_u"] < settings["aniso"] * p, z["aniso_n"], none),
        angle=torch.where(z["aniso_rotate_u"] < settings["aniso_rotate_prob"], angle, none),
        translate=torch.where(z["translate_u"] < settings["translate_frac"] * p, z["translate_n"], none).T,
    )


def test_augmentation_equals_the_golden_vectors():
    z, _ = golden_vectors.load("augment")
    images, labels = augment(z["images"], golden_draw())
    assert torch.equal(labels, z["labels"])
    near = (images - z["out"]).abs() <= 1e-4
    assert near.double().mean() >= 0.999


def still(num: int) -> AugmentDraw:
    return AugmentDraw(*(torch.zeros(num) for _ in range(4)), torch.zeros(num, 2))


def test_no_change_returns_the_image():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 8)
    changed, labels = augment(images, still(2))
    torch.testing.assert_close(changed, images, rtol=0, atol=1e-5)
    assert not labels.any()


def test_whole_pixels_shift_exactly():
    """A shift by a quarter of the side: two draws of one eighth."""
    torch.manual_seed(0)
    images = torch.randn(1, 1, 16, 16)
    draw = still(1)
    draw.translate[0, 0] = 2.0
    changed, labels = augment(images, draw)
    torch.testing.assert_close(changed[..., 4:], images[..., :-4], rtol=0, atol=1e-5)
    assert labels.tolist() == [[0, 0, 0, 0, 2, 0]]


def test_flip_is_exact():
    images = torch.arange(32.0).view(1, 2, 4, 4) / 32
    draw = still(1)
    draw.flip[0] = 1.0
    torch.testing.assert_close(augment(images, draw)[0], images.flip(3), rtol=0, atol=1e-6)


def test_scale_enlarges_about_the_centre():
    """A wide bump of scale 2^(5 * 0.2) = 2 becomes twice as wide."""
    line = torch.arange(32) - 15.5
    bump = torch.exp(-(line[:, None] ** 2 + line[None] ** 2) / 50)
    draw = still(1)
    draw.scale[0] = 5.0
    changed, _ = augment(bump[None, None], draw)
    wider = torch.exp(-(line[:, None] ** 2 + line[None] ** 2) / 200)
    assert (changed[0, 0] - wider).abs().max() < 0.02


class FromHost(TorchDispatchMode):
    """Counts the ops that read the host's memory, but for numbers."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += any(isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.dim() > 0 for x in args)
        return func(*args, **(kwargs or {}))


def test_nothing_is_copied_to_a_device_but_once():
    """A GPU's step would be waited for."""
    images = torch.zeros(2, 1, 9, 9, device="meta")
    draw = AugmentDraw(*(value.to("meta") for value in vars(still(2)).values()))
    counts = []
    for _ in range(2):
        with FromHost() as from_host:
            augment(images, draw)
        counts.append(from_host.count)
    assert counts[0] > 0
    assert counts[1] == 0


def test_draws_depend_on_seed_step_and_position_alone():
    positions = torch.arange(50)
    whole = sample_augmentation(3, 7, positions, 0.5).labels()
    parts = [sample_augmentation(3, 7, part, 0.5).labels() for part in positions.split((13, 37))]
    assert torch.equal(whole, torch.cat(parts))
    # each of them, where no change is left out
    first = vars(sample_augmentation(3, 7, positions, 1.0))
    for seed, step in ((4, 7), (3, 8)):
        other = vars(sample_augmentation(seed, step, positions, 1.0))
        assert not [name for name in first if torch.equal(first[name], other[name])]


def test_changes_are_drawn_apart():
    draw = sample_augmentation(0, 0, torch.arange(20_000), 0.5)
    values = torch.stack((draw.flip, draw.scale, draw.aniso, draw.angle, *draw.translate.T))
    assert (torch.corrcoef(values) - torch.eye(6)).abs().max() < 0.04
    # and so are the decisions for them, of which both shifts have one
    assert (torch.corrcoef((values[:5] != 0).float()) - torch.eye(5)).abs().max() < 0.04


@pytest.mark.parametrize("p", [0.0, 0.12, 1.0])
def test_each_change_has_its_probability(p):
    num = 20_000
    draw = sample_augmentation(0, 0, torch.arange(num), p)
    for change in (draw.scale, draw.aniso, draw.translate[:, 0], draw.translate[:, 1]):
        assert (change != 0).double().mean().item() == pytest.approx(p, abs=5 * math.sqrt(max(p * (1 - p), 1e-9) / num))
    assert draw.flip.mean().item() == pytest.approx(0.5, abs=0.02)
    assert (draw.angle != 0).double().mean().item() == pytest.approx(0.5, abs=0.02)
    if p == 1.0:
        assert draw.scale.std().item() == pytest.approx(1.0, abs=0.03)
        rotated = draw.angle[draw.angle != 0]
        assert rotated.std().item() == pytest.approx(math.pi / math.sqrt(3), abs=0.05)
