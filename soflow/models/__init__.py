"""Networks F(x, t, s, labels) and how to build them by name."""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from soflow.models.dit import DiT
from soflow.models.network import Network, NetworkBuilder
from soflow.models.pair import Pair, PairOps
from soflow.models.unet import UNet

__all__ = [
    "DIT_PRESETS",
    "UNET_CIFAR10",
    "DiT",
    "Network",
    "NetworkBuilder",
    "Pair",
    "PairOps",
    "UNet",
    "build_network",
    "build_own_network",
]

# patch_size, hidden_size, depth, num_heads of the official sizes
DIT_PRESETS = {
    "DiT-B/4": {"patch_size": 4, "hidden_size": 768, "depth": 12, "num_heads": 12},
    "DiT-B/2": {"patch_size": 2, "hidden_size": 768, "depth": 12, "num_heads": 12},
    "DiT-M/2": {"patch_size": 2, "hidden_size": 1024, "depth": 16, "num_heads": 16},
    "DiT-L/2": {"patch_size": 2, "hidden_size": 1024, "depth": 24, "num_heads": 16},
    "DiT-XL/2": {"patch_size": 2, "hidden_size": 1152, "depth": 28, "num_heads": 16},
}

# the official shape for CIFAR-10
UNET_CIFAR10: dict[str, Any] = {
    "augment_dim": 6,
    "model_channels": 128,
    "channel_mult": (2, 2, 2),
    "channel_mult_emb": 4,
    "num_blocks": 4,
    "attn_resolutions": (16,),
    "dropout": 0.3,
    "embedding_type": "positional",
    "channel_mult_noise": 2,
    "resample_filter": (1, 3, 3, 1),
}


def build_network(
    name: str,
    *,
    input_size: int = 32,
    in_channels: int | None = None,
    num_classes: int | None = None,
    patch_size: int | None = None,
    hidden_size: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    mlp_ratio: float | None = None,
    model_channels: int | None = None,
    channel_mult: Sequence[int] | None = None,
    num_blocks: int | None = None,
    attn_resolutions: Sequence[int] | None = None,
    dropout: float | None = None,
    augment_dim: int | None = None,
    ops: ModuleType | None = None,
) -> Network:
    """Build the network called `name`: a preset ("DiT-B/4", or the official spelling "DiT-B-4"), "DiT" or "UNet".

    A preset fixes patch_size, hidden_size, depth, num_heads and mlp_ratio; "DiT" needs them (mlp_ratio defaults to 4).
    "UNet" has the official CIFAR-10 shape, except for those of model_channels and the fields after it that are given.
    in_channels and num_classes default to 4 and 1000; for "UNet", which is unconditional, to 3 and 0.
    Raises ValueError for an unknown name, a missing shape field or one that the name does not take.
    """
    dit_shape = {
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": mlp_ratio,
    }
    unet_shape = {
        "model_channels": model_channels,
        "channel_mult": channel_mult,
        "num_blocks": num_blocks,
        "attn_resolutions": attn_resolutions,
        "dropout": dropout,
        "augment_dim": augment_dim,
    }
    if name == "UNet":
        _refuse_given(dit_shape, "name UNet has no such field")
        return _build_unet(input_size, in_channels, num_classes, unet_shape, ops)
    _refuse_given(unet_shape, f"only name UNet has such a field, not {name}")
    preset = _official_spelling(name)
    if name == "DiT":
        shape = _given(dit_shape)
        missing = [key for key in DIT_PRESETS["DiT-B/4"] if key not in shape]
        if missing:
            raise ValueError(f"{missing[0]}: got nothing, expected a number, because name is 'DiT'")
    elif preset in DIT_PRESETS:
        _refuse_given(dit_shape, f"name {preset} fixes the shape")
        shape = DIT_PRESETS[preset]
    else:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(DIT_PRESETS)}, UNet, or DiT with a shape")
    return DiT(
        input_size=input_size,
        in_channels=4 if in_channels is None else in_channels,
        num_classes=1000 if num_classes is None else num_classes,
        ops=ops,
        **shape,
    )


def build_own_network(
    builder: NetworkBuilder, *, input_size: int, in_channels: int, num_classes: int, ops: ModuleType
) -> Network:
    """Build a network by a builder of one's own; ValueError unless it is what the engine asks of a network."""
    if isinstance(builder, Network):
        raise ValueError(
            f"network: got a {type(builder).__name__}, expected what builds one, such as its class: every process and "
            "the prediction of memory build it anew, from the seed of the run"
        )
    shape = {"input_size": input_size, "in_channels": in_channels, "num_classes": num_classes}
    network = builder(**shape, ops=ops)
    if not isinstance(network, Network):
        raise ValueError(
            f"network: got a builder of a {type(network).__name__}, expected one of a soflow.models.Network"
        )
    for name, expected in shape.items():
        got = getattr(network, name, None)
        if got != expected:
            raise ValueError(
                f"network.{name}: got {got!r} from the builder, expected {expected}, with which it was called"
            )
    if not isinstance(getattr(network, "ops", None), PairOps):
        raise ValueError("network.ops: expected PairOps(ops) of the ops that the builder was called with")
    for name, parameter in network.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(f"{name}: got {parameter.dtype}, expected torch.float32: a run keeps its weights so")
    return network


def _build_unet(
    input_size: int,
    in_channels: int | None,
    num_classes: int | None,
    shape: Mapping[str, Any],
    ops: ModuleType | None,
) -> UNet:
    if num_classes:
        raise ValueError(f"num_classes: got {num_classes}, expected 0, because name UNet is unconditional")
    channels = 3 if in_channels is None else in_channels
    shape = UNET_CIFAR10 | _given(shape)
    return UNet(img_resolution=input_size, in_channels=channels, out_channels=channels, ops=ops, **shape)


def _given(shape: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in shape.items() if value is not None}


def _refuse_given(shape: Mapping[str, Any], reason: str) -> None:
    for key, value in _given(shape).items():
        raise ValueError(f"{key}: got {value!r}, expected nothing, because {reason}")


def _official_spelling(name: str) -> str:
    head, _, patch = name.rpartition("-")
    return f"{head}/{patch}" if patch.isdigit() else name
