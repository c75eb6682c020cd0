"""The official SoFlow `.pt` format, and the shape of the network that its weights belong to."""

import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from soflow.checkpoint.files import CheckpointError, check_records, load_pickle, replacing, save_pickle, separate
from soflow.models import DIT_PRESETS

OFFICIAL_PREFIX = "network."


@dataclass(frozen=True, kw_only=True)
class OfficialCheckpoint:
    """An official `.pt` file; parameter names without the 'network.' prefix, all tensors on the CPU."""

    step: int
    epochs: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]


class DiTShape(TypedDict):
    """The arguments of `build_network("DiT", ...)`."""

    input_size: int
    in_channels: int
    num_classes: int
    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_ratio: float


class UNetShape(TypedDict):
    """The arguments of `build_network("UNet", ...)` that the weights show."""

    input_size: int
    in_channels: int
    num_classes: int
    model_channels: int
    channel_mult: tuple[int, ...]
    num_blocks: int
    attn_resolutions: tuple[int, ...]


def load_official(path: Path) -> OfficialCheckpoint:
    """Return the content of an official `.pt` file, whose records are checked against their CRC-32 first.

    Raises CheckpointError for a file that is damaged, that pickles anything but tensors and plain values (nothing of it
    is executed), or that lacks a key of the official format.
    """
    check_records(path)
    content = load_pickle(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: got {type(content).__name__}, expected the dict of an official checkpoint")
    optimizer = _official_entry(path, content, "optimizer", dict)
    for key, kind in (("state", dict), ("param_groups", list)):
        if not isinstance(optimizer.get(key), kind):
            raise CheckpointError(
                f"{path}: optimizer has no {kind.__name__} {key!r}, expected a state_dict of torch.optim"
            )
    return OfficialCheckpoint(
        step=_official_entry(path, content, "finished_steps", int),
        epochs=_official_entry(path, content, "finished_epochs", int),
        model=_official_weights(path, content, "model"),
        ema=_official_weights(path, content, "ema_model"),
        optimizer=optimizer,
    )


def save_official(
    path: Path,
    *,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    step: int,
    epochs: int,
) -> None:
    """Write the official `.pt` format; what `load_official` read comes back key for key and tensor for tensor.

    Parameter names are given without the 'network.' prefix. Raises CheckpointError where the disk refuses; a file that
    was there before is then untouched.
    """
    content = {
        "model": OrderedDict((OFFICIAL_PREFIX + name, tensor) for name, tensor in separate(model).items()),
        "ema_model": OrderedDict((OFFICIAL_PREFIX + name, tensor) for name, tensor in separate(ema).items()),
        "optimizer": dict(optimizer),
        "finished_steps": step,
        "finished_epochs": epochs,
    }
    try:
        with replacing(path) as partial:
            save_pickle(content, partial)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot save the checkpoint: {error}") from error


def infer_dit_shape(weights: Mapping[str, Tensor], num_heads: int | None = None) -> DiTShape:
    """Return the shape of the DiT that holds `weights`, a state dict without the 'network.' prefix.

    The number of heads does not show in the weights: it is that of the official size with the same hidden_size, depth
    and patch_size, or else must be given. Raises CheckpointError naming the missing parameter.
    """
    hidden_size, in_channels, patch_size, _ = _shape(weights, "x_embedder.proj.weight", 4, "DiT")
    _, num_tokens, _ = _shape(weights, "pos_embed", 3, "DiT")
    rows, _ = _shape(weights, "y_embedder.embedding_table.weight", 2, "DiT")
    mlp_size, _ = _shape(weights, "blocks.0.mlp.fc1.weight", 2, "DiT")
    grid_size = math.isqrt(num_tokens)
    if grid_size**2 != num_tokens:
        raise CheckpointError(f"pos_embed: got {num_tokens} tokens, expected a square number")
    mlp_ratio = mlp_size / hidden_size
    if int(hidden_size * mlp_ratio) < mlp_size:  # the quotient was rounded down
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    if num_heads is None:
        body = {"patch_size": patch_size, "hidden_size": hidden_size, "depth": depth}
        heads = {preset["num_heads"] for preset in DIT_PRESETS.values() if preset.items() >= body.items()}
        if len(heads) != 1:
            raise CheckpointError(
                f"num_heads: got nothing, expected a number, because no official size has patch_size {patch_size}, "
                f"hidden_size {hidden_size} and depth {depth}"
            )
        num_heads = heads.pop()
    return DiTShape(
        input_size=grid_size * patch_size,
        in_channels=in_channels,
        num_classes=rows - 1,
        patch_size=patch_size,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
    )


def is_unet(weights: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict without the 'network.' prefix has the names of a U-Net."""
    return any(name.startswith("enc.") for name in weights)


def infer_unet_shape(weights: Mapping[str, Tensor]) -> UNetShape:
    """Return the shape of the U-Net that holds `weights`, a state dict without the 'network.' prefix.

    Its names tell resolutions, blocks and attention. Raises CheckpointError naming the missing parameter.
    """
    found = {int(match[1]) for name in weights if (match := re.match(r"enc\.(\d+)x\1_", name))}
    if not found:
        raise CheckpointError("enc: got no resolution, expected names such as enc.32x32_conv.weight")
    sizes = sorted(found, reverse=True)
    model_channels, in_channels, _, _ = _shape(weights, f"enc.{sizes[0]}x{sizes[0]}_conv.weight", 4, "U-Net")
    widths = [_shape(weights, f"enc.{size}x{size}_block0.conv0.weight", 4, "U-Net")[0] for size in sizes]
    return UNetShape(
        input_size=sizes[0],
        in_channels=in_channels,
        num_classes=0,
        model_channels=model_channels,
        channel_mult=tuple(width // model_channels for width in widths),
        num_blocks=sum(
            f"enc.{sizes[0]}x{sizes[0]}_block{index}.conv0.weight" in weights for index in range(len(weights))
        ),
        attn_resolutions=tuple(size for size in sizes if f"enc.{size}x{size}_block0.qkv.weight" in weights),
    )


def _shape(weights: Mapping[str, Tensor], name: str, dimensions: int, network: str) -> torch.Size:
    if name not in weights or weights[name].ndim != dimensions or 0 in weights[name].shape:
        found = list(weights[name].shape) if name in weights else "nothing"
        raise CheckpointError(
            f"{name}: got {found}, expected the parameter of a {network}, with {dimensions} dimensions, none of them 0"
        )
    return weights[name].shape


def _official_entry(path: Path, content: dict[str, Any], key: str, kind: type) -> Any:
    if key not in content:
        raise CheckpointError(
            f"{path}: no key {key!r}, expected the official format; found {sorted(map(str, content))}"
        )
    if not isinstance(content[key], kind):
        raise CheckpointError(f"{path}: {key} is a {type(content[key]).__name__}, expected {kind.__name__}")
    return content[key]


def _official_weights(path: Path, content: dict[str, Any], key: str) -> dict[str, Tensor]:
    weights = {}
    for name, tensor in _official_entry(path, content, key, dict).items():
        if not isinstance(name, str) or not name.startswith(OFFICIAL_PREFIX) or not _is_dense(tensor):
            raise CheckpointError(
                f"{path}: {key}[{name!r}], expected dense floating-point tensors under names that start with "
                f"{OFFICIAL_PREFIX!r}"
            )
        weights[name.removeprefix(OFFICIAL_PREFIX)] = tensor
    return weights


def _is_dense(value: object) -> bool:
    return (
        isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided and not value.is_meta
    )
