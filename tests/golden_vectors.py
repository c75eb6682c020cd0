"""Read the golden vectors: numbers of the official implementation, see tests/golden/README.md."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from soflow import SolutionFlow
from soflow.models import DiT

FOLDER = Path(__file__).parent / "golden"


@cache
def load(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the settings of `name`.npz."""
    with np.load(FOLDER / f"{name}.npz") as archive:
        meta = json.loads(bytes(archive["__meta__"]))
        return {key: torch.from_numpy(archive[key]) for key in archive.files if key != "__meta__"}, meta


def set_parameters(network: nn.Module, param_seed: int, std: float = 0.08) -> None:
    """Fill the parameters as the golden runs did: number k by RandomState(param_seed * 1000 + k)."""
    for k, (name, parameter) in enumerate(sorted(network.named_parameters())):
        if name == "pos_embed":
            continue
        values = np.random.RandomState(param_seed * 1000 + k).randn(*parameter.shape) * std
        if name.endswith("weight") and "norm" in name:
            values = values + 1.0
        parameter.data.copy_(torch.from_numpy(values.astype(np.float32)))


def flow(meta: dict[str, Any], dtype: torch.dtype = torch.float32) -> SolutionFlow:
    """Build the flow that a golden file was made with."""
    shape = meta["network"]
    network = DiT(
        input_size=shape["size"],
        patch_size=shape["patch"],
        in_channels=shape["ch"],
        hidden_size=shape["hid"],
        depth=shape["depth"],
        num_heads=shape["heads"],
        num_classes=shape["ncls"],
    )
    assert sorted(name for name, _ in network.named_parameters()) == meta["param_names"]
    set_parameters(network, meta["param_seed"])
    settings = meta.get("hyper", meta)
    return SolutionFlow(network, settings["noising_type"].lower(), settings["coefficient_type"].lower()).to(dtype)


def summary(tensor: Tensor) -> Tensor:
    """Return the L2 norm and the dot product with cos(0), cos(1), ..., as two float64 numbers."""
    flat = tensor.detach().double().flatten()
    return torch.stack((flat.norm(), flat @ torch.arange(len(flat), dtype=torch.float64).cos()))


def official_models() -> dict[str, Any]:
    """Return parameter counts, state-dict names and shapes of the official sizes (one block of each DiT)."""
    return json.loads((FOLDER / "official_models.json").read_text(encoding="utf-8"))
