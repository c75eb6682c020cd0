"""How long does a training step take, beside the straightforward implementation, and where does the time go?

    python -m bench.step [--model NAME] [--variant NAME] [--batch N] [--rounds N] [--json FILE]

Variants, whose losses of the same batch are compared first (bench/variants.py):

    engine                     SoFlow as this engine runs it: bf16 on a GPU, fp32 on the CPU
    six calls                  SoFlow in plain PyTorch (bench/plain.py), TF32 on a GPU
    six calls, bf16 compiled   the same by autocast, torch.compile and torch's fused AdamW; on a GPU
    MeanFlow, one JVP          MeanFlow in plain PyTorch
    MeanFlow, engine           MeanFlow as this engine runs it

Without a GPU: the model "small" on one thread, all variants by turns, timed by the processor time of the process, which
other processes disturb less. With one: B/4, B/2, L/2 and XL/2, each variant at the largest batch up to --batch that
fits, one after the other because they do not fit together, and the engine once more at the end, to show what drifted.
Prints medians, the middle half and the engine's stages; writes them as JSON after each. A variant that fails has its
error there, and the exit code is 1.
"""

import argparse
import dataclasses
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from bench.figures import keep
from bench.machine import machine
from bench.variants import Engine, Variant, require_equal_losses, variants
from soflow.capture import NUM_WARMUP
from soflow.determinism import choose_algorithms
from soflow.meters import peak_flops
from soflow.objective import Batch

GPU_MODELS = ("DiT-B/4", "DiT-B/2", "DiT-L/2", "DiT-XL/2")
GPU_BATCH, CPU_BATCH = 256, 16


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the time of one call: of the clock on a GPU, of the processor on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    call()
    return time.process_time() - start


def stages(engine: Engine) -> dict[str, Callable[[], object]]:
    """Return the stages of the engine's step in their order, each computing with what those before it left."""
    step = engine.parts.step
    batches: list[Batch] = []
    losses: list[Tensor] = []

    def draw() -> None:
        batches[:] = step.draw(*engine.samples, *step.clock(engine.steps))

    def guidance() -> None:
        x_t, v_t = step.objective.point(step.flow, batches[0])
        step.objective.look_ahead(step.flow, batches[0], x_t, v_t)

    def forward() -> None:
        losses[:] = [step.module(batches[0]).loss]

    def backward() -> None:
        step.optimizer.zero_grad(set_to_none=True)
        losses.pop().backward()

    return {
        "draw": draw,
        "guidance": guidance,
        "forward with guidance": forward,
        "backward": backward,
        "update": step.optimizer.step,
    }


def build_that_fits(model: str, name: str, batch_size: int, device: torch.device) -> tuple[Variant, int]:
    """Return a warm variant at the largest batch of batch_size, its half, ... that fits."""
    while True:
        try:
            return warm(variants(model, batch_size, device)[name], device), batch_size
        except torch.cuda.OutOfMemoryError:
            if batch_size == 1:
                raise
        # outside of the handler, whose traceback holds the tensors
        batch_size //= 2
        free()


def warm(make: Callable[[], Variant], device: torch.device) -> Variant:
    """Return a variant that has trained as many steps as it takes until it is compiled and captured."""
    variant = make()
    choose_algorithms(same_bits=variant.same_bits)
    for _ in range(NUM_WARMUP + 1 if device.type == "cuda" else 1):
        variant.step()
    return variant


def free() -> None:
    """Give back what a variant that is gone held."""
    gc.collect()
    # what is compiled belongs to the code, not to a network: the next one would find the cache full, and run uncompiled
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_losses(model: str, names: Sequence[str], device: torch.device) -> None:
    """Compare the losses of variants at a batch in which they fit together."""
    require_equal_losses({name: make() for name, make in variants(model, 8, device).items() if name in names})
    free()


def measure_by_turns(
    model: str, names: Sequence[str], batch_size: int, device: torch.device, rounds: int
) -> Iterator[dict[str, Any]]:
    """Yield a row per variant, all of them in memory and timed by turns."""
    made = {name: build_that_fits(model, name, batch_size, device)[0] for name in names}
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, variant in made.items():
            choose_algorithms(same_bits=variant.same_bits)
            times[name].append(seconds(variant.step, device))
    for name, variant in made.items():
        figures = row(model, variant, batch_size, times[name], device)
        if isinstance(variant, Engine):
            figures["stages"] = stage_times(variant, device, rounds)
        yield figures


