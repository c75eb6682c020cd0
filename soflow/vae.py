"""The variational autoencoder of Stable Diffusion, which makes latents of images and images of latents."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soflow.data.latents import LATENT_SCALE

# the decoder takes a hundred times the memory of its latents
DECODED_AT_ONCE = 8


class VaeError(ValueError):
    """A VAE that cannot be used; the message names it and says why."""


class Vae:
    """An AutoencoderKL of diffusers: from images to moments of latents, and from samples of latents to images.

    channels: of its latents.  reduction: side of an image over that of its latents.
    """

    def __init__(self, network: Any, name: str, device: torch.device) -> None:
        self.network = network.to(device).eval().requires_grad_(False)
        self.name = name
        config = network.config
        self.channels: int = config.latent_channels
        self.reduction: int = 2 ** (len(config.block_out_channels) - 1)

    def weights_sha256(self) -> str:
        """Return the SHA-256 of names, shapes and values of all weights: a folder's or a hub's name says less."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    @torch.inference_mode()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the posterior, (B, channels, H', W'), as the network gives them.

        images: (B, 3, H, W) fp32, pixels from -1 to 1.
        """
        posterior = self.network.encode(images).latent_dist
        return posterior.mean, posterior.std

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images, (B, 3, H, W) fp32, of samples of latents as a flow draws them, times LATENT_SCALE.

        Few go through the network at once, however large B is.
        """
        parts = (latents / LATENT_SCALE).split(DECODED_AT_ONCE)
        return torch.cat([self.network.decode(part).sample.float() for part in parts])

    def require_channels(self, field: str, channels: int) -> None:
        """Raise VaeError, which names `field`, unless the latents have so many channels."""
        if self.channels != channels:
            raise VaeError(
                f"{field}: got {self.name} with latents of {self.channels} channels, expected {channels}, which the "
                "network draws"
            )


def load_vae(name: str, device: torch.device) -> Vae:
    """Load an AutoencoderKL from a folder, or by its name on the Hugging Face hub.

    Raises VaeError where diffusers is not installed, the folder or name holds none, or its latents have another scale
    than LATENT_SCALE.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise VaeError("the VAE needs the package diffusers: pip install 'soflow[latents]'") from error
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise VaeError(f"{name}: expected a folder with config.json, as diffusers saves an AutoencoderKL")
    try:
        # Never a pickle, which diffusers falls back to.
        network, loaded = AutoencoderKL.from_pretrained(
            name, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise VaeError(f"{name}: expected an AutoencoderKL, in a folder or on the hub, but: {error}") from error
    if missing := sorted(loaded["missing_keys"]):
        # which diffusers draws at random, with a warning
        raise VaeError(
            f"{name}: got no weights {missing[0]} ({len(missing)} missing), expected all of an AutoencoderKL"
        )
    scale = network.config.scaling_factor
    if abs(scale - LATENT_SCALE) > 1e-9:
        raise VaeError(f"{name}: scaling_factor: got {scale}, expected {LATENT_SCALE}, which the recipes are made for")
    return Vae(network, Path(name).resolve().name if Path(name).exists() else name, device)
