"""A configuration that trains in a second, one block on the digits; networks as small; and ops that are recorded."""

from pathlib import Path
from typing import Any

import torch

from soflow.config import Config
from soflow.config_file import parse_config
from soflow.kernels import reference
from soflow.models import DiT, Network, UNet

TEXT = """
name: tiny
seed: 3
network: {name: DiT, input_size: 8, in_channels: 1, num_classes: 10, patch_size: 4, hidden_size: 16, depth: 1,
  num_heads: 2}
data: {source: digits}
train: {total_steps: 8, batch_size: 12, log_every: 3, sample_every: 0, checkpoint_every: 100}
objective: {fm_ratio: 0.5, cfg_scale: 2.0, cfg_decay_time: 0.8, mix_ratio: 0.25, label_dropout: 0.2}
optim: {lr: 1e-3}
ema: {decay: 0.9}
engine: {device: cpu}
"""
# what makes of it the recipe of CIFAR-10, with dropout and augmentation, as small
UNET = (
    "network={name: UNet, input_size: 8, in_channels: 1, num_classes: 0, model_channels: 8, channel_mult: [1, 1], "
    "num_blocks: 1, attn_resolutions: [4], dropout: 0.3}",
    "objective={fm_ratio: 0.0, loss_p: 0.75, loss_eps: 0.001}",
    "times={gap_init: 1.0, gap_end: 0.0003125}",
    "data.augment_p=0.5",
    "optim={name: radam, lr: 1e-3, betas: [0.9, 0.999]}",
    "ema={decay: 0.9, every: 3, dtype: float64}",
)


def config(output_dir: Path, *overrides: str) -> Config:
    """Return the tiny configuration below `output_dir`, with dotted overrides."""
    return parse_config(TEXT, "tiny", [f"output_dir={output_dir}", *overrides])


def network(name: str) -> Network:
    """Return a DiT of 10 classes or a U-Net for images (3, 8, 8), with weights that look trained, in eval mode."""
    torch.manual_seed(0)
    if name == "DiT":
        made: Network = DiT(8, 2, 3, 32, 2, 2, 10)
    else:
        made = UNet(8, 3, 3, 0, 32, (1, 2), 1, 1, (4,), 0.5, "positional", 1, (1, 1))
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if key != "pos_embed":
                parameter.add_(0.5 * torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
    return made.eval()


class Recording:
    """The reference ops, and the names of those that were called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.calls.append(name)
        return getattr(reference, name)
