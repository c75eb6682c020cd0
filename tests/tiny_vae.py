"""An AutoencoderKL of 15,000 parameters, saved as diffusers saves one."""

from functools import cache
from pathlib import Path

import torch


def save(folder: Path, **changes: object) -> Path:
    """Save one with random weights (always the same) to `folder`/vae; images of twice the side of its latents."""
    (folder / "vae").mkdir(parents=True, exist_ok=True)
    network(**changes).save_pretrained(folder / "vae")
    return folder / "vae"


@cache
def network(latent_channels: int = 4, scaling_factor: float = 0.18215) -> torch.nn.Module:
    """Return one, to read from."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=latent_channels,
            scaling_factor=scaling_factor,
        )
