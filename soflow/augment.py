"""The augmentation of EDM: random flips, scales, stretches and shifts, told to the network as labels.

An image is reflected beyond its border, brought to twice its resolution by the low-pass of the orthogonal wavelet
sym6, sampled there at the moved places, and brought back. All shapes are static and nothing waits for the device: the
reflected margin is always the largest there is. Source: Karras et al. 2022, arXiv:2206.00364, appendix F.2; Karras et
al. 2020, arXiv:2006.06676, appendix B.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as functional
from torch import Tensor

from soflow.kernels import reference
from soflow.streams import AUGMENT_NORMAL_STREAM, AUGMENT_UNIFORM_STREAM

SCALE_STD = ANISO_STD = 0.2  # of the binary logarithm
ANISO_ROTATE_PROBABILITY = 0.5
TRANSLATE_STD = 0.125  # of the side of the image

# Source: Daubechies, Ten Lectures on Wavelets, 1992, table 8.1 (least asymmetric, N = 6).
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
# Pixels around the result that its filter reaches, which are sampled too.
APRON = len(SYM6) // 4


@dataclass(frozen=True)
class AugmentDraw:
    """What is done to each image; zeros leave it as it is.

    flip: (B,) 0 or 1.  scale, aniso: (B,) standard normal.  angle: (B,), of the anisotropic axis.
    translate: (B, 2) standard normal, x and y.
    """

    flip: Tensor
    scale: Tensor
    aniso: Tensor
    angle: Tensor
    translate: Tensor

    def labels(self) -> Tensor:
        """Return what the network is told, (B, 6) fp32."""
        columns = (self.flip, self.scale, self.aniso * self.angle.cos(), self.aniso * self.angle.sin())
        return torch.cat((torch.stack(columns, dim=1), self.translate), dim=1)


def sample_augmentation(seed: int, step: int, positions: Tensor, p: float) -> AugmentDraw:
    """Draw for (seed, step, position): a flip of either kind for everyone, each other change with probability p.

    positions: (B,) int64, position of each image in the global batch.
    """
    seeds, steps = torch.full_like(positions, seed), torch.full_like(positions, step)
    u = reference.uniform(seeds, steps, AUGMENT_UNIFORM_STREAM, positions, 6).unbind(1)
    n = reference.normal(seeds, steps, AUGMENT_NORMAL_STREAM, positions, 4)
    return AugmentDraw(
        flip=(u[0] < 0.5).float(),
        scale=n[:, 0] * (u[1] < p),
        aniso=n[:, 1] * (u[2] < p),
        angle=(2.0 * u[3] - 1.0) * math.pi * (u[4] < ANISO_ROTATE_PROBABILITY),
        translate=n[:, 2:] * (u[5] < p)[:, None],
    )


def augment(images: Tensor, draw: AugmentDraw) -> tuple[Tensor, Tensor]:
    """Return the changed images, (B, C, S, S) fp32, and their labels, (B, 6).  images: (B, C, S, S), S at least 2."""
    size = images.shape[-1]
    up, down = _resampling(size, images.device)
    images = torch.where(draw.flip[:, None, None, None] > 0, images.flip(3), images)
    wide = up @ images @ up.mT
    # Places of the samples in pixels from the centre; one index of the wide image is half a pixel.
    side = 2 * (size + 2 * APRON)
    line = (torch.arange(side, device=images.device) - (side / 2 - 1)) / 2
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).view(1, -1, 2)
    moved = (grid - draw.translate[:, None] * (size * TRANSLATE_STD)) @ _inverse_matrices(draw).mT
    index = 2.0 * moved + (up.shape[0] / 2 - 1)
    places = ((2.0 * index + 1.0) / up.shape[0] - 1.0).view(-1, side, side, 2)
    sampled = functional.grid_sample(wide, places, mode="bilinear", padding_mode="zeros", align_corners=False)
    return down @ sampled @ down.mT, draw.labels()


def _inverse_matrices(draw: AugmentDraw) -> Tensor:
    """From a place in the result to the place it comes from, but for the shift: (B, 2, 2)."""
    stretch = torch.exp2(draw.aniso * ANISO_STD)
    cos, sin = draw.angle.cos(), draw.angle.sin()
    along, across = 1.0 / stretch, stretch
    rows = (
        torch.stack((along * cos**2 + across * sin**2, (across - along) * cos * sin), dim=1),
        torch.stack(((across - along) * cos * sin, along * sin**2 + across * cos**2), dim=1),
    )
    return torch.stack(rows, dim=1) * torch.exp2(-draw.scale * SCALE_STD)[:, None, None]


@lru_cache(maxsize=4)
def _resampling(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The matrices that bring a line of pixels, reflected, to twice the resolution, and a sampled line back.

    Kept on the device: a copy per batch would make the host wait for the step before.
    """
    margin, taps = size - 1, len(SYM6)
    num_wide, num_sampled = 2 * (size + 2 * margin), 2 * (size + 2 * APRON)
    up = torch.zeros(num_wide, size, dtype=torch.float64)
    for source in range(-margin, size + margin):
        pixel = (size - 1) - abs((size - 1) - abs(source))  # reflected at both borders
        for tap in range(taps):
            place = 2 * (source + margin) - taps // 2 + 1 + tap
            if 0 <= place < num_wide:
                up[place, pixel] += SYM6[tap]
    down = torch.zeros(size, num_sampled, dtype=torch.float64)
    for pixel in range(size):
        for tap in range(taps):
            down[pixel, 2 * (pixel + APRON) - taps // 2 + 1 + tap] = SYM6[tap]
    return up.float().to(device), down.float().to(device)
