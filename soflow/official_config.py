"""The flat YAML keys of the official implementation, translated into the sections of `Config`.

Source: the two YAML files of zlab-princeton/SoFlow. Nothing is guessed: a file has to state every key it needs, as the
official ones do.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from soflow.config import require

# in the folder that the official files name as their data set
LATENTS_FILE = "imagenet_latent.hdf5"

_KEYS = {
    "seed": "seed",
    "dataset_path": "data.root",
    "data_size": "network.input_size",
    "velocity_loss_ratio": "objective.fm_ratio",
    "p": "objective.loss_p",
    "eps": "objective.loss_eps",
    "cfg_scale": "objective.cfg_scale",
    "mix_ratio": "objective.mix_ratio",
    "cfg_drop_rate": "objective.label_dropout",
    "cfg_decay_time": "objective.cfg_decay_time",
    "l_init_ratio": "times.gap_init",
    "l_end_ratio": "times.gap_end",
    "learning_rate": "optim.lr",
    "betas": "optim.betas",
    "weight_decay": "optim.weight_decay",
    "ema_decay_rate": "ema.decay",
    "total_steps": "train.total_steps",
    "batch_size": "train.batch_size",
    "logging_steps": "train.log_every",
    "ckpt_saving_steps": "train.checkpoint_every",
    "eval_demo_steps": "train.sample_every",
    "eval_NFE": "train.sample_nfe",
}
_CHOICES = {
    "noising_type": ("flow.path", {"Linear": "linear", "Trig": "trig"}),
    "coefficient_type": ("flow.parameterization", {"Euler": "euler", "Trig": "trig"}),
    "l_schedule": (
        "times.gap_method",
        {"Const": "const", "Linear": "linear", "Cosine": "cosine", "Exponent": "exponential"},
    ),
}
_TIME_KEYS = {"time_mean": "mean", "time_std": "std"}
_TIME_ORDER = ("velocity", "s", "t")
_NETWORKS = {
    "UNet": "UNet",
    "DiT-B-4": "DiT-B/4",
    "DiT-B-2": "DiT-B/2",
    "DiT-M-2": "DiT-M/2",
    "DiT-L-2": "DiT-L/2",
    "DiT-XL-2": "DiT-XL/2",
}
_REFUSED = {
    "Triangular": "Triangular, named in the official comments, crashes there or silently runs as Trig",
}
_SPECIAL = ("working_dir", "model_type", "dataset_type")
_IGNORED = ("num_workers", "prefetch_factor", "eval_steps", "eval_batch_size", "eval_demo_shape")
_NEEDED = (*_SPECIAL, *_KEYS, *_CHOICES, *_TIME_KEYS)
# What the official code fixes and its YAML files do not say.
_FIXED: dict[str, dict[str, Any]] = {
    "Imagenet": {
        "network.in_channels": 4,
        "network.num_classes": 1000,
        "optim.name": "adamw",
        "engine.precision": "tf32",
    },
    "CIFAR10": {
        "data.source": "cifar10",
        "data.augment_p": 0.12,
        "network.in_channels": 3,
        "network.num_classes": 0,
        "optim.name": "radam",
        "ema.every": 16,
        "ema.dtype": "float64",
        "engine.precision": "tf32",
    },
}


def is_official(raw: Mapping[Any, Any]) -> bool:
    """Whether `raw` is a flat file in the official keys: none of our sections, and a key only the official code has."""
    sections = {name.partition(".")[0] for name in (*_KEYS.values(), *_FIXED["Imagenet"]) if "." in name}
    return not sections & raw.keys() and bool(({*_NEEDED, *_IGNORED} - {"seed"}) & raw.keys())


def translate(raw: Mapping[Any, Any]) -> tuple[dict[Any, Any], list[str]]:
    """Return the mapping `Config` is read from, and the known keys that have no counterpart in it.

    Of latents it leaves out data.source, which `choose_source` adds.
    Raises ValueError 'key: got value, expected ...' for an unknown or missing key, and for a value that the official
    code accepts and this engine does not have.
    """
    for key in raw:
        if key not in (*_NEEDED, *_IGNORED):
            near = difflib.get_close_matches(str(key), (*_NEEDED, *_IGNORED), n=1, cutoff=0)[0]
            raise ValueError(f"{key}: unknown key of an official configuration; the nearest known one is {near!r}")
    for key in _NEEDED:
        if key not in raw:
            raise ValueError(f"{key}: missing, expected as in every official configuration")
    config: dict[Any, Any] = {}
    dataset = _choose("dataset_type", raw["dataset_type"], {name: name for name in _FIXED})
    for name, value in _FIXED[dataset].items():
        _put(config, name, value)
    for key, name in _KEYS.items():
        _put(config, name, raw[key])
    for key, (name, choices) in _CHOICES.items():
        _put(config, name, _choose(key, raw[key], choices))
    for key, moment in _TIME_KEYS.items():
        values = raw[key]
        valid = isinstance(values, list) and len(values) == len(_TIME_ORDER)
        require(key, values, valid, f"a list of 3 numbers in the order {', '.join(_TIME_ORDER)}")
        for row, value in zip(_TIME_ORDER, values, strict=True):
            _put(config, f"times.{row}_{moment}", value)
    _put(config, "network.name", _choose("model_type", raw["model_type"], _NETWORKS))
    working_dir = PurePath(str(raw["working_dir"]))
    _put(config, "name", working_dir.name)
    _put(config, "output_dir", str(working_dir.parent))
    ignored = [key for key in _IGNORED if key in raw]
    if "source" not in config["data"]:
        _put(config, "train.sample_every", 0)
        ignored.append("eval_demo_steps (grids of latents need train.sample_vae)")
    return config, ignored


def choose_source(config: dict[Any, Any]) -> str | None:
    """Set data.source, where nobody did, to what lies at data.root; return a remark where that is the slow format."""
    data = config.get("data")
    if not isinstance(data, dict) or "source" in data:
        return None
    root = Path(str(data.get("root")))
    data["source"] = "hdf5" if root.is_file() or (root / LATENTS_FILE).is_file() else "latents"
    if data["source"] == "latents":
        return None
    return (
        f"data.source is hdf5, because {root} is or holds such a file; what soflow convert makes of it is read faster"
    )


def _choose(key: str, value: Any, choices: Mapping[str, str]) -> str:
    remark = f" ({_REFUSED[str(value)]})" if str(value) in _REFUSED else ""
    require(key, value, str(value) in choices, f"one of {', '.join(choices)}{remark}")
    return choices[str(value)]


def _put(config: dict[Any, Any], dotted: str, value: Any) -> None:
    section, _, field = dotted.rpartition(".")
    (config.setdefault(section, {}) if section else config)[field] = value