def measure_in_line(
    model: str, names: Sequence[str], batch_size: int, device: torch.device, rounds: int
) -> Iterator[dict[str, Any]]:
    """Yield a row per variant, one after the other, and a second one of the first."""
    for turn, name in enumerate((*names, names[0])):
        try:
            figures = measure_one(model, name, batch_size, device, rounds, with_stages=turn < len(names))
        except Exception as error:  # noqa: BLE001  # the others are timed all the same
            traceback.print_exc()
            figures = {"model": model, "variant": name, "error": f"{type(error).__name__}: {error}"}
        free()
        yield figures


def measure_one(
    model: str, name: str, batch_size: int, device: torch.device, rounds: int, with_stages: bool
) -> dict[str, Any]:
    """Return the row of a variant, of the engine with its stages, at the batch that fits."""
    variant, fitting = build_that_fits(model, name, batch_size, device)
    times = [seconds(variant.step, device) for _ in range(rounds)]
    figures = row(model, variant, fitting, times, device)
    if with_stages and isinstance(variant, Engine):
        # of one that is not captured: a graph keeps the memory of a whole step, which the stages need
        config = variant.config
        del variant
        free()
        eager = dataclasses.replace(config, engine=dataclasses.replace(config.engine, cuda_graph="off"))
        figures["stages"] = stage_times(Engine(name, eager, device), device, rounds)
    return figures


def row(model: str, variant: Variant, batch_size: int, times: list[float], device: torch.device) -> dict[str, Any]:
    """Return the figures of one variant; of the engine its MFU too, where the peak is known."""
    low, middle, high = quantiles(times, n=4)
    figures: dict[str, Any] = {"model": model, "variant": variant.name, "batch": batch_size, "seconds": middle}
    figures |= {"quartiles": [low, high], "rounds": len(times), "images_per_s": batch_size / middle}
    if isinstance(variant, Engine):
        peak = peak_flops(torch.cuda.get_device_name(), variant.precision) if device.type == "cuda" else None
        if peak is not None:
            figures["mfu"] = variant.parts.step.flops() / middle / peak
    return figures


def stage_times(engine: Engine, device: torch.device, rounds: int) -> dict[str, float]:
    """Return the median seconds of every stage of an engine's step."""
    made = stages(engine)
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, stage in made.items():
            times[name].append(seconds(stage, device))
    return {name: median(values) for name, values in times.items()}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the printed table; the last column is the time per image over the engine's on the same model."""
    lines = [
        f"{'model':10}{'variant':26}{'batch':>6}{'ms':>10}{'middle half':>20}{'images/s':>10}{'MFU':>6}"
        f"{'of engine':>11}"
    ]
    first: dict[str, float] = {}
    for figures in rows:
        if "error" in figures:
            continue
        per_image = figures["seconds"] / figures["batch"]
        first.setdefault(figures["model"], per_image)
        low, high = (1e3 * value for value in figures["quartiles"])
        mfu = f"{figures['mfu']:.0%}" if "mfu" in figures else ""
        lines.append(
            f"{figures['model']:10}{figures['variant']:26}{figures['batch']:6}{1e3 * figures['seconds']:10.1f}"
            f"{low:11.1f} -{high:7.1f}{figures['images_per_s']:10.1f}{mfu:>6}"
            f"{per_image / first[figures['model']]:10.2f}x"
        )
    for figures in rows:
        if "stages" in figures:
            parts = ", ".join(f"{name} {1e3 * value:.1f}" for name, value in figures["stages"].items())
            lines.append(f"{figures['model']} {figures['variant']}, ms: {parts}")
    lines += [f"{figures['model']} {figures['variant']}: {figures['error']}" for figures in rows if "error" in figures]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("small", *GPU_MODELS), action="append", help="this one; may be repeated")
    parser.add_argument("--variant", action="append", help="this one, the engine first; may be repeated")
    parser.add_argument("--batch", type=int, help=f"largest batch (default {GPU_BATCH}, on the CPU {CPU_BATCH})")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each variant, at least 7 (default 9)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args(arguments)
    if options.rounds < 7:
        parser.error(f"--rounds: got {options.rounds}, expected at least 7")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    choose_algorithms(same_bits=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    # else it goes on uncompiled, with a warning
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    batch_size = options.batch or (GPU_BATCH if device.type == "cuda" else CPU_BATCH)
    known = list(variants("small", batch_size, device))
    names = options.variant or known
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--variant: got {unknown[0]!r}, expected one of {', '.join(known)}")
    rows: list[dict[str, Any]] = []
    for model in options.model or (GPU_MODELS if device.type == "cuda" else ("small",)):
        check_losses(model, names, device)
        by = measure_in_line if device.type == "cuda" else measure_by_turns
        for figures in by(model, names, batch_size, device, options.rounds):
            rows.append(figures)
            keep(options.json, {**machine(), "rows": rows})
    print(table(rows))
    return int(any("error" in figures for figures in rows))


if __name__ == "__main__":
    sys.exit(main())
