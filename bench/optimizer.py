"""How near to copy bandwidth is the update of a whole model, and how far ahead of PyTorch's?

    python -m bench.optimizer [--json FILE] [--only MODEL]

Needs a GPU and the CUDA extension. For each official size, in one run and by turns: milliseconds per update (median),
bytes per parameter that the way must move at least, and the GB/s which that makes, beside a plain copy's. Ways:

    fused           one launch: AdamW, average, norm
    fused clipped   two: the norm first, then the update with clipping and guard
    torch           torch.optim.AdamW(fused=True), foreach average, foreach norm
    official        as the official implementation trains: AdamW, loops in Python for the average and the norm
    apex            NVIDIA apex's FusedAdam with foreach average and norm, where it works

Before a size is timed, some updates of each way are compared with the first one's.
"""

import argparse
import gc
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.figures import keep
from soflow import doctor
from soflow.config import EmaConfig
from soflow.ema import Ema
from soflow.kernels.multi_tensor import is_built
from soflow.models import DIT_PRESETS, build_network
from soflow.optim import Optimizer

LR, BETAS, DECAY = 1e-4, (0.9, 0.99), 0.9999
# what each way must read and write, see docs/optimizer.md; a pass over the gradient for the norm costs 4
BYTES = {"fused": 36, "fused clipped": 40, "torch": 44, "official": 104, "apex": 44}
ROUNDS, UPDATES = 5, 10
COMPARED, SHRINK = 3, 0.5  # updates, and the factor of the gradient between them
# of the movement, which for a weight is only some 1e5 of its roundings
TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-4


@dataclass(frozen=True)
class Timing:
    """One way on one model. ms: median per update; gb_per_s: of the bytes it must move; of_copy: over a copy's rate."""

    model: str
    way: str
    parameters: int
    ms: float
    bytes_per_parameter: int
    gb_per_s: float
    of_copy: float


@dataclass(frozen=True)
class Way:
    """An update as a function without arguments, and the weights and averages that it moves."""

    update: Callable[[], None]
    weights: list[Tensor]
    averages: list[Tensor]


def fresh(network: nn.Module, gradients: list[Tensor]) -> tuple[nn.ParameterList, Ema[nn.ParameterList]]:
    """Return trained parameters equal to those of `network`, with `gradients`, and their average."""
    params = nn.ParameterList([p.detach().clone() for p in network.parameters() if p.requires_grad])
    ema = Ema(EmaConfig(decay=DECAY), params)
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient
    return params, ema


def fused(network: nn.Module, gradients: list[Tensor], **settings: float | bool) -> Way:
    """The engine's own."""
    params, ema = fresh(network, gradients)
    optimizer = Optimizer(params, lr=LR, betas=BETAS, averages=[ema], backend="fused", **settings)  # type: ignore[arg-type]
    return Way(lambda: _discard(optimizer.step()), list(params), list(ema.averages))


def foreach(network: nn.Module, gradients: list[Tensor], kind: Callable[..., torch.optim.Optimizer]) -> Way:
    """An optimizer of one launch, then foreach ops for the average and the norm."""
    params, ema = fresh(network, gradients)
    optimizer = kind(list(params))
    weights, averages = list(params), list(ema.averages)

    @torch.no_grad()
    def update() -> None:
        torch.nn.utils.get_total_norm(gradients, foreach=True)
        optimizer.step()
        torch._foreach_mul_(averages, DECAY)
        torch._foreach_add_(averages, weights, alpha=1 - DECAY)

    return Way(update, weights, averages)


def official(network: nn.Module, gradients: list[Tensor]) -> Way:
    """AdamW as it comes, the average and the norm tensor by tensor."""
    params, ema = fresh(network, gradients)
    optimizer = torch.optim.AdamW(list(params), lr=LR, betas=BETAS, weight_decay=0.0)
    weights, averages = list(params), list(ema.averages)

    @torch.no_grad()
    def update() -> None:
        total = torch.zeros((), device="cuda")
        for param in weights:
            assert param.grad is not None
            total += param.grad.norm() ** 2
        total.sqrt()
        optimizer.step()
        for average, weight in zip(averages, weights, strict=True):
            average.copy_(DECAY * average + (1 - DECAY) * weight)

    return Way(update, weights, averages)


