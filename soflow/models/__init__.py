"""Networks F(x, t, s, labels) and how to build them by name."""

from types import ModuleType

from torch import nn

from soflow.models.dit import DiT

__all__ = ["DIT_PRESETS", "DiT", "build_network"]

# patch_size, hidden_size, depth, num_heads of the official sizes
DIT_PRESETS = {
    "DiT-B/4": {"patch_size": 4, "hidden_size": 768, "depth": 12, "num_heads": 12},
    "DiT-B/2": {"patch_size": 2, "hidden_size": 768, "depth": 12, "num_heads": 12},
    "DiT-M/2": {"patch_size": 2, "hidden_size": 1024, "depth": 16, "num_heads": 16},
    "DiT-L/2": {"patch_size": 2, "hidden_size": 1024, "depth": 24, "num_heads": 16},
    "DiT-XL/2": {"patch_size": 2, "hidden_size": 1152, "depth": 28, "num_heads": 16},
}


def build_network(
    name: str,
    *,
    input_size: int = 32,
    in_channels: int = 4,
    num_classes: int = 1000,
    patch_size: int | None = None,
    hidden_size: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    mlp_ratio: float | None = None,
    ops: ModuleType | None = None,
) -> nn.Module:
    """Build the network called `name`: a preset ("DiT-B/4", or the official spelling "DiT-B-4"), or "DiT".

    A preset fixes patch_size, hidden_size, depth, num_heads and mlp_ratio; "DiT" needs them (mlp_ratio defaults to 4).
    Raises ValueError for an unknown name, a missing shape field or one that a preset already fixes.
    """
    given: dict[str, int] = {
        key: value
        for key, value in (
            ("patch_size", patch_size),
            ("hidden_size", hidden_size),
            ("depth", depth),
            ("num_heads", num_heads),
        )
        if value is not None
    }
    if name == "DiT":
        missing = [key for key in DIT_PRESETS["DiT-B/4"] if key not in given]
        if missing:
            raise ValueError(f"{missing[0]}: got nothing, expected a number, because name is 'DiT'")
        shape = given
    else:
        preset = _official_spelling(name)
        if preset not in DIT_PRESETS:
            raise ValueError(f"name: got {name!r}, expected one of {', '.join(DIT_PRESETS)}, or DiT with a shape")
        fixed = [*given, *(["mlp_ratio"] if mlp_ratio is not None else [])]
        if fixed:
            raise ValueError(f"{fixed[0]}: got a value, expected nothing, because name {preset} fixes the shape")
        shape = DIT_PRESETS[preset]
    return DiT(
        input_size=input_size,
        in_channels=in_channels,
        num_classes=num_classes,
        mlp_ratio=4.0 if mlp_ratio is None else mlp_ratio,
        ops=ops,
        **shape,
    )


def _official_spelling(name: str) -> str:
    head, _, patch = name.rpartition("-")
    return f"{head}/{patch}" if patch.isdigit() else name
