"""Trained weights as others take them: model.safetensors, config.json and a model card, in one folder."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from soflow.checkpoint import CheckpointError
from soflow.checkpoint.files import load_tensors, separate, sync, sync_folder
from soflow.config import VELOCITY_SAMPLERS, FlowConfig, NetworkConfig, default_vae, require_sampler
from soflow.config_file import ConfigError, parse_section

FORMAT_VERSION = 1
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"

MODEL_CARD = """\
---
library_name: soflow
tags: [{tags}]
---

# {name}

A generator that turns noise into {drawn} in {calls}:
{learned}.

| | |
|---|---|
| network | {name}, {millions:.1f} M parameters, {channels} x {size} x {size} |
| classes | {classes} |
| objective, sampler | {objective}, {sampler} |
| path, parameterization | {path}, {parameterization} |
| weights | {weights} after {step} training steps |

```python
from pathlib import Path

import torch
from soflow import sample, sample_noise
from soflow.run_folder import load_flow
{imports}
flow, step = load_flow(Path("."))
noise, renoise = sample_noise(torch.arange(4), ({channels}, {size}, {size}), nfe={nfe})  # one seed per image
shape = (4, {channels}, {size}, {size})
{result} = sample(flow, {labels}, shape, nfe={nfe}, noise=noise, renoise=renoise)
{decoding}```

or `soflow sample . --nfe {nfe} --grid samples.png`. `config.json` holds the shape of the network.
"""
DECODING = """\
vae = load_vae({vae}, noise.device)  # the one that encoded its training data
images = vae.decode(latents)
"""
# by objective: its tag, and what the network has learned
LEARNED = {
    "soflow": (
        "solution-flow-model",
        "the solution function f(x, t, s) of the flow ODE, trained by solution flow models\n"
        "([arXiv 2512.15657](https://arxiv.org/abs/2512.15657))",
    ),
    "meanflow": (
        "meanflow",
        "the average velocity of the flow ODE between two times, trained by MeanFlow\n"
        "([arXiv 2505.13447](https://arxiv.org/abs/2505.13447))",
    ),
    "flow_matching": (
        "flow-matching",
        "the velocity of the flow ODE, trained by flow matching\n"
        "([arXiv 2210.02747](https://arxiv.org/abs/2210.02747))",
    ),
}
# an integral of the velocity takes many steps
VELOCITY_NFE = 64


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Weights of a network, and what they belong to.

    objective: what trained them.  vae: name of what decodes the latents that they draw, None where they draw images.
    kind: ema (averaged) or model (of the last step).  sigma_rel: width of the profile that the average was rebuilt for
    (`rebuild_average`), None where it is the run's own.
    """

    network: NetworkConfig
    flow: FlowConfig
    objective: str
    vae: str | None
    weights: Mapping[str, Tensor]
    kind: str
    step: int
    sigma_rel: float | None = None


def write_export(folder: Path, trained: Trained) -> None:
    """Write `folder`, which must not exist, completely or not at all.

    Raises CheckpointError where there is something, or the disk refuses, and ValueError for a network of one's own.
    """
    if trained.network.name == "own":
        raise ValueError(
            "network.name: got 'own', expected a network of soflow, because an export holds no code; "
            "load_flow(path, network=...) loads it in Python (docs/extending.md)"
        )
    if folder.exists():
        raise CheckpointError(f"{folder}: got a {'folder' if folder.is_dir() else 'file'}, expected nothing there yet")
    described = {
        "format_version": FORMAT_VERSION,
        "network": dataclasses.asdict(trained.network),
        "flow": dataclasses.asdict(trained.flow),
        "objective": trained.objective,
        "vae": trained.vae,
        "weights": trained.kind,
        "sigma_rel": trained.sigma_rel,
        "step": trained.step,
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True) as own:
            # within it: itself it is for the owner only
            partial = Path(own) / folder.name
            partial.mkdir()
            save_file(separate(trained.weights), partial / WEIGHTS, metadata={"format": "pt"})
            (partial / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
            (partial / CARD).write_text(_model_card(trained), encoding="utf-8")
            sync_folder(partial, like=partial / CARD)
            partial.rename(folder)
            sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot export: {error}") from error


def is_export(folder: Path) -> bool:
    """Return whether `folder` looks like one that `write_export` made."""
    return (folder / CONFIG).is_file()


def read_export(folder: Path) -> Trained:
    """Return what `write_export` wrote. Raises CheckpointError naming the file that is damaged, or newer."""
    path = folder / CONFIG
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        version = int(described["format_version"])
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format {version}, expected at most {FORMAT_VERSION}: a newer soflow wrote it"
            )
        network = parse_section(NetworkConfig, described["network"], "network", str(path))
        flow = parse_section(FlowConfig, described["flow"], "flow", str(path))
        # exports once did not say: no more than their own sampler promises
        objective = described.get("objective", "flow_matching" if flow.sampler in VELOCITY_SAMPLERS else "soflow")
        require_sampler("flow.sampler", flow.sampler, objective)
        vae = described.get("vae", default_vae(network.in_channels))
        if not isinstance(vae, str | None):
            raise CheckpointError(f"{path}: vae: got {vae!r}, expected a name or null")
        kind, step = str(described["weights"]), int(described["step"])
        width = described.get("sigma_rel")
        sigma_rel = None if width is None else float(width)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected what soflow export writes: {error!r}") from error
    weights = load_tensors(folder / WEIGHTS)
    return Trained(
        network=network,
        flow=flow,
        objective=objective,
        vae=vae,
        weights=weights,
        kind=kind,
        step=step,
        sigma_rel=sigma_rel,
    )


def _model_card(trained: Trained) -> str:
    network, flow = trained.network, trained.flow
    tag, learned = LEARNED[trained.objective]
    nfe = VELOCITY_NFE if flow.sampler in VELOCITY_SAMPLERS else 1
    tags = [tag, *["one-step-generation"] * (nfe == 1), *["class-conditional"] * (network.num_classes > 0)]
    return MODEL_CARD.format(
        name=network.name,
        tags=", ".join(tags),
        drawn="the latent of an image" if trained.vae else "an image",
        calls="one network call" if nfe == 1 else f"{nfe} network calls",
        learned=learned,
        millions=sum(tensor.numel() for tensor in trained.weights.values()) / 1e6,
        channels=network.in_channels,
        size=network.input_size,
        classes=network.num_classes or "none",
        objective=trained.objective,
        sampler=flow.sampler,
        path=flow.path,
        parameterization=flow.parameterization,
        weights=_weights_called(trained),
        step=trained.step,
        nfe=nfe,
        result="latents" if trained.vae else "images",
        labels=f"torch.arange(4) % {network.num_classes}" if network.num_classes else "None",
        imports="from soflow.vae import load_vae\n" if trained.vae else "",
        decoding=DECODING.format(vae=json.dumps(trained.vae)) if trained.vae else "",
    )


def _weights_called(trained: Trained) -> str:
    if trained.sigma_rel is not None:
        return f"averaged (power-function profile, sigma_rel {trained.sigma_rel})"
    return "averaged" if trained.kind == "ema" else "plain"