def ways() -> dict[str, Callable[[nn.Module, list[Tensor]], Way]]:
    """Return the ways that this machine has."""

    def torch_fused(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=LR, betas=BETAS, weight_decay=0.0, fused=True)

    found: dict[str, Callable[[nn.Module, list[Tensor]], Way]] = {
        "fused": fused,
        "fused clipped": lambda n, g: fused(n, g, clip_norm=1e9, skip_nonfinite=True),
        "torch": lambda n, g: foreach(n, g, torch_fused),
        "official": official,
    }
    apex = doctor.run_check("NVIDIA apex", doctor.check_apex)
    if apex.status == "works":
        adam = importlib.import_module("apex.optimizers").FusedAdam
        found["apex"] = lambda n, g: foreach(n, g, lambda p: adam(p, lr=LR, betas=BETAS, adam_w_mode=True))
    else:
        print(f"apex: {apex.status}: {apex.detail}")
    return found


def milliseconds(call: Callable[[], None]) -> float:
    """Return the time of one call, the mean of UPDATES after two to warm up."""
    for _ in range(2):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(UPDATES):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / UPDATES


def copy_rate() -> float:
    """Return GB/s of a copy of 2 GiB, read and written."""
    source = torch.zeros(2**29, device="cuda")
    target = torch.empty_like(source)
    ms = sorted(milliseconds(lambda: _discard(target.copy_(source))) for _ in range(ROUNDS))[ROUNDS // 2]
    return 2 * 4 * source.numel() / ms / 1e6


def require_equal(made: dict[str, Way], starts: list[Tensor], gradients: list[Tensor]) -> None:
    """Raise AssertionError unless some updates of every way move weights and averages as the first way's do.

    The weights from `starts`, the averages from 0: an average that starts at the weights moves less than it is rounded.
    The gradients, which all ways share, shrink between the updates: of a constant one AdamW's step is always the same.
    """
    for way in made.values():
        torch._foreach_zero_(way.averages)
    for _ in range(COMPARED):
        for way in made.values():
            way.update()
        torch._foreach_mul_(gradients, SHRINK)
    zeros = [torch.zeros((), device=start.device) for start in starts]
    first, *others = made.items()
    for name, way in others:
        for what, tolerance, origins in (("weights", WEIGHT_TOLERANCE, starts), ("averages", TOLERANCE, zeros)):
            for a, b, origin in zip(getattr(way, what), getattr(first[1], what), origins, strict=True):
                apart = ((a - b).norm() / (b - origin).norm()).item()
                assert apart <= tolerance, f"{name}: {what} moved {apart} apart from those of {first[0]}"


def measure(
    model: str, found: dict[str, Callable[[nn.Module, list[Tensor]], Way]], copy_gb_per_s: float
) -> list[Timing]:
    """Return the timings of every way on one model, by turns."""
    torch.manual_seed(0)
    network = build_network(model).cuda()
    with torch.no_grad():
        for param in network.parameters():
            param.normal_(std=0.02)
    starts = [p.detach() for p in network.parameters() if p.requires_grad]
    gradients = [1e-3 * torch.randn_like(start) for start in starts]
    parameters = sum(gradient.numel() for gradient in gradients)
    made = {name: make(network, gradients) for name, make in found.items()}
    require_equal(made, starts, gradients)
    rounds = [{name: milliseconds(way.update) for name, way in made.items()} for _ in range(ROUNDS)]
    timings = []
    for name in made:
        ms = sorted(times[name] for times in rounds)[ROUNDS // 2]
        rate = parameters * BYTES[name] / ms / 1e6
        timings.append(Timing(model, name, parameters, ms, BYTES[name], rate, rate / copy_gb_per_s))
    return timings


def _discard(value: object) -> None:
    """Make a function of what returns something."""


def main() -> int:
    """Print the table, then one line of JSON where no file takes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--only", choices=DIT_PRESETS, action="append", help="this model, not all; may be repeated")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: got no GPU, expected one: bench.optimizer times updates", file=sys.stderr)
        return 2
    if not is_built():
        print("error: got no CUDA extension, expected one: python setup.py build_ext --inplace", file=sys.stderr)
        return 2
    found, rate = ways(), copy_rate()
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "copy_gb_per_s": rate, "rows": []}
    print(f"copy: {rate:.0f} GB/s")
    print(f"{'model':12}{'way':16}{'ms':>9}{'B/param':>9}{'GB/s':>7}{'of copy':>9}{'fused is':>10}")
    for model in args.only or DIT_PRESETS:
        timings = measure(model, found, rate)
        result["rows"] += [asdict(row) for row in timings]
        keep(args.json, result)
        for row in timings:
            print(
                f"{model:12}{row.way:16}{row.ms:9.3f}{row.bytes_per_parameter:9}{row.gb_per_s:7.0f}{row.of_copy:9.0%}"
                f"{row.ms / timings[0].ms:9.2f}x",
                flush=True,
            )
        gc.collect()
        torch.cuda.empty_cache()
    if args.json is None:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
