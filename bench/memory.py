"""How much memory does a training step need: predicted, measured, and beside the straightforward implementation?

    python -m bench.memory [--model NAME] [--batch N] [--measure] [--json FILE]

GiB of tensors at most, of a step of a training under way. Predicted without a GPU and without the memory, by running
each variant's step on fake tensors (soflow/memory.py) as a GPU would: bf16 and fused ops for the engine, also with
recomputation, float32 for the plain variants of bench/plain.py. With --measure also measured: on a GPU by its
allocator, where it fits; on the CPU by counting the tensors of a real step. `activations` is what the step adds to
weights, averages, moments and gradients.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from bench import plain
from bench.figures import keep
from bench.machine import machine
from bench.variants import Engine, Plain, Variant, recipe
from soflow.memory import GIB, CountMemory, fake_tensors

TOLERANCE = 0.1
MODELS = ("DiT-B/4", "DiT-B/2", "DiT-L/2", "DiT-XL/2")


def makers(model: str, batch_size: int, precision: str, ops: str) -> dict[str, Callable[[torch.device], Variant]]:
    """Return how to make every variant on a device."""

    def ours(*overrides: str) -> Callable[[torch.device], Variant]:
        config = recipe(model, batch_size, f"engine.precision={precision}", f"engine.ops={ops}", *overrides)
        return lambda device: Engine("engine", config, device)

    fp32 = recipe(model, batch_size)
    return {
        "engine": ours(),
        "engine, norms recomputed": ours("engine.recompute=norms"),
        "engine, blocks recomputed": ours("engine.recompute=blocks"),
        "six calls": lambda device: Plain("six calls", plain.soflow_loss, fp32, device),
        "MeanFlow, one JVP": lambda device: Plain("MeanFlow, one JVP", plain.meanflow_loss, fp32, device),
    }


def weigh(make: Callable[[torch.device], Variant], fake: bool) -> dict[str, int]:
    """Return the bytes that live between steps, and those that a step adds at most: counted op by op, on the CPU."""
    with fake_tensors() if fake else nullcontext(), CountMemory() as count:
        variant = make(torch.device("cpu"))
        state = before = count.peak = count.now
        state += sum(2 * p.numel() * 4 for p in variant.network.parameters() if p.requires_grad)
        variant.backward()
        gradients = gradient_bytes(variant)
    return {"state": state, "gradients": gradients, "activations": count.peak - before - gradients}


def allocated(make: Callable[[torch.device], Variant]) -> int:
    """Return the bytes that the GPU's allocator gave out at most for gradients of one batch, without moments."""
    variant = make(torch.device("cuda"))
    # the first time cuBLAS takes memory of its own, which stays
    variant.backward()
    variant.network.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    variant.backward()
    return torch.cuda.max_memory_allocated() - before - gradient_bytes(variant)


def gradient_bytes(variant: Variant) -> int:
    """Return the bytes of the gradients of a variant."""
    return sum(p.grad.nbytes for p in variant.network.parameters() if p.grad is not None)


def measure(model: str, batch_size: int, measured: bool, gpu: bool) -> Iterator[dict[str, Any]]:
    """Yield a row per variant, in GiB."""
    precision, ops = ("fp32", "reference") if model == "small" else ("bf16", "fused")
    for name, make in makers(model, batch_size, precision, ops).items():
        sizes = {part: size / GIB for part, size in weigh(make, fake=True).items()}
        figures: dict[str, Any] = {
            "model": model,
            "variant": name,
            "batch": batch_size,
            **sizes,
            "total": sum(sizes.values()),
        }
        if measured:
            try:
                figures["measured"] = (allocated(make) if gpu else weigh(make, fake=False)["activations"]) / GIB
            except torch.cuda.OutOfMemoryError:
                figures["measured"] = None
            gc.collect()
            if gpu:
                torch.cuda.empty_cache()
        yield figures


def off(row: dict[str, Any]) -> float:
    """Return by which share of what was measured the prediction is off, 0 where nothing was."""
    return abs(row["activations"] / row["measured"] - 1.0) if row.get("measured") else 0.0


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the printed table, in GiB; the last column compares activations with those of MeanFlow."""
    lines = [
        f"{'model':10}{'variant':28}{'batch':>6}{'total':>9}{'state':>9}{'gradients':>11}{'activations':>13}"
        f"{'measured':>10}{'of MeanFlow':>13}"
    ]
    mean = {row["model"]: row["activations"] for row in rows if row["variant"].startswith("MeanFlow")}
    for row in rows:
        measured = "" if "measured" not in row else "too much" if row["measured"] is None else f"{row['measured']:.3f}"
        lines.append(
            f"{row['model']:10}{row['variant']:28}{row['batch']:6}{row['total']:9.3f}{row['state']:9.3f}"
            f"{row['gradients']:11.3f}{row['activations']:13.3f}{measured:>10}"
            f"{row['activations'] / mean[row['model']]:13.2f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 1 when a prediction is more than a tenth from what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("small", *MODELS), action="append", help="this one; may be repeated")
    parser.add_argument("--batch", type=int, default=256, help="batch size (default 256)")
    parser.add_argument("--measure", action="store_true", help="compare with a real step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    rows: list[dict[str, Any]] = []
    for model in options.model or MODELS:
        for row in measure(model, options.batch, options.measure, gpu):
            rows.append(row)
            keep(options.json, {**machine(), "rows": rows})
    print(table(rows))
    wrong = [row for row in rows if off(row) > TOLERANCE]
    for row in wrong:
        print(f"{row['model']}, {row['variant']}: predicted {row['activations']:.3f}, measured {row['measured']:.3f}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
